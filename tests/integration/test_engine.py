"""A real vLLM engine in a Ray actor: rows, log-probs against transformers, weight versions, new weights under way.

The receiver here loads a whole file; the one of megatron_agent.weights has tests of its own. Not covered: tensor
parallelism, GPUs.
"""

import asyncio
import io
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_agent.data.images import ImageStore, PixelLimits
from megatron_agent.errors import EngineError, WeightSyncError
from megatron_agent.models.qwen2_5_vl.renderer import Renderer
from megatron_agent.rollout.engine import Engine, RolloutConfig, Sampling
from megatron_agent.rollout.pool import EnginePool

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
TOLERANCE = 2e-4  # fp32, other kernels on other shapes
FILE_RECEIVER = """
from dataclasses import dataclass
from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader import reload

@dataclass
class Init(WeightTransferInitInfo):
    pass

@dataclass
class Update(WeightTransferUpdateInfo):
    path: str

class FileReceiver(WeightTransferEngine):
    init_info_cls, update_info_cls = Init, Update
    def init_transfer_engine(self, info): pass
    def start_weight_update(self): reload.initialize_layerwise_reload(self.model)
    def receive_weights(self, info): self.model.load_weights(load_file(info.path).items())
    def finish_weight_update(self):
        reload.finalize_layerwise_reload(self.model, self.model_config)
        for module in self.model.modules():
            # On CPU a tied head multiplies by a packed copy of the embedding, which the reload forgets.
            if hasattr(module, "cpu_linear") and module.weight.numel():
                module.quant_method.process_weights_after_loading(module)
    def shutdown(self): pass

WeightTransferEngineFactory.register_engine("file", FileReceiver)

class Extension:
    def describe_parameters(self):
        return {name: tuple(p.shape) for name, p in self.model_runner.get_model().named_parameters()}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two checkpoints that differ in every weight, vision tower included."""
    sys.path.insert(0, str(ROOT / "examples" / "quickstart"))
    try:
        from tiny_model import write_model
    finally:
        sys.path.pop(0)
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        write_model(folder / str(seed), ["system user assistant what color is it ? zoom red ."], seed)
    return [str(folder / "0"), str(folder / "1")]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return ImageStore(tmp_path_factory.mktemp("pictures"), PixelLimits(784, 1 << 20))


@pytest.fixture(scope="module")
def engine(models, store, tmp_path_factory):
    import ray

    plugins = tmp_path_factory.mktemp("plugins")
    (plugins / "file_receiver.py").write_text(FILE_RECEIVER)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(plugins)])}
    config = RolloutConfig(max_model_len=512, max_num_seqs=32, max_num_batched_tokens=1024)
    actor = ray.remote(Engine).options(num_cpus=1, runtime_env={"env_vars": environment})
    handle = actor.remote(models[0], config, store, 4, 0, "file", "file_receiver.Extension")
    ray.get(handle.init_weight_transfer.remote({}))
    yield handle
    ray.get(handle.shutdown.remote())
    ray.shutdown()


@pytest.fixture(scope="module")
def renderer(models):
    return Renderer(models[0])


def picture(store, seed, width=112, height=84):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return store.put(data.getvalue())


def prompt(renderer, store, seed=0):
    images = [picture(store, seed), picture(store, seed + 1, 56, 56)]
    content = [{"type": "image"}, {"type": "text", "text": "what color is it ?"}, {"type": "image"}]
    return renderer.prompt([{"role": "user", "content": content}], images), images


def reference_logprobs(model_path, store, row, images, num_generated, temperature, banned=()):
    import torch
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    processor = AutoProcessor.from_pretrained(model_path).image_processor
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_path, dtype=torch.float32).eval()
    pixels = processor([store.picture(ref) for ref in images], return_tensors="pt")
    ids = torch.tensor([row])
    types = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types, **pixels).logits[0]
    logits[:, list(banned)] = -torch.inf
    logprobs = (logits / temperature).log_softmax(-1)
    start = len(row) - num_generated
    return [logprobs[i - 1, row[i]].item() for i in range(start, len(row))]


def test_generation_matches_transformers_and_is_stamped(engine, models, renderer, store):
    import ray

    row, images = prompt(renderer, store)
    turn = ray.get(engine.generate.remote(row, images, Sampling(temperature=0.5, max_tokens=24, seed=1)))
    assert len(turn.token_ids) == len(turn.logprobs) == len(turn.weight_versions)
    assert set(turn.weight_versions) == {0}
    assert (turn.stop_reason == "length") == (turn.token_ids[-1] not in renderer.stop_token_ids)
    expected = reference_logprobs(models[0], store, row + turn.token_ids, images, len(turn.token_ids), 0.5)
    assert turn.logprobs == pytest.approx(expected, abs=TOLERANCE)


def test_the_same_seed_samples_the_same_turn_and_the_prefix_is_reused(engine, renderer, store):
    import ray

    row, images = prompt(renderer, store, seed=10)
    sampling = Sampling(max_tokens=16, seed=5)
    first, second = ray.get([engine.generate.remote(row, images, sampling) for _ in range(2)])
    assert first.token_ids == second.token_ids
    ray.get(engine.generate.remote(row + first.token_ids, images, sampling))
    assert ray.get(engine.stats.remote())["prefix_cache_hit_rate"] > 0


def test_banned_tokens_and_stop_strings(engine, renderer, store):
    import ray

    row, images = prompt(renderer, store)
    free = ray.get(engine.generate.remote(row, images, Sampling(temperature=0.0, max_tokens=8)))
    banned = Sampling(temperature=0.0, max_tokens=8, banned_token_ids=(free.token_ids[0],))
    assert free.token_ids[0] not in ray.get(engine.generate.remote(row, images, banned)).token_ids
    piece = next(text for text in (renderer.decode([t]) for t in free.token_ids[1:]) if text and "\ufffd" not in text)
    stopped = ray.get(engine.generate.remote(row, images, Sampling(temperature=0.0, max_tokens=8, stop=(piece,))))
    assert stopped.stop_reason == "stop"
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert piece in renderer.decode(stopped.token_ids)


def test_logprobs_under_a_ban(engine, models, renderer, store):
    """Banned tokens take no probability from the others; in the trainer neither (tests/unit/models/test_head.py)."""
    import ray

    row, images = prompt(renderer, store)
    banned = tuple(range(2, 200))
    turn = ray.get(
        engine.generate.remote(row, images, Sampling(temperature=0.5, max_tokens=24, seed=1, banned_token_ids=banned))
    )
    assert not set(turn.token_ids) & set(banned)
    arguments = models[0], store, row + turn.token_ids, images, len(turn.token_ids), 0.5
    assert turn.logprobs == pytest.approx(reference_logprobs(*arguments, banned), abs=TOLERANCE)
    free = reference_logprobs(*arguments)
    assert max(abs(a - b) for a, b in zip(turn.logprobs, free)) > 0.1


def test_a_cancelled_request_is_dropped_by_the_engine(engine, renderer, store):
    row, images = prompt(renderer, store, seed=30)
    banned = tuple(renderer.stop_token_ids)

    async def main():
        pool = EnginePool([engine])
        before = await pool.stats()
        long = [Sampling(max_tokens=400, seed=seed, banned_token_ids=banned) for seed in range(16)]
        calls = [asyncio.create_task(pool.generate(str(s.seed), row, images, s)) for s in long]
        while (await pool.stats())["num_unfinished_requests"] < 16:
            await asyncio.sleep(0.01)
        for call in calls[1:]:
            call.cancel()
        (kept, *cancelled) = await asyncio.gather(*calls, return_exceptions=True)
        after = await pool.stats()
        assert all(isinstance(call, asyncio.CancelledError) for call in cancelled)
        assert len(kept.token_ids) == 400
        assert after["num_unfinished_requests"] == 0
        assert after["num_requests"] - before["num_requests"] == 1

    asyncio.run(main())


def test_a_row_that_vllm_would_expand_otherwise_is_refused(engine, renderer, store):
    import ray

    row, images = prompt(renderer, store)
    wrong = [*row[: row.index(renderer.image_pad_id)], renderer.image_pad_id, *row[row.index(renderer.image_pad_id) :]]
    with pytest.raises(EngineError, match="another row, at token"):
        ray.get(engine.generate.remote(wrong, images, Sampling(max_tokens=4)))


def test_new_weights_arrive_under_way(engine, models, renderer, store):
    """Turns in flight go on with the new weights, from a context that those have read anew: the pictures too, which the
    prefix cache had for all of them."""
    import ray

    row, images = prompt(renderer, store, seed=20)
    banned = tuple(renderer.stop_token_ids)
    ray.get(engine.generate.remote(row, images, Sampling(max_tokens=1)))
    running = [
        engine.generate.remote(row, images, Sampling(max_tokens=256, seed=s, banned_token_ids=banned)) for s in range(16)
    ]
    time.sleep(0.5)
    ray.get(engine.sync_weights.remote({"path": models[1] + "/model.safetensors"}, 3))
    turns = ray.get(running)
    assert any(set(turn.weight_versions) == {0, 3} for turn in turns)
    for turn in turns:
        assert len(turn.token_ids) == len(turn.logprobs) == 256
        assert turn.weight_versions == sorted(turn.weight_versions)
    cut = next(turn for turn in turns if set(turn.weight_versions) == {0, 3})
    arguments = store, row + cut.token_ids, images, 256, 1.0, banned
    expected = [
        (old, new)[version == 3]
        for old, new, version in zip(*(reference_logprobs(model, *arguments) for model in models), cut.weight_versions)
    ]
    assert cut.logprobs == pytest.approx(expected, abs=TOLERANCE)
    row, images = prompt(renderer, store)  # a picture that the old vision tower had encoded
    turn = ray.get(engine.generate.remote(row, images, Sampling(max_tokens=24, seed=1)))
    assert set(turn.weight_versions) == {3}
    expected = reference_logprobs(models[1], store, row + turn.token_ids, images, len(turn.token_ids), 1.0)
    assert turn.logprobs == pytest.approx(expected, abs=TOLERANCE)


def test_workers_describe_their_parameters(engine):
    import ray

    (shapes,) = ray.get(engine.describe.remote())
    assert any(name.endswith("qkv_proj.weight") for name in shapes)
    assert any(name.startswith("visual.") for name in shapes)


def test_a_sync_that_fails_leaves_the_engine_paused(engine, renderer, store):
    """The last test of this engine: nothing is sampled from weights that may be half old."""
    import ray

    with pytest.raises(WeightSyncError, match="version 4"):
        ray.get(engine.sync_weights.remote({"path": "/nowhere.safetensors"}, 4))
    row, images = prompt(renderer, store)
    call = engine.generate.remote(row, images, Sampling(max_tokens=4))
    done, _ = ray.wait([call], timeout=2)
    assert not done
