"""What overlapping rollouts and training gains: the two real loops on devices that sleep.

    python tools/bench_async.py --data data/quickstart/seed0 [--steps 16] [--staleness 1,2,4] [--turn-s 0.35] [--json FILE]

Loops, queues, episodes, scoring and records are the program's own (train.steps_in_turn, train_async.steps_ahead); what sleeps
is the accelerators' work. The engines have SLOTS places, and a turn holds one for as long as its tokens take; lengths are
drawn once, all alike or long-tailed (log-normal, sigma 1). An update sleeps, and a sync stops the engines for SYNC_S. The
synchronous loop is run first with an update that costs nothing: its step is what rollouts cost; an update then costs the
same (1:1), three times as much (1:3) or a third (3:1).

speed        time of a synchronous step over that of an overlapped one
slower side  share of the run in which the side that is the bottleneck worked: updates, or the engines' places
lag          mean and largest number of weight versions that a trained token was behind
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_agent import registry
from megatron_agent.config import RunConfig, load
from megatron_agent.data.dataset import read_tasks, training_stream
from megatron_agent.data.images import ImageStore
from megatron_agent.observe.alarms import Alarms
from megatron_agent.rollout.generation import Generation
from megatron_agent.rollout.rollouts import Rollouts
from megatron_agent.run_state import Progress
from megatron_agent.stages import Data, Stages, image_store
from megatron_agent.train import Loop, steps_in_turn
from megatron_agent.train_async import steps_ahead
from megatron_agent.types import RewardParts

ROOT = Path(__file__).resolve().parents[1]
SLOTS, PROMPTS, GROUP_SIZE = 64, 16, 8
MEAN_TURN_S, SIGMA = 0.35, 1.0
SYNC_S = 0.02
RATIOS = {"1:1": 1.0, "1:3": 3.0, "3:1": 1 / 3}  # rollouts : update


class SleepingEngines:
    """The pool, as rollouts see it."""

    def __init__(self, answer: list[int], long_tailed: bool, turn_s: float) -> None:
        self.answer, self.turn_s, self.sigma = answer, turn_s, SIGMA if long_tailed else 0.0
        self.places, self.serving, self.version, self.busy_s = asyncio.Semaphore(SLOTS), asyncio.Event(), 1, 0.0
        self.serving.set()

    async def generate(self, trajectory_id: str, row: Any, images: Any, sampling: Any) -> Generation:
        length = random.Random(trajectory_id).lognormvariate(-(self.sigma**2) / 2, self.sigma)  # of mean 1
        first = self.version
        async with self.places:
            await self.serving.wait()
            began_s = time.perf_counter()
            await asyncio.sleep(self.turn_s * length)
            self.busy_s += time.perf_counter() - began_s
        count = len(self.answer)
        versions = [first] * (count // 2) + [self.version] * (count - count // 2)
        return Generation(list(self.answer), [-0.5] * count, versions, "stop")


class Half:
    """A reward."""

    async def score(self, trajectory: Any, task: Any) -> RewardParts:
        return RewardParts({"accuracy": float(trajectory.sample_index % 2)}, {"accuracy": 1.0})


class SleepingLearner:
    def __init__(self, update_s: float) -> None:
        self.update_s, self.busy_s = update_s, 0.0

    async def update(self, *_: Any) -> dict[str, float]:
        await asyncio.sleep(self.update_s)
        self.busy_s += self.update_s
        return {"loss": 0.0}


class Nothing:
    """Boards, a stop signal and checkpoints that ask for nothing."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def status(self, text: str) -> None: ...

    note = status

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.rows.append(metrics)

    async def or_done(self, work: Any, what: str, boards: Any) -> Any:
        return await work

    async def check(self, learner: Any) -> None: ...


class SleepingStages(Stages):
    def __post_init__(self) -> None:
        self.checkpoints, self.lock = cast(Any, Nothing()), asyncio.Lock()
        self.alarms = Alarms(self.config.observe.alarms, self.config.training.logprob_gap_alarm)
        self.algorithm = registry.resolve("algorithms", self.config.algorithm_name)(self.config.algorithm)

    async def sync_weights(self) -> None:
        engines = cast(SleepingEngines, self.rollouts.pool)
        engines.serving.clear()
        await asyncio.sleep(SYNC_S)
        engines.version = self.weights.version = self.weights.version + 1
        engines.serving.set()


class Versions:
    def __init__(self) -> None:
        self.version, self.lock = 1, asyncio.Lock()


async def play(loop: Loop, config: RunConfig, tasks: list[Any], renderer: Any, store: ImageStore,
               long_tailed: bool, update_s: float, turn_s: float = MEAN_TURN_S) -> dict[str, float]:  # fmt: skip
    """-> seconds of a step, share of the time that each side worked, lags; without the first two steps, and of the overlapped
    loop without the `max_staleness` more in which its queue fills and those in which it runs dry."""
    engines = SleepingEngines([*renderer.encode("red"), renderer.end_of_turn_id], long_tailed, turn_s)
    learner, boards = SleepingLearner(update_s), Nothing()
    rollouts = Rollouts(cast(Any, engines), renderer, store, cast(Any, Half()), config.agent, config.rollout, {}, 0)
    stream = training_stream(tasks, config.data, 0, PROMPTS)
    stages = SleepingStages(config, Data(stream), cast(Any, learner), rollouts, cast(Any, Versions()))
    marks: list[tuple[float, float, float]] = []
    log = boards.log

    def marked(step: int, metrics: dict[str, float]) -> None:
        log(step, metrics)
        marks.append((time.perf_counter(), learner.busy_s, engines.busy_s))

    boards.log = marked  # type: ignore[method-assign]
    await loop(stages, Progress(), cast(Any, boards), cast(Any, boards))
    await rollouts.close()
    ends = config.training.max_staleness if loop is steps_ahead else 0  # steps in which the queue fills, and runs dry
    first, last = 1 + ends, len(marks) - 1 - ends
    (from_s, updates, turns), (to_s, updates_after, turns_after) = marks[first], marks[last]
    whole_s = to_s - from_s
    rows = boards.rows[first + 1 : last + 1]
    return {
        "step_s": whole_s / (last - first),
        "trainer": (updates_after - updates) / whole_s,
        "engines": (turns_after - turns) / whole_s / SLOTS,
        "lag_mean": math.fsum(row.get("staleness_mean", 0.0) for row in rows) / len(rows),
        "lag_max": max(row.get("staleness_max", 0.0) for row in rows),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder that examples/quickstart/prepare_data.py made")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--staleness", default="1,2,4")
    parser.add_argument("--turn-s", type=float, default=MEAN_TURN_S, help="mean seconds of a turn")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bounds = [int(text) for text in options.staleness.split(",")]
    fewest = 6 + 2 * max(bounds)
    if options.steps < fewest:
        parser.error(f"--steps {options.steps}: give {fewest} or more, so that there is a middle to measure")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        config = load(ROOT / "examples" / "quickstart" / "run.yaml", [
            f"model.path={options.data}/model", f"output_dir={folder}", f"training.num_steps={options.steps}",
            f"training.prompts_per_step={PROMPTS}", f"rollout.group_size={GROUP_SIZE}", "agent.activate_agent=false",
            "checkpoint.every_steps=0", "evaluation.every_steps=0", "observe.transcripts_per_step=0",
            "observe.probe_every_steps=0", f"rollout.max_num_seqs={8 * SLOTS}",
        ])  # fmt: skip
        store = image_store(config)
        config.folder.mkdir(parents=True)
        tasks, _ = read_tasks([str(options.data / "train.parquet")], config.data, store, "env_name")
        renderer = registry.resolve("models", config.model.family)(config.model.path).renderer(config.model.path)

        def run(loop: Loop, long_tailed: bool, update_s: float, staleness: int = 0) -> dict[str, float]:
            config.training.max_staleness = staleness
            return asyncio.run(play(loop, config, tasks, renderer, store, long_tailed, update_s, options.turn_s))

        for long_tailed in (False, True):
            rollout_s = run(steps_in_turn, long_tailed, 0.0)["step_s"]
            lengths = "long-tailed" if long_tailed else "alike"
            for ratio, times in RATIOS.items():
                turns = run(steps_in_turn, long_tailed, rollout_s * times)
                for staleness in bounds:
                    ahead = run(steps_ahead, long_tailed, rollout_s * times, staleness)
                    row = {"lengths": lengths, "ratio": ratio, "staleness": staleness, "turns": turns, "ahead": ahead,
                           "speed": turns["step_s"] / ahead["step_s"]}  # fmt: skip
                    slower = max(("trainer", "engines"), key=lambda side: ahead[side])
                    print(f"lengths {lengths:11} rollouts:update {ratio} staleness {staleness}: "
                          f"{turns['step_s']:.2f} -> {ahead['step_s']:.2f} s a step, speed {row['speed']:.2f}x, "
                          f"slower side ({slower}) {ahead[slower]:.1%} (in turns {turns[slower]:.1%}), "
                          f"lag {ahead['lag_mean']:.2f} / {ahead['lag_max']:.0f}", flush=True)  # fmt: skip
                    results.append(row)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
