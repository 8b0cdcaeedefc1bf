"""Engines are killed (kill -9) in the middle of turns and of weight syncs: is anything lost, doubled, stale or stuck?

    python tools/kill_engines.py --hf DIR [--rounds 20] [--engines 2]

Each round updates the trainer, syncs, and lets multi-turn trajectories run while one engine, drawn at random, is killed after a
random delay: every other round during turns, every other during the next sync. Checked every round: every trajectory comes
back once, with all turns; every token carries the version that its engine had (never an older one than when its turn began);
the engine comes back within the limit and its parameters, by vLLM's checksums, are those of an engine that was not killed.
Exit status 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from megatron_agent import cluster
from megatron_agent.config import RunConfig
from megatron_agent.data.images import ImageStore, PixelLimits
from megatron_agent.rollout.engine import RolloutConfig
from megatron_agent.rollout.generation import Sampling
from megatron_agent.rollout.pool import EnginePool
from megatron_agent.sync import WeightSync
from megatron_agent.training.actor import Actor, TrainingConfig
from megatron_agent.training.hf_export import read_family
from megatron_agent.training.loss import Supervised
from megatron_agent.types import TrainSample

NUM_TRAJECTORIES, NUM_TURNS, TURN_TOKENS = 8, 3, 48
BACK_WITHIN_S = 120.0


class Killing:
    """A trainer of one rank, a pool of engines, and what has been found wrong."""

    def __init__(self, hf: Path, scratch: Path, num_engines: int, relay: str) -> None:
        config = self.config = RunConfig()
        config.model.path, config.model.family = str(hf), type(read_family(hf)).model_type  # type: ignore[attr-defined]
        config.rollout = RolloutConfig(
            num_engines=num_engines,
            max_model_len=256,
            max_num_seqs=16,
            max_num_batched_tokens=512,
            weight_relay=relay,
            max_restarts=1000,
        )
        config.training = TrainingConfig(max_tokens_per_microbatch=512)
        family = read_family(hf)
        config.training.layout = family.balanced(config.training.layout)
        self.store = ImageStore(scratch / "pictures", PixelLimits(784, 1 << 20))
        self.actor = Actor(cluster.start_workers(config, self.store), config.training)
        self.pool = EnginePool(
            cluster.start_engines(config, self.store), lambda i: cluster.start_engine(config, self.store, i), 1000
        )
        self.sync = WeightSync(config, family, self.actor, self.pool)
        self.wrong: list[str] = []
        self.rng = random.Random(0)

    async def start(self) -> None:
        config = self.config
        await asyncio.gather(self.actor.set_up(config.model.family, config.model.path, 0, config.vision), self.pool.started())
        await self.actor.reset_optimizer(1e-3, 1.0)
        async with self.sync.lock:
            await self.sync.push(1)

    async def new_weights(self, beside: Awaitable[int] | None = None) -> int:
        """An update and its sync, with `beside` at the same time as the sync."""
        row = [self.rng.randrange(200) for _ in range(24)]
        own = [False] * 8 + [True] * 16
        sample = TrainSample(row, own, [0.0] * 24, [float(o) for o in own], [], "0", 0.0, [False] * 24)
        async with self.sync.lock:
            await self.actor.update([sample], Supervised(), 1e-3)
            index, _ = await asyncio.gather(beside or self.nobody(), self.sync.push(self.sync.version + 1))
        return index

    async def nobody(self) -> int:
        return -1

    async def trajectory(self, name: str) -> int:
        """-> turns finished, each continuing the row of the one before."""
        row = [20 + self.rng.randrange(50) for _ in range(12)]
        for turn in range(NUM_TURNS):
            began = self.sync.version
            sampling = Sampling(max_tokens=TURN_TOKENS, seed=turn)
            generation = await self.pool.generate(name, row, [], sampling)
            versions = generation.weight_versions
            if not generation.token_ids or versions != sorted(versions) or versions[0] < began:
                self.wrong.append(f"{name} turn {turn} began under version {began}, its tokens carry {versions}")
            row = row + generation.token_ids
        return NUM_TURNS

    async def kill_one(self, delay_s: float) -> int:
        index = self.rng.choice(sorted(self.pool.alive))
        pid = await self.pool._handles[index].pid.remote()
        await asyncio.sleep(delay_s)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return index

    async def round(self, number: int) -> str:
        in_sync = number % 2 == 1
        running = [asyncio.create_task(self.trajectory(f"{number}/{i}")) for i in range(NUM_TRAJECTORIES)]
        await asyncio.sleep(0.05)
        began_s = time.monotonic()
        if in_sync:
            index = await self.new_weights(self.kill_one(self.rng.uniform(0, 0.06)))
        else:
            await self.new_weights()
            index = await self.kill_one(self.rng.uniform(0, 0.3))
        turns = await asyncio.wait_for(asyncio.gather(*running), BACK_WITHIN_S)
        if sum(turns) != NUM_TRAJECTORIES * NUM_TURNS:
            self.wrong.append(f"round {number}: turns {turns}")
        while self.pool.num_restarts <= number:
            await asyncio.sleep(0.1)
            if time.monotonic() - began_s > BACK_WITHIN_S:
                self.wrong.append(f"round {number}: engine {index} did not come back")
                break
        sums = [await handle.checksums.remote() for handle in self.pool.handles]
        if any(s != sums[0] for s in sums):
            self.wrong.append(f"round {number}: engines hold different weights")
        where = "during a sync" if in_sync else "during turns"
        return f"engine {index} killed {where}, all back after {time.monotonic() - began_s:.1f} s"


async def rounds(hf: Path, scratch: Path, num_rounds: int, num_engines: int = 2, relay: str = "always") -> list[str]:
    """-> what was wrong."""
    killing = Killing(hf, scratch, num_engines, relay)
    await killing.start()
    for number in range(num_rounds):
        said = await killing.round(number)
        print(f"round {number}: {said}; {len(killing.wrong)} wrong so far", flush=True)
    return killing.wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--relay", choices=("always", "never"), default="always", help="engines pass weights on to each other")
    options = parser.parse_args()
    if options.engines < 2 or options.rounds < 1:
        parser.error("--engines must be 2 or more (one is killed, the others serve), --rounds 1 or more")
    scratch = Path(tempfile.mkdtemp(prefix="kill_engines_"))
    cluster.start_ray()
    try:
        wrong = asyncio.run(rounds(options.hf.absolute(), scratch, options.rounds, options.engines, options.relay))
    finally:
        cluster.stop_ray()
        shutil.rmtree(scratch, ignore_errors=True)
    print("\n".join([*wrong, f"{options.rounds} rounds, {len(wrong)} wrong"]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
