"""Speed of the agent loop on a real engine: against bare vLLM, against a barrier per turn; what its caches save.

    python tools/bench_rollout.py --data data/quickstart/seed0 [--prompts 32] [--group-size 8] [--rounds 3] [--json FILE]

Episodes of the quickstart's tasks, model and zoom tool. Lengths, numbers of turns, boxes and delays are drawn once, from
long-tailed distributions: the tiny model's own would measure its habits. Everything is compared within the run, by turns.

loop      tokens/s of the agent loop (driver, pool, Ray, engine, tool, pictures) over tokens/s of bare AsyncLLM.generate on the
          very same rows, pictures, seeds and lengths. The bare side runs within the engine's process on requests that were
          prepared before, each turn sent when the one before it has ended. `all at once` sends every turn at the start, which
          no loop can: its turns do not depend on one another, so that the engine's batch stays full to the end.
barrier   the same loop with tools that take their time, against all episodes meeting before and after every generation.
prefix    tokens of later turns that the prefix cache had, over those that it could have had: whole blocks of the row before.
pictures  pictures that the vision tower encoded, and distinct pictures.

Caches are emptied before every run, so the first turns meet cold ones.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_agent import registry
from megatron_agent.data.dataset import DataConfig, read_tasks
from megatron_agent.data.images import ImageStore
from megatron_agent.envs.base import EnvSession
from megatron_agent.envs.visual_toolbox_v2 import VisualToolboxV2
from megatron_agent.rollout.agent_loop import AgentConfig, run_episode
from megatron_agent.rollout.collect import collect, trajectory_seed
from megatron_agent.rollout.engine import KV_BLOCK_TOKENS, Engine, RolloutConfig
from megatron_agent.rollout.generation import Generation, Sampling
from megatron_agent.rollout.pool import EnginePool
from megatron_agent.rollout.tool_calls import ToolRunner
from megatron_agent.types import ImageRef, RewardParts, Task, Trajectory

ROOT = Path(__file__).resolve().parents[1]
MAX_TURNS = 6
MAX_TURN_TOKENS = 128
MAX_MODEL_LEN = 1024
BOXES = ([0, 0, 28, 28], [28, 0, 56, 28], [0, 28, 28, 56], [28, 28, 56, 56])


@dataclass(frozen=True)
class Script:
    """What one episode does: tokens, box and seconds of the tool of every turn."""

    num_tokens: tuple[int, ...]
    boxes: tuple[list[int], ...]
    delays_s: tuple[float, ...]


def draw(options: argparse.Namespace, task_id: str, index: int) -> Script:
    """Turns: geometric, mean about 3. Tokens and delays: lognormal, clipped at MAX_TURN_TOKENS and 30 medians."""
    rng = random.Random(f"{options.seed}/{task_id}/{index}")
    num_turns = next((n for n in range(1, MAX_TURNS) if rng.random() < 0.3), MAX_TURNS)
    tokens = [min(MAX_TURN_TOKENS, max(4, round(32 * rng.lognormvariate(0, 0.75)))) for _ in range(num_turns)]
    delays = [options.tool_s * min(30.0, rng.lognormvariate(0, options.tool_sigma)) for _ in range(num_turns)]
    return Script(tuple(tokens), tuple(rng.choice(BOXES) for _ in range(num_turns)), tuple(delays))


class ScriptedZoom(VisualToolboxV2):
    """The quickstart's zoom, whatever the model says; `waits` makes it a tool that takes its time, in a thread."""

    def __init__(self, script: Script, config: VisualToolboxV2.Config, waits: bool) -> None:
        super().__init__(config=config)
        self.script, self.waits, self.turn = script, waits, 0
        self.runs_inline = not waits  # type: ignore[misc]

    def execute(self, action_string: str, **kwargs: Any) -> tuple[Any, float, bool, dict[str, Any]]:
        turn, self.turn = self.turn, self.turn + 1
        if self.turn == len(self.script.num_tokens):
            return None, 0.0, True, {}
        if self.waits:
            time.sleep(self.script.delays_s[turn])
        observation, call = self._call("image_zoom_in_tool", {"bbox_2d": self.script.boxes[turn]})
        return observation, 0.0, False, {"tool_call": call}


class BenchEngine(Engine):
    async def empty_caches(self) -> None:
        await self.llm.reset_prefix_cache()
        await self.llm.reset_mm_cache()
        await self.llm.reset_encoder_cache()

    async def encoded_pictures(self) -> int:
        return (await self.llm.collective_rpc("encoded_pictures"))[0]

    async def bare(self, episodes: list[list[tuple[list[int], list[ImageRef], Sampling]]], in_order: bool) -> float:
        """Seconds that vLLM takes for the turns of `episodes`, with nothing of ours between."""
        ready = [[(self._prompt(row, images), self._parameters(s)) for row, images, s in turns] for turns in episodes]
        ids = itertools.count()

        async def one(turns: list[tuple[Any, Any]]) -> None:
            for prompt, parameters in turns:
                async for _ in self.llm.generate(prompt, parameters, request_id=f"bare{next(ids)}"):
                    pass

        units = ready if in_order else [[turn] for turns in ready for turn in turns]
        began_s = time.perf_counter()
        await asyncio.gather(*(one(turns) for turns in units))
        return time.perf_counter() - began_s


class Barrier:
    """Who still plays meets here: a loop over turns, as the driver of a batch writes it."""

    def __init__(self, num_playing: int) -> None:
        self.num_playing, self.num_waiting, self.opened = num_playing, 0, asyncio.Event()

    async def meet(self) -> None:
        self.num_waiting += 1
        opened = self.opened
        self._open_if_all()
        await opened.wait()

    def leave(self) -> None:
        self.num_playing -= 1
        self._open_if_all()

    def _open_if_all(self) -> None:
        if self.num_waiting == self.num_playing:
            self.opened.set()
            self.num_waiting, self.opened = 0, asyncio.Event()


class Unjudged:
    async def score(self, trajectory: Trajectory, task: Task) -> RewardParts:
        return RewardParts({}, {})


class Bench:
    def __init__(self, options: argparse.Namespace, handle: Any, renderer: Any, store: ImageStore, tasks: list[Task]) -> None:
        self.options, self.handle, self.renderer, self.store, self.tasks = options, handle, renderer, store, tasks
        self.env = VisualToolboxV2.Config(max_pixels=7056, user_prompt="")
        self.banned = tuple(sorted({*renderer.stop_token_ids, *renderer.forbidden_ids}))  # lengths are the script's
        self.agent = AgentConfig(
            single_response_max_tokens=MAX_TURN_TOKENS,
            max_turns=MAX_TURNS,
            concurrent_workers=len(tasks) * options.group_size,
            tool_timeout_s=600.0,
        )

    async def play(self, waits: bool = False, with_barrier: bool = False) -> dict[str, Any]:
        """All episodes once -> seconds, turns as they were sent, and what the caches did."""
        await self.handle.empty_caches.remote()
        await self.handle.encoded_pictures.remote()
        pool, tools = EnginePool([self.handle]), ToolRunner(self.agent.concurrent_workers, self.agent.tool_timeout_s)
        barrier = Barrier(len(self.tasks) * self.options.group_size) if with_barrier else None
        episodes: list[list[tuple[list[int], list[ImageRef], Sampling]]] = []
        hits = {"cached": 0, "could": 0}

        async def run_one(task: Task, index: int) -> Trajectory:
            script = draw(self.options, task.task_id, index)
            sent: list[tuple[list[int], list[ImageRef], Sampling]] = []
            episodes.append(sent)
            previous_tokens = 0

            async def generate(row: list[int], images: list[ImageRef], sampling: Sampling) -> Generation:
                nonlocal previous_tokens
                sampling = replace(sampling, max_tokens=script.num_tokens[len(sent)], banned_token_ids=self.banned)
                sent.append((row, images, sampling))
                if barrier is not None:
                    await barrier.meet()
                turn = await pool.generate(f"{task.task_id}/{index}", row, images, sampling)
                if barrier is not None:
                    await barrier.meet()
                if previous_tokens:
                    hits["cached"] += turn.num_cached_tokens
                    hits["could"] += previous_tokens // KV_BLOCK_TOKENS * KV_BLOCK_TOKENS
                previous_tokens = len(row) + len(turn.token_ids) - 1  # nothing was computed behind the last token
                return replace(turn, stop_reason="stop")

            def session(task: Task) -> EnvSession:
                return EnvSession(ScriptedZoom(script, self.env, waits), self.store, self.store.limits)

            seed = trajectory_seed(self.options.seed, 0, task.task_id, index)
            trajectory = await run_episode(
                task, index, generate, self.renderer, session, self.agent, Sampling(seed=seed), MAX_MODEL_LEN, tools
            )
            if barrier is not None:
                barrier.leave()
            assert trajectory.num_response_tokens == sum(script.num_tokens), f"{trajectory.status} of {task.task_id}"
            return trajectory

        began_s = time.perf_counter()
        await collect(self.tasks, self.options.group_size, run_one, Unjudged(), max_in_flight=4096)
        seconds = time.perf_counter() - began_s
        pictures = {ref.key for turns in episodes for _, images, _ in turns for ref in images}
        encoded = await self.handle.encoded_pictures.remote()
        return {"seconds": seconds, "episodes": episodes, **hits, "pictures": len(pictures), "encoded": encoded}

    async def bare(self, episodes: list[Any], in_order: bool) -> float:
        await self.handle.empty_caches.remote()
        return await self.handle.bare.remote(episodes, in_order)


async def measure(bench: Bench, rounds: int, slow_rounds: int) -> dict[str, Any]:
    loop_s, ordered_s, at_once_s, free_s, barrier_s = [], [], [], [], []
    played = await bench.play()  # warms up
    num_tokens = sum(sampling.max_tokens for turns in played["episodes"] for _, _, sampling in turns)
    await bench.bare(played["episodes"], True)
    cached = could = encoded = pictures = 0
    for _ in range(rounds):
        played = await bench.play()
        loop_s.append(played["seconds"])
        ordered_s.append(await bench.bare(played["episodes"], True))
        at_once_s.append(await bench.bare(played["episodes"], False))
        cached, could = cached + played["cached"], could + played["could"]
        encoded, pictures = encoded + played["encoded"], pictures + played["pictures"]
    for _ in range(slow_rounds):
        free_s.append((await bench.play(waits=True))["seconds"])
        barrier_s.append((await bench.play(waits=True, with_barrier=True))["seconds"])
    median = statistics.median
    slow = {"free_s": free_s, "barrier_s": barrier_s, "barrier_over_free": median(barrier_s) / median(free_s)} if free_s else {}
    return slow | {
        "episodes": len(played["episodes"]),
        "turns": sum(map(len, played["episodes"])),
        "tokens": num_tokens,
        "loop_s": loop_s,
        "bare_in_order_s": ordered_s,
        "bare_at_once_s": at_once_s,
        "loop_tokens_per_s": num_tokens / median(loop_s),
        "loop_over_bare": median(ordered_s) / median(loop_s),
        "loop_over_all_at_once": median(at_once_s) / median(loop_s),
        "prefix_hits_of_possible": cached / could,
        "pictures_encoded": encoded / rounds,
        "pictures_distinct": pictures / rounds,
    }


def run(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    import ray

    model = options.data / "model"
    config = RolloutConfig(max_model_len=MAX_MODEL_LEN, max_num_seqs=options.max_num_seqs, num_cpu_threads=options.threads)
    data = DataConfig(min_pixels=3136, max_pixels=3136)
    store = ImageStore(work / "pictures", data.pixel_limits(), cache_pictures=4096)
    tasks, _ = read_tasks([str(options.data / "train.parquet")], data, store, "env_name")
    tasks = [task for task in tasks if task.env_name][: options.prompts]
    renderer = registry.resolve("models", "qwen2_5_vl")(str(model)).renderer(str(model))
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    try:
        remote = ray.remote(num_cpus=0, max_concurrency=4096)(BenchEngine)
        handle = remote.remote(str(model), config, store, MAX_TURNS)
        return asyncio.run(measure(Bench(options, handle, renderer, store, tasks), options.rounds, options.slow_rounds))
    finally:
        ray.shutdown()


def report(found: dict[str, Any]) -> str:
    def seconds(name: str) -> str:
        return f"{statistics.median(found[name]):7.2f} s   ({', '.join(f'{s:.2f}' for s in found[name])})"

    slow = (
        [
            f"slow tools           {seconds('free_s')}",
            f"  barrier per turn   {seconds('barrier_s')}",
            f"  loop / barrier     {found['barrier_over_free']:7.2f}",
        ]
        if "free_s" in found
        else []
    )
    return "\n".join(
        [
            f"{found['episodes']} episodes, {found['turns']} turns, {found['tokens']} sampled tokens",
            f"agent loop           {seconds('loop_s')}  {found['loop_tokens_per_s']:.0f} tokens/s",
            f"bare, turns in order {seconds('bare_in_order_s')}",
            f"bare, all at once    {seconds('bare_at_once_s')}",
            f"loop / bare          {found['loop_over_bare']:7.2f}     (all at once: {found['loop_over_all_at_once']:.2f})",
            *slow,
            f"prefix hits          {found['prefix_hits_of_possible']:7.1%} of the tokens of later turns that could hit",
            f"pictures encoded     {found['pictures_encoded']:7.0f} of {found['pictures_distinct']:.0f} distinct ones",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "quickstart" / "seed0", help="made by prepare_data.py")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slow-rounds", type=int, default=1, help="of the barrier part, which takes minutes; 0: none")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="rows that the engine works on at once")
    parser.add_argument("--threads", type=int, default=1, help="of the engine's model; the loop has the other cores")
    parser.add_argument("--tool-s", type=float, default=1.0, help="median seconds of a tool call in the barrier part")
    parser.add_argument("--tool-sigma", type=float, default=1.0, help="of their logarithm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as work:
        found = run(options, Path(work))
    print(report(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
