"""The text family: what its folder says, its place in vLLM, how pipelines are dealt, what is refused.

Not covered: that the built model computes the right thing (tests/distributed/test_text_family.py).
"""

import json

import pytest
from safetensors import safe_open

from megatron_agent.errors import CheckpointError, ConfigError
from megatron_agent.models.qwen2 import Qwen2, TextConfig
from megatron_agent.models.qwen2_5_vl import Qwen2_5_VL
from megatron_agent.training.layout import Layout, split_layers

# Qwen/Qwen2.5-0.5B-Instruct as published.
PUBLISHED = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 21, "num_attention_heads": 14, "num_hidden_layers": 24,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


def folder(path, **changes):
    config = {key: value for key, value in {**PUBLISHED, **changes}.items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def family(tiny_text_model):
    return Qwen2(tiny_text_model)


def test_a_published_config(tmp_path):
    text = Qwen2(folder(tmp_path)).text
    assert text == TextConfig(896, 4864, 24, 14, 2, 64, 151936, 1e-6, 1e6, (32,), 32768, True)
    assert text.layer_parameters == 896 * 64 * (14 + 4) + 896 * 896 + 3 * 896 * 4864


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected 'qwen2'; model.family names the family"),
        ({"num_key_value_heads": None}, r"config\.json: no num_key_value_heads"),
        ({"rope_theta": None}, "no rope_theta"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope of type 'yarn'"),
        ({"use_sliding_window": True}, "use_sliding_window is true"),
    ],
)
def test_folders_that_are_refused(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        Qwen2(folder(tmp_path, **changes))


def test_a_family_reads_no_folder_of_the_other(tiny_models, tiny_text_model):
    with pytest.raises(CheckpointError, match="model_type is 'qwen2_5_vl', expected 'qwen2'"):
        Qwen2(tiny_models["tied"])
    with pytest.raises(CheckpointError, match="model_type is 'qwen2', expected 'qwen2_5_vl'"):
        Qwen2_5_VL(tiny_text_model)


@pytest.mark.parametrize(
    ("training", "rollout", "message"),
    [
        (Layout(tensor_parallel=3), 1, r"tensor_parallel=3 does not divide the model's attention heads \(4\)"),
        (Layout(pipeline_parallel=4), 1, "more than the model's 3 layers"),
        (Layout(), 3, r"rollout\.tensor_parallel=3 neither divides the model's key/value heads \(2\)"),
        (Layout(), 8, r"rollout\.tensor_parallel=8 does not divide the model's 4 attention heads"),
    ],
)
def test_layouts_that_are_refused(family, training, rollout, message):
    with pytest.raises(ConfigError, match=message):
        family.check(training, rollout)


def test_layouts_that_fit(family):
    for layout in (Layout(), Layout(4, sequence_parallel=True), Layout(1, 3), Layout(context_parallel=2), Layout(2, 2, 2)):
        family.check(layout, rollout_tensor_parallel=4)


def test_names_in_the_file_in_megatron_and_in_vllm(family, tiny_text_model):
    """vLLM's text model has no `language_model.` before its names, and a tied model no tensor of a head."""
    table = family.table(Layout(), transformer_engine=False)
    with safe_open(tiny_text_model / "model.safetensors", "pt") as reader:
        assert {e.hf_name: e.shape for e in table} == {n: tuple(reader.get_slice(n).get_shape()) for n in reader.keys()}  # noqa: SIM118
    names = {e.hf_name: (e.param, e.vllm_param) for e in table}
    assert names["model.embed_tokens.weight"] == ("language.embedding.word_embeddings.weight", "model.embed_tokens.weight")
    assert names["model.layers.2.self_attn.k_proj.bias"] == (
        "language.decoder.layers.2.self_attention.linear_qkv.bias",
        "model.layers.2.self_attn.qkv_proj.bias",
    )
    assert not any("visual" in e.param or "lm_head" in e.hf_name for e in table)


def test_only_the_last_of_several_stages_has_a_copy_of_the_tied_head(family):
    copies = [e for e in family.table(Layout(1, 2), False) if e.param == "language.output_layer.weight"]
    assert [(e.hf_name, e.stage, e.vllm_param) for e in copies] == [("model.embed_tokens.weight", "last", None)]
    assert not [e for e in family.table(Layout(2), False) if e.param == "language.output_layer.weight"]


def test_the_stage_of_the_head_takes_fewer_layers(tmp_path):
    """A small model with a large vocabulary: the head weighs 151,936 x 896 x 1/4, a layer 14.9 M: 2.3 layers."""
    family = Qwen2(folder(tmp_path))
    first, last = family.stage_costs(Layout(1, 4))
    assert first == 0 and last == pytest.approx(151_936 * 896 / 4 / 14_909_440, rel=0.001)
    assert family.balanced(Layout(1, 4)).stage_layers == (6, 7, 7, 4) == split_layers(24, 4, first, last)
    given = Layout(1, 2, stage_layers=(20, 4))
    assert family.balanced(given) is given and family.balanced(Layout(4)) == Layout(4)
