"""A teacher must read the policy's token ids as the policy wrote them; tokenizers are files of the tokenizers library."""

import json
import shutil

import pytest

from megatron_agent import stages
from megatron_agent.config import parse
from megatron_agent.errors import ConfigError
from megatron_agent.models.vocabulary import check_same_tokens, token_ids


def edited(folder, file, change):
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))
    return folder


@pytest.fixture
def teacher(tiny_models, tmp_path):
    return shutil.copytree(tiny_models["tied"], tmp_path / "teacher")


def test_a_copy_is_a_teacher_and_rows_of_padding_do_not_matter(tiny_models, teacher):
    policy = tiny_models["tied"]
    assert len(token_ids(policy)) > 100 and token_ids(policy)["<|im_end|>"] == token_ids(teacher)["<|im_end|>"]
    check_same_tokens(policy, teacher)
    check_same_tokens(policy, edited(teacher, "config.json", lambda c: c.update(vocab_size=100_000)))


def swap(content):
    vocab = content["model"]["vocab"]
    first, second = list(vocab)[:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap, "2 tokens differ"),
        (
            lambda c: c["added_tokens"].append(c["added_tokens"][-1] | {"id": 9999, "content": "<own>"}),
            "'<own>': None and 9999",
        ),
        (lambda c: c["model"].pop("vocab"), "not a tokenizer"),
    ],
)
def test_another_tokenizer_is_refused(tiny_models, teacher, change, message):
    with pytest.raises(ConfigError, match=message):
        check_same_tokens(tiny_models["tied"], edited(teacher, "tokenizer.json", change))


def test_a_run_does_not_start_with_it(tiny_models, teacher):
    edited(teacher, "tokenizer.json", swap)
    tree = {"model": {"path": str(tiny_models["tied"])}, "algorithm": {"name": "distillation", "teacher_path": str(teacher)}}
    with pytest.raises(ConfigError, match=r"its tokenizer is not that of model\.path"):
        stages.check(parse(tree))
    (teacher / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        stages.check(parse(tree))


def test_too_few_rows_are_refused(tiny_models, teacher):
    edited(teacher, "config.json", lambda c: (c.pop("text_config", None), c.update(vocab_size=10)))
    with pytest.raises(ConfigError, match="vocab_size=10, the tokens of model"):
        check_same_tokens(tiny_models["tied"], teacher)
