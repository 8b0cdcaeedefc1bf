"""Weight syncs while requests keep the engine busy: what tools/check_sync.py --load does.

After every round the trainer's weights are saved. In the end each version is loaded again, and the trainer says what it
thinks of every token stamped with that version, in the row in which the engine sampled it: a token of other weights, or of
a cache that other weights filled, has another log-prob.
"""

from __future__ import annotations

import asyncio
import os
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psutil

from megatron_agent.checkpoints import Checkpoints
from megatron_agent.rollout.generation import Generation, Sampling
from megatron_agent.rollout.pool import EnginePool
from megatron_agent.sync import WeightSync
from megatron_agent.training.checkpoint import step_folder
from megatron_agent.training.loss import Supervised
from megatron_agent.types import ImageRef, TrainSample
from megatron_agent.weights.meeting import SHARED_MEMORY

if TYPE_CHECKING:
    from check_sync import Workshop

LR = 1e-2
NUM_CLIENTS, TURN_TOKENS, TURNS_PER_ROUND = 12, (8, 24, 72), 24
SYNC_LIMIT_S = 60.0
GAP_LIMIT, FOREIGN_GAP = 1e-4, 1e-2  # of log-probs: largest under the stamped weights, least mean under the version before
WARM_ROUNDS = 20  # caches fill for a while: fewer say nothing about growth
GROWTH_LIMIT_BYTES, FILES_LIMIT = 24 << 20, 4  # of a process, from the second quarter of the rounds to the last


@dataclass(frozen=True)
class Turn:
    """What was asked, what came, and which versions the engine may have had: from when the request was made to its answer."""

    row: list[int]
    images: list[ImageRef]
    generation: Generation
    first_version: int
    last_version: int

    def stamped(self, version: int) -> TrainSample | None:
        """The row, with the tokens of that version as actions; None without any."""
        before, after, made = len(self.row), len(self.generation.token_ids), self.generation
        own = [False] * before + [stamp == version for stamp in made.weight_versions]
        logprobs = [0.0] * before + made.logprobs
        tokens = self.row + made.token_ids
        if not any(own):
            return None
        return TrainSample(
            tokens, own, [p if o else 0.0 for p, o in zip(logprobs, own)], [float(o) for o in own], self.images,
            has_image_before_T=[False] * (before + after),
        )  # fmt: skip


@dataclass
class Load:
    """Clients that ask again as soon as they are answered."""

    pool: EnginePool
    prompts: list[tuple[list[int], list[ImageRef]]]
    begun: int = 1  # the version of the newest round
    served: int = 1  # of the newest that has returned
    turns: list[Turn] = field(default_factory=list)
    clients: list[asyncio.Task[None]] = field(default_factory=list)
    is_over: bool = False

    async def client(self, index: int) -> None:
        count = 0
        while not self.is_over:
            row, images = self.prompts[(index + count) % len(self.prompts)]
            count += 1
            first = self.served
            sampling = Sampling(max_tokens=TURN_TOKENS[(index + count) % 3], seed=1000 * index + count)
            generation = await self.pool.generate(f"client {index}", row, images, sampling)
            self.turns.append(Turn(row, images, generation, first, self.begun))

    async def wait_for(self, num_turns: int) -> None:
        """Until so many turns have been asked for and answered with the newest weights. Raises what a client met."""
        while sum(turn.first_version == self.begun for turn in self.turns) < num_turns:
            for client in self.clients:
                if client.done():
                    client.result()
            await asyncio.sleep(0.02)


def processes() -> dict[str, psutil.Process]:
    """Trainer ranks and engines among the processes that this one started."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        words = process.cmdline()
        if words[:1] and words[0].startswith(("ray::Worker", "ray::Engine", "VLLM::")):
            found[f"{words[0].partition('.')[0]} {process.pid}"] = process
        elif any("spawn_main" in word for word in words):  # vLLM's cannot always set their title
            found[f"spawned {process.pid}"] = process
    assert any(not name.startswith("ray::") for name in found), "vLLM's own processes were not found"
    return found


def growth(history: dict[str, list[int]]) -> dict[str, int]:
    """By how much the median of the last quarter is above that of the second."""
    found = {}
    for name, values in history.items():
        quarter = max(1, len(values) // 4)
        found[name] = int(statistics.median(values[-quarter:]) - statistics.median(values[quarter : 2 * quarter]))
    return found


async def under_load(shop: Workshop, layout: str, rollout: dict[str, Any], num_rounds: int) -> list[str]:
    """-> what is wrong."""
    actor, config = await shop.trainer(layout, rollout)
    config.output_dir, config.checkpoint.keep = str(shop.scratch), num_rounds + 1
    saves = Checkpoints(config)
    pool = EnginePool(await shop.engines(rollout, shop.hf))
    sync = WeightSync(config, shop.family, actor, pool)
    await actor.reset_optimizer(LR, 1.0)
    load, seconds = Load(pool, shop.prompts), []
    memory: dict[str, list[int]] = defaultdict(list)
    files: dict[str, list[int]] = defaultdict(list)
    await sync.push(1)
    load.clients = [asyncio.create_task(load.client(index)) for index in range(NUM_CLIENTS)]
    for version in range(1, num_rounds + 1):
        if version > 1:
            await actor.update(shop.samples(seed=version), Supervised(), LR)
            load.begun = version
            began_s = asyncio.get_running_loop().time()
            await asyncio.wait_for(sync.push(version), SYNC_LIMIT_S)
            seconds.append(asyncio.get_running_loop().time() - began_s)
            load.served = version
        await saves.save(actor, {"step": version}, wait=True)
        await asyncio.wait_for(load.wait_for(TURNS_PER_ROUND), SYNC_LIMIT_S)
        for name, process in processes().items():
            memory[name].append(process.memory_info().rss)
            files[name].append(process.num_fds())
    load.is_over = True
    await asyncio.wait_for(asyncio.gather(*load.clients), SYNC_LIMIT_S)
    left = sorted(path.name for path in SHARED_MEMORY.glob(f"megatron_agent_{os.environ['MEGATRON_AGENT_RUN']}_*"))
    wrong = [f"left in shared memory: {left[:3]}"] if left else []
    wrong += wrong_stamps(load.turns)
    image_id = getattr(shop.family, "image_token_id", None)  # a row in which the model wrote it has no positions
    scored = [turn for turn in load.turns if image_id not in turn.generation.token_ids]
    wrong += await wrong_makers(actor, saves.root, scored, num_rounds)
    num_tokens = sum(len(turn.generation.token_ids) for turn in load.turns)
    print(f"{num_rounds} versions, {len(load.turns)} turns, {num_tokens} tokens; a sync under load took "
          f"{statistics.median(seconds):.2f} s (longest {max(seconds):.2f})")  # fmt: skip
    for name, grew in growth(memory).items():
        more_files = growth(files)[name]
        series = [memory[name][i * (num_rounds - 1) // 10] >> 20 for i in range(11)]
        print(f"{name}: grew by {grew / 2**20:.1f} MiB, open files by {more_files}; MiB after every tenth: {series}")
        if num_rounds >= WARM_ROUNDS and (grew > GROWTH_LIMIT_BYTES or more_files > FILES_LIMIT):
            wrong.append(f"{name} grew by {grew} bytes and {more_files} open files")
    return wrong


def wrong_stamps(turns: list[Turn]) -> list[str]:
    wrong, num_mixed = [], 0
    for turn in turns:
        stamps = turn.generation.weight_versions
        num_mixed += len(set(stamps)) > 1
        if stamps != sorted(stamps) or stamps[0] < turn.first_version or stamps[-1] > turn.last_version:
            wrong.append(f"stamps {stamps} of a turn between versions {turn.first_version} and {turn.last_version}")
    print(f"{num_mixed} turns were under way during a sync")
    return wrong[:5] if num_mixed else ["no turn was under way during a sync: this was no load"]


async def wrong_makers(actor: Any, checkpoints: Any, turns: list[Turn], num_versions: int) -> list[str]:
    """Every token's log-prob under the weights that it is stamped with; and under the ones before, which must not fit."""
    wrong, worst, least_foreign = [], 0.0, float("inf")
    for version in range(1, num_versions + 1):
        samples = {v: [s for t in turns if (s := t.stamped(v)) is not None] for v in (version, version + 1)}
        await actor.load(step_folder(checkpoints, version))
        found = await actor.update(samples[version], Supervised(), lr=0.0)
        worst = max(worst, found["logprob_gap_max"])
        if found["logprob_gap_max"] > GAP_LIMIT:
            wrong.append(f"a token stamped {version} has a log-prob {found['logprob_gap_max']:.1e} off that of these weights")
        if samples[version + 1]:
            await actor.load(step_folder(checkpoints, version))
            foreign = await actor.update(samples[version + 1], Supervised(), lr=0.0)
            least_foreign = min(least_foreign, foreign["logprob_gap_mean"])
    print(f"log-probs: at most {worst:.1e} off under the stamped version; {least_foreign:.1e} and more under the one before")
    if least_foreign < FOREIGN_GAP:
        wrong.append("two versions are too much alike: a wrong stamp would not show")
    return wrong
