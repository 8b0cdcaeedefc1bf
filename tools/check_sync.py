"""Do synced engines say what engines say that loaded the same weights from disk? Real Megatron ranks, real vLLM.

    python tools/check_sync.py --hf DIR [--train one,tp2,pp2,tp2pp2,dp2] [--rollout tp1,tp2,2xtp1] [--transport gloo]
    python tools/check_sync.py --hf DIR --load 50 [--train one] [--rollout tp1]

(rollouts: also tp2data, with the whole vision tower on both ranks, and 3xtp1relay, engines that pass weights on.)

Some Adam steps make new weights, which are saved and exported as a Hugging Face folder. For every pair of layouts the trainer
first syncs the old weights, then loads the new ones and syncs those; after each sync greedy answers to prompts with and
without pictures are compared, token for token, with those of a vLLM that loaded that folder, and vLLM's own checksums of all
parameters with those of an engine of the same tensor-parallel size.

With --load there are so many syncs while requests keep the engines busy: every token must be stamped with the weights that made
it (the trainer's log-prob under them is the engine's), no sync may hang, no process may grow.

Exit status 1 where anything differs.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from _sync_load import under_load
from PIL import Image

from megatron_agent import cluster
from megatron_agent.checkpoints import EXPORT_FOLDER, Checkpoints
from megatron_agent.config import RunConfig
from megatron_agent.data.images import ImageStore, PixelLimits
from megatron_agent.models.base import ModelFamily
from megatron_agent.rollout.engine import RolloutConfig
from megatron_agent.rollout.generation import Sampling
from megatron_agent.rollout.pool import EnginePool
from megatron_agent.sync import WeightSync
from megatron_agent.training.actor import Actor, TrainingConfig
from megatron_agent.training.hf_export import read_family
from megatron_agent.training.loss import Supervised
from megatron_agent.types import TRANSPORTS, ImageRef, TrainSample

TRAINERS = {
    "one": {},
    "tp2": {"tensor_parallel": 2},
    "pp2": {"pipeline_parallel": 2},
    "tp2pp2": {"tensor_parallel": 2, "pipeline_parallel": 2},
    "dp2": {"data_parallel": 2},
    "tp4": {"tensor_parallel": 4},
}
ROLLOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tensor_parallel": 2},
    "2xtp1": {"num_engines": 2},
    "tp2data": {"tensor_parallel": 2, "mm_encoder_tp_mode": "data"},
    "3xtp1relay": {"num_engines": 3, "weight_relay": "always"},
}
NUM_TOKENS = 24
Prompt = tuple[list[int], list[ImageRef]]


def prompts_of(family: ModelFamily, store: ImageStore) -> list[Prompt]:
    rng, renderer = np.random.default_rng(0), family.renderer(str(family.path))
    rows: list[Prompt] = [(list(range(20, 50)), [])]
    for sizes in [[(2, 2)], [(3, 2), (2, 4)], [(4, 4)]] if getattr(family, "image_token_id", None) is not None else []:
        refs = [
            store.put_picture(Image.fromarray(rng.integers(0, 256, (28 * lines, 28 * columns, 3), dtype=np.uint8)))
            for columns, lines in sizes
        ]
        content = [{"type": "image"} for _ in refs] + [{"type": "text", "text": "what color is it ?"}]
        rows.append((renderer.prompt([{"role": "user", "content": content}], refs), refs))
    return rows


def samples_of(prompts: list[Prompt], seed: int) -> list[TrainSample]:
    rng, samples = np.random.default_rng(seed), []
    for index, (row, refs) in enumerate(prompts):
        tokens = [*row, *(int(t) for t in rng.integers(0, 200, 12))]
        own = [False] * len(row) + [True] * 12
        zeros = [0.0] * len(tokens)
        samples.append(TrainSample(tokens, own, zeros, [float(o) for o in own], refs, str(index), 0.0, [False] * len(own)))
    return samples


@dataclass
class Workshop:
    """What every comparison needs."""

    hf: Path
    scratch: Path
    store: ImageStore
    prompts: list[Prompt]
    transport: str = "auto"

    @property
    def config(self) -> RunConfig:
        config = RunConfig()
        config.model.path = str(self.hf)
        config.model.family = type(self.family).model_type  # type: ignore[attr-defined]
        return config

    def rollout(self, options: dict[str, Any]) -> RolloutConfig:
        return RolloutConfig(
            max_model_len=256, max_num_seqs=8, max_num_batched_tokens=512, weight_transport=self.transport, **options
        )

    @property
    def family(self) -> ModelFamily:
        return read_family(self.hf)

    async def trainer(self, name: str, rollout: dict[str, Any]) -> tuple[Actor, RunConfig]:
        config = self.config
        config.training = TrainingConfig(**TRAINERS[name], max_tokens_per_microbatch=512)
        config.training.layout = self.family.balanced(config.training.layout)
        config.rollout = self.rollout(rollout)
        actor = Actor(cluster.start_workers(config, self.store), config.training)
        await actor.set_up(config.model.family, str(self.hf), 0, config.vision)
        await actor.reset_optimizer(1e-3, 1.0)
        return actor, config

    async def engines(self, rollout: dict[str, Any], path: Path) -> list[Any]:
        config = self.config
        config.model.path, config.rollout = str(path), self.rollout(rollout)
        return cluster.start_engines(config, self.store)

    async def answers(self, engine: Any) -> list[list[int]]:
        sampling = Sampling(temperature=0.0, max_tokens=NUM_TOKENS)
        turns = await asyncio.gather(*(engine.generate.remote(row, refs, sampling) for row, refs in self.prompts))
        return [turn.token_ids for turn in turns]

    def samples(self, seed: int = 1) -> list[TrainSample]:
        return samples_of(self.prompts, seed)

    async def new_weights(self) -> tuple[Path, Path]:
        """-> a training checkpoint after some steps, and the same weights as a Hugging Face folder."""
        config = self.config
        config.output_dir, config.checkpoint.export_hf = str(self.scratch), True
        actor, _ = await self.trainer("one", {})
        for _ in range(4):
            await actor.update(self.samples(), Supervised(), 1e-2)
        saves = Checkpoints(config)
        await saves.save(actor, {"step": 4}, wait=True)
        stop(actor.workers)
        return saves.root / "step_00000004", saves.root / "step_00000004" / EXPORT_FOLDER


def stop(handles: list[Any]) -> None:
    import ray

    for handle in handles:
        ray.kill(handle)


async def compare(shop: Workshop, trainers: list[str], rollouts: list[str]) -> int:
    """-> number of differences."""
    began_s, num_wrong = time.monotonic(), 0
    checkpoint, exported = await shop.new_weights()
    print(f"new weights in {exported}; {time.monotonic() - began_s:.0f} s", flush=True)
    for rollout in rollouts:
        layout = ROLLOUTS[rollout]
        (engine,) = await shop.engines({**layout, "num_engines": 1}, exported)
        loaded_new = (await shop.answers(engine), await engine.checksums.remote())
        stop([engine])
        engines = await shop.engines(layout, shop.hf)  # and before the first sync they say what the old weights say
        expected = [(await shop.answers(engines[0]), await engines[0].checksums.remote()), loaded_new]
        assert expected[0] != expected[1], "the new weights are the old ones: the comparison would say nothing"
        version = 0
        for name in trainers:
            actor, config = await shop.trainer(name, layout)
            sync = WeightSync(config, shop.family, actor, EnginePool(engines))
            for round_, which in enumerate(("old", "new")):
                if which == "new":
                    await actor.load(checkpoint)
                version += 1
                await sync.push(version)
                answers, sums = expected[round_]
                for index, engine in enumerate(engines):
                    same_answers = await shop.answers(engine) == answers
                    same_sums = await engine.checksums.remote() == sums
                    num_wrong += not (same_answers and same_sums)
                    said = f"answers {'equal' if same_answers else 'DIFFER'}, checksums {'equal' if same_sums else 'DIFFER'}"
                    print(f"{name:8} -> {rollout:7} engine {index}, {which} weights: {said}", flush=True)
            stop(actor.workers)
        stop(engines)
    print(f"{num_wrong} differences; {time.monotonic() - began_s:.0f} s")
    return num_wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True)
    parser.add_argument("--train", default="one,tp2,pp2,tp2pp2,dp2")
    parser.add_argument("--rollout", default="tp1,tp2,2xtp1")
    parser.add_argument("--load", type=int, metavar="ROUNDS", help="so many syncs with generation in flight, instead")
    parser.add_argument("--transport", choices=TRANSPORTS, default="auto")
    options = parser.parse_args()
    trainers, rollouts = options.train.split(","), options.rollout.split(",")
    for given, known in ((trainers, TRAINERS), (rollouts, ROLLOUTS)):
        if unknown := set(given) - set(known):
            parser.error(f"unknown layouts {sorted(unknown)}; known: {', '.join(known)}")
    scratch = Path(tempfile.mkdtemp(prefix="check_sync_"))
    store = ImageStore(scratch / "pictures", PixelLimits(784, 1 << 20))
    family = read_family(options.hf)
    cluster.start_ray()
    try:
        shop = Workshop(options.hf.absolute(), scratch, store, prompts_of(family, store), options.transport)
        if options.load:
            wrong = asyncio.run(under_load(shop, trainers[0], ROLLOUTS[rollouts[0]], options.load))
            print("\n".join([*wrong, f"{len(wrong)} things wrong"]))
            return int(bool(wrong))
        return int(asyncio.run(compare(shop, trainers, rollouts)) > 0)
    finally:
        cluster.stop_ray()
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
