"""Transfer plans against vLLM's own model and weight loaders: every parameter of a tensor-parallel rank, bit for bit.

vLLM's model is built in this process as any rank of any size: its layers ask a group for rank and size, nothing else.
Not covered: what a backend does to the weights after loading (tests/integration).
"""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_agent.errors import ConfigError, WeightSyncError
from megatron_agent.models.mapping import as_index
from megatron_agent.models.qwen2_5_vl import Qwen2_5_VL
from megatron_agent.training.layout import Layout
from megatron_agent.weights.plan import RolloutLayout, plan_transfer
from tests.unit.weights.plan_reference import megatron_shard, random_weights, vllm_shard

pytestmark = pytest.mark.integration  # imports vLLM

REAL = Path(__file__).parents[2] / "data" / "qwen2_5_vl_7b.json"
TRAINING = Layout(2, 2, 2)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def family(request, tmp_path):
    config = json.loads(REAL.read_text())
    config |= dict(hidden_size=256, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
                   vocab_size=333, tie_word_embeddings=request.param)  # fmt: skip
    config["rope_scaling"]["mrope_section"] = [4, 6, 6]
    config["vision_config"] |= dict(depth=1, hidden_size=256, intermediate_size=72, num_heads=8, out_hidden_size=256,
                                    patch_size=2, fullatt_block_indexes=[0])  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return Qwen2_5_VL(tmp_path)


def vllm_model(family, monkeypatch, tensor_parallel, rank, mode):
    """vLLM's model as it is on one tensor-parallel rank, nothing loaded."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import vllm.distributed.parallel_state as state
    from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

    model_config = ModelConfig(
        model=str(family.path), skip_tokenizer_init=True, dtype="float32", mm_encoder_tp_mode=mode, max_model_len=64
    )
    config = VllmConfig(model_config=model_config)
    for name, size, index in (("_TP", tensor_parallel, rank), ("_PP", 1, 0), ("_DCP", 1, 0), ("_EP", 1, 0)):
        group = SimpleNamespace(rank_in_group=index, world_size=size, is_first_rank=True, is_last_rank=True)
        monkeypatch.setattr(state, name, group)
    with set_current_vllm_config(config):
        return Qwen2_5_VLForConditionalGeneration(vllm_config=config)


def live_parameters(model):
    """Without the padding of the vocabulary."""
    found = {}
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        live_rows = getattr(module, "num_org_embeddings_per_partition", len(parameter))
        found[name] = parameter.data[:live_rows].numpy()
    return {name: live for name, live in found.items() if live.size}


@pytest.mark.parametrize("mode", ["weights", "data"])
@pytest.mark.parametrize("tensor_parallel", [1, 2, 4, 8])
def test_the_plan_fills_what_vllm_would_load(family, monkeypatch, tensor_parallel, mode):
    table = family.table(TRAINING, transformer_engine=False)
    weights = random_weights(table)
    shards = [megatron_shard(weights, family.text, TRAINING, rank) for rank in range(TRAINING.world_size)]
    rollout = RolloutLayout(tensor_parallel, 2, mode)
    plan = plan_transfer(table, family.num_layers, TRAINING, rollout)
    for rank in sorted({0, tensor_parallel // 2, tensor_parallel - 1}):
        model = vllm_model(family, monkeypatch, tensor_parallel, rank, mode)
        model.load_weights((name, torch.from_numpy(tensor).float()) for name, tensor in weights.items())
        loaded = live_parameters(model)
        plan.check_engine(rank, {name: tensor.shape for name, tensor in loaded.items()})
        received = {name: np.full_like(tensor, -2) for name, tensor in loaded.items()}
        for c in plan.receives(1, rank):
            received[c.dst_param][as_index(c.dst_slice)] = shards[c.src_rank][c.src_param][as_index(c.src_slice)]
        reference = vllm_shard(weights, family.text, rollout, rank)
        assert reference.keys() == loaded.keys()
        for name, tensor in loaded.items():
            assert np.array_equal(received[name], tensor), (rank, name)
            assert np.array_equal(reference[name], tensor), f"the reference of the random layouts is wrong: {name}"


def test_what_vllm_cannot_split_is_refused(family, monkeypatch):
    """68 rows of the tower's MLP over 8 ranks, as the 3420 of the real 3B and 7B."""
    family.vision = replace(family.vision, intermediate_size=68)
    table = family.table(TRAINING, transformer_engine=False)
    config = json.loads((family.path / "config.json").read_text())
    config["vision_config"]["intermediate_size"] = 68
    (family.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(AssertionError):
        vllm_model(family, monkeypatch, 8, 0, "weights")
    with pytest.raises(ConfigError, match=r"gate_proj.* on the rollout side .* 68 .* 8 .*mm_encoder_tp_mode=\"data\""):
        plan_transfer(table, family.num_layers, TRAINING, RolloutLayout(8))
    plan = plan_transfer(table, family.num_layers, TRAINING, RolloutLayout(8, mm_encoder_tp_mode="data"))
    model = vllm_model(family, monkeypatch, 8, 0, "data")
    plan.check_engine(0, {name: tensor.shape for name, tensor in live_parameters(model).items()})


def test_an_engine_of_another_vocabulary(family, monkeypatch):
    """333 and 340 tokens are padded to the same 384 rows."""
    model = vllm_model(family, monkeypatch, 1, 0, "weights")
    shapes = {name: tensor.shape for name, tensor in live_parameters(model).items()}
    family.text = replace(family.text, vocab_size=340)
    plan = plan_transfer(family.table(TRAINING, False), family.num_layers, TRAINING, RolloutLayout())
    with pytest.raises(WeightSyncError, match=r"embed_tokens.*the engine has \(333, 256\), the trainer's model \(340, 256\)"):
        plan.check_engine(0, shapes)
