"""A Qwen2 text model in a real vLLM engine: rows without pictures, and new weights under vLLM's names for it.

Not covered: Megatron ranks on the sending side (tests/distributed/test_text_family.py has their numbers), GPUs.
"""

from dataclasses import asdict
from pathlib import Path
from threading import Thread

import pytest
import torch
from safetensors.torch import load_file

from megatron_agent.data.images import ImageStore, PixelLimits
from megatron_agent.models.mapping import as_index
from megatron_agent.models.qwen2 import Qwen2
from megatron_agent.rollout.engine import Engine, RolloutConfig, Sampling
from megatron_agent.training.layout import Layout, megatron_pieces, vllm_pieces
from megatron_agent.weights.meeting import Meeting, MeetingPoint
from megatron_agent.weights.plan import make_plan, to_plain
from megatron_agent.weights.transport import send_all

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
TOLERANCE = 2e-4  # fp32, other kernels on other shapes
LAYOUT = Layout(2, 2)  # of the senders: tied, so the last stage's copy of the embedding must not be sent too


@pytest.fixture(scope="module")
def engine(tiny_text_model, tmp_path_factory):
    import ray

    store = ImageStore(tmp_path_factory.mktemp("pictures"), PixelLimits(784, 1 << 20))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    config = RolloutConfig(max_model_len=256, max_num_seqs=8, max_num_batched_tokens=512)
    actor = ray.remote(Engine).options(num_cpus=1, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    handle = actor.remote(str(tiny_text_model), config, store)
    yield handle
    ray.get(handle.shutdown.remote())
    ray.shutdown()


def logprobs(path, row, num_generated, weights=None):
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.load_state_dict(weights or {}, strict=False)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row])).logits[0, -num_generated - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(row[-num_generated:])[:, None])[:, 0].tolist()


def send(weights, sources, plan, sync_round):
    """What the Megatron ranks would send of `weights`, were they theirs."""
    lost = {}
    for rank, pieces in enumerate(sources):
        parameters = {}
        for name in {p.param for p in pieces}:
            stops = [[stop for _, stop in p.param_slice] for p in pieces if p.param == name]
            parameters[name] = torch.zeros([max(column) for column in zip(*stops)])
        for p in pieces:
            parameters[p.param][as_index(p.param_slice)] = weights[p.hf_name][as_index(p.hf_slice)]
        mine = [copy for copy in plan if copy.src_rank == rank]
        thread = Thread(target=lambda *args: lost.update(send_all(*args)), args=(Meeting(sync_round), mine, parameters))
        thread.start()
        yield thread
    assert lost == {}


def test_logprobs_equal_transformers_before_and_after_new_weights(engine, tiny_text_model):
    import ray

    family = Qwen2(tiny_text_model)
    table = family.table(LAYOUT, transformer_engine=False)
    sources = [megatron_pieces(table, LAYOUT, family.num_layers, rank) for rank in range(LAYOUT.world_size)]
    plan = make_plan(sources, [vllm_pieces(table, 1, 0)])
    ray.get(engine.init_weight_transfer.remote({"copies": [to_plain(plan)], "dtype": "float32", "first_rank": 0}))
    row, sampling = list(range(40, 70)), Sampling(max_tokens=24, seed=1)
    turn = ray.get(engine.generate.remote(row, [], sampling))
    expected = logprobs(tiny_text_model, row + turn.token_ids, len(turn.token_ids))
    assert turn.logprobs == pytest.approx(expected, abs=TOLERANCE) and set(turn.weight_versions) == {0}

    generator = torch.Generator().manual_seed(3)
    old = load_file(tiny_text_model / "model.safetensors")
    new = {name: t + 0.05 * torch.randn(t.shape, generator=generator) for name, t in old.items()}
    point = MeetingPoint()
    sync_round = point.open()
    threads = list(send(new, sources, plan, sync_round))
    ray.get(engine.sync_weights.remote({"sync_round": asdict(sync_round)}, 1))
    for thread in threads:
        thread.join(60)
    turn = ray.get(engine.generate.remote(row, [], sampling))
    expected = logprobs(tiny_text_model, row + turn.token_ids, len(turn.token_ids), new)
    assert turn.logprobs == pytest.approx(expected, abs=TOLERANCE) and set(turn.weight_versions) == {1}
    before = logprobs(tiny_text_model, row + turn.token_ids, len(turn.token_ids))
    assert max(abs(a - b) for a, b in zip(before, expected)) > 0.05  # else old weights would pass too
