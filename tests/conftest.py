"""Checkpoints of tiny Qwen2.5-VL and Qwen2 models, made once per session, for every test that needs one.

Nothing here installs the stand-ins for CUDA: in the same process they spoil what transformers loads afterwards.
"""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
WORDS = "system user assistant what color is it ? zoom red green turn on You are a helpful assistant. Error: the tool"


def pytest_addoption(parser):
    parser.addoption(
        "--rounds", type=int, default=1, help="how often each test is run; `-m fault --rounds 20` tries the breaks"
    )


def pytest_generate_tests(metafunc):
    if (rounds := metafunc.config.getoption("rounds")) > 1:
        metafunc.fixturenames.append("round_number")
        metafunc.parametrize("round_number", range(rounds), indirect=True)


@pytest.fixture
def round_number(request):
    return request.param


def quickstart():
    """The module that makes the quickstart's model."""
    sys.path.insert(0, str(QUICKSTART))
    try:
        import tiny_model
    finally:
        sys.path.remove(str(QUICKSTART))
    return tiny_model


def write_checkpoint(folder, model_class, config, tokenizer):
    """Biases and norms are random too (Hugging Face has 0 and 1)."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = model_class(config).float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_tiny_model(folder, text_options):
    """The quickstart's sizes with `text_options` over them."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    tokenizer = quickstart().make_tokenizer([WORDS])
    config = quickstart().make_config(tokenizer)
    for name, value in text_options.items():
        setattr(config.text_config, name, value)
    config.text_config.layer_types = config.text_config.layer_types[: config.text_config.num_hidden_layers]
    config.tie_word_embeddings = config.text_config.tie_word_embeddings
    return write_checkpoint(folder, Qwen2_5_VLForConditionalGeneration, config, tokenizer)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """`tied`: the quickstart's (4 heads, 2 KV heads, tied). `untied`: 8 heads, 4 KV heads, a head of its own, an odd
    vocabulary (its padding is uneven over ranks) and an FFN that is no power of two."""
    root = tmp_path_factory.mktemp("tiny_models")
    untied = dict(
        num_attention_heads=8, num_key_value_heads=4, head_dim=16, intermediate_size=168, vocab_size=365,
        num_hidden_layers=2, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5, "mrope_section": [2, 3, 3]},
    )  # fmt: skip
    return {"tied": write_tiny_model(root / "tied", {}), "untied": write_tiny_model(root / "untied", untied)}


@pytest.fixture(scope="session")
def tiny_text_model(tmp_path_factory):
    """A Qwen2 text model, tied like the small published ones; 4 heads, 2 KV heads, 3 layers: pipelines are uneven."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = quickstart().make_tokenizer([WORDS])
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    config = Qwen2Config(
        hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=365, max_position_embeddings=4096, rms_norm_eps=1e-6, initializer_range=0.08, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5}, bos_token_id=pad, eos_token_id=end, pad_token_id=pad,
    )  # fmt: skip
    return write_checkpoint(tmp_path_factory.mktemp("tiny_text_model"), Qwen2ForCausalLM, config, tokenizer)
