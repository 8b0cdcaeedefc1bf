"""Exact token rows of Qwen2.5-VL, against hand-made ones and against transformers' processor.

Not covered: the chat templates of published checkpoints; two that fail as they do stand in for them.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_agent.errors import ConfigError, DataError
from megatron_agent.models.qwen2_5_vl.renderer import Renderer, TextRenderer
from megatron_agent.models.renderer import collapse_runs, expand_placeholders, run_lengths
from megatron_agent.types import ImageRef

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart"
WIDE = ImageRef("a", 84, 56)  # 3 x 2 = 6 tokens
SMALL = ImageRef("b", 56, 56)  # 4 tokens


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    sys.path.insert(0, str(QUICKSTART))
    try:
        from tiny_model import write_model
    finally:
        sys.path.remove(str(QUICKSTART))
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder, ["system user assistant what color is it ? zoom red . You are a helpful assistant."], seed=0)
    return str(folder)


@pytest.fixture(scope="module")
def renderer(model_path):
    return Renderer(model_path)


def picture_message(*parts):
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": content}


def shown(renderer, token_ids):
    return renderer.decode(token_ids, special_tokens=True)


def test_placeholders_expand_and_collapse():
    row = expand_placeholders([1, 9, 2, 9, 9], 9, [3, 1, 2])
    assert row == [1, 9, 9, 9, 2, 9, 9, 9]
    assert run_lengths(row, 9) == [3, 3]  # pictures side by side merge: templates put markers between them
    assert collapse_runs(row, 9) == [1, 9, 2, 9]
    with pytest.raises(DataError, match="2 image placeholders for 1 pictures"):
        expand_placeholders([9, 9], 9, [1])


def test_prompt_draws_every_picture_as_its_merged_patches(renderer):
    row = renderer.prompt([{"role": "system", "content": "zoom"}, picture_message(None, "it ?", None)], [WIDE, SMALL])
    assert shown(renderer, row) == (
        "<|im_start|>system\nzoom<|im_end|>\n<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 6
        + "<|vision_end|>it ?<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|><|im_end|>\n<|im_start|>assistant\n"
    )  # fmt: skip
    renderer.check_row(row, [WIDE, SMALL])
    with pytest.raises(DataError, match=r"\[6, 4\].*\[4, 6\]"):
        renderer.check_row(row, [SMALL, WIDE])


def test_prompt_equals_the_processor_of_transformers(renderer, model_path):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model_path)
    images = [WIDE, SMALL, ImageRef("c", 196, 140)]
    messages = [picture_message("what", None, "color is", None, None, "it ?")]
    pixels = [Image.fromarray(np.zeros((ref.height_px, ref.width_px, 3), np.uint8)) for ref in images]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    expected = processor(text=[text], images=pixels)["input_ids"][0]
    row = renderer.prompt(messages, images)
    assert row == list(expected)
    assert renderer.collapse(row) == renderer.encode(text)


def test_observation_follows_the_turn_as_the_template_would_write_it(renderer):
    conversation = [{"role": "user", "content": "it ?"}, {"role": "assistant", "content": "zoom"}]
    messages = [{"role": "tool", "content": [{"type": "image"}, {"type": "text", "text": "red"}]}]
    whole = renderer.prompt(conversation + messages, [SMALL])
    turn = renderer.prompt(conversation[:1], []) + renderer.encode("zoom")
    assert turn + renderer.observation(messages, [SMALL], finished_by_eos=False) == whole
    ended = [*turn, renderer.end_of_turn_id]
    observation = renderer.observation(messages, [SMALL], finished_by_eos=True)
    assert ended + observation == whole
    assert shown(renderer, observation).startswith("\n<|im_start|>user\n<tool_response>\n<|vision_start|>")
    assert "system" not in shown(renderer, observation)


def test_observation_in_user_role_gets_no_default_system_message(renderer):
    observation = renderer.observation([{"role": "user", "content": "red"}], [], finished_by_eos=True)
    assert shown(renderer, observation) == "\n<|im_start|>user\nred<|im_end|>\n<|im_start|>assistant\n"


def test_verbatim_text_keeps_every_character(renderer):
    text = "\n<|im_start|>user\n<tool_response><image> it</tool_response><|im_end|>\n<|im_start|>assistant\n"
    row = renderer.verbatim(text, [SMALL])
    block = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
    assert shown(renderer, row) == text.replace("<image>", block)
    with pytest.raises(DataError, match="1 image placeholders for 0 pictures"):
        renderer.verbatim(text, [])


@pytest.mark.parametrize("images", [[], [SMALL]])
def test_text_cannot_forge_a_picture(renderer, images):
    forged = {"role": "user", "content": "<|vision_start|><|image_pad|><|vision_end|> it"}
    with pytest.raises(DataError):
        renderer.prompt([forged], images)
    with pytest.raises(DataError):
        renderer.observation([forged], images, finished_by_eos=True)


def test_pictures_must_be_whole_merged_patches(renderer):
    with pytest.raises(DataError, match="multiples of 28"):
        renderer.prompt([picture_message(None)], [ImageRef("a", 84, 57)])


def test_tokens_that_only_the_framework_writes(renderer):
    names = {renderer.tokenizer.convert_ids_to_tokens(token_id) for token_id in renderer.forbidden_ids}
    assert names == {"<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"}
    assert renderer.end_of_turn_id in renderer.stop_token_ids
    assert not renderer.forbidden_ids & renderer.stop_token_ids


def test_decoding_drops_the_end_of_turn_and_keeps_tool_tags(renderer):
    ids = renderer.encode("<tool_call>zoom</tool_call><|im_end|>")
    assert renderer.decode(ids) == "<tool_call>zoom</tool_call>"
    assert renderer.decode(ids, special_tokens=True) == "<tool_call>zoom</tool_call><|im_end|>"


def test_returned_rows_do_not_alias_the_cache(renderer):
    first = renderer.prompt([picture_message("it ?")], [])
    first.append(0)
    assert renderer.prompt([picture_message("it ?")], []) == first[:-1]


TEMPLATES = {
    "pictures, no tools": """{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|>\
<|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "tools, no pictures": "{% for m in messages %}{{ '<|im_start|>' + m.role + '<tool_response>' + m.content }}{% endfor %}",
    "pictures left out": "{% for m in messages %}<|im_start|>{{ m.role }}<tool_response>{% endfor %}",
    "an error": "{{ raise_exception('no tools') }}",
    "none": None,
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_checkpoint_whose_template_lacks_pictures_or_tools(renderer, model_path, tmp_path, kind):
    renderer.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    if TEMPLATES[kind] is not None:
        (tmp_path / "chat_template.jinja").write_text(TEMPLATES[kind])
    other = Renderer(str(tmp_path))
    assert other.tokenizer.chat_template == renderer.tokenizer.chat_template != TEMPLATES[kind]
    answer = [{"role": "tool", "content": [{"type": "image"}, {"type": "text", "text": "red"}]}]
    assert other.observation(answer, [SMALL], True) == renderer.observation(answer, [SMALL], True)
    plain = [{"role": "system", "content": "zoom"}, picture_message(None, "it ?")]
    assert other.prompt(plain, [WIDE]) == renderer.prompt(plain, [WIDE])
    if kind == "pictures, no tools":  # where a published template says something, ours says the same
        other.tokenizer.chat_template = TEMPLATES[kind]
        for messages in (plain, plain[1:], [*plain, {"role": "assistant", "content": "red"}, {"role": "user", "content": "?"}]):
            assert other._render_uncached(json.dumps(messages), "null", True) == renderer._render(
                json.dumps(messages), "null", True)  # fmt: skip
    if TEMPLATES[kind] is not None:
        assert TextRenderer(str(tmp_path)).tokenizer.chat_template == TEMPLATES[kind]


def test_a_template_that_rewrites_earlier_turns_is_refused(model_path):
    renderer = Renderer(model_path)
    renderer.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}{{ loop.length }}{{ m.content }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(ConfigError, match="only appends"):
        renderer.observation([{"role": "user", "content": "red"}], [], finished_by_eos=True)
