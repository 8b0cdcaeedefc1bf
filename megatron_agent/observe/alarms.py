"""What goes wrong in RL without a crash, noticed from the numbers of the steps: said loudly, or the run is stopped.

Collapse of tool use and judge hacking are what DeepEyes' users report (FIELD: its threads #78, #100; judge rewards that rise
while nothing is answered better), the log-prob gap what a wrong weight sync or vision tower looks like.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_agent.errors import ConfigError

ACTIONS = ("warn", "stop", "ignore")
DEFAULT_ACTIONS = {
    "not_finite": "stop",
    "logprob_gap": "warn",
    "reward_collapse": "warn",
    "tool_collapse": "warn",
    "entropy_collapse": "warn",
    "repetition": "warn",
    "judge_hacking": "warn",
    "degenerate_groups": "warn",
}
WATCHED = ("loss", "grad_norm", "reward")  # must be finite
RECENT_STEPS = 3  # a reward is as good as the mean of so many steps
REMEMBERED = ("tool_rate", "entropy", "reward", "accuracy")


@dataclass
class AlarmsConfig:
    """`actions`: what an alarm does, {tool_collapse: stop, repetition: ignore}: warn, stop (checkpoint, then end) or ignore.

    Means are over the last `window` steps; an alarm about a change needs a full window. One that stays is repeated every
    `repeat_steps` steps.
    """

    actions: dict[str, str] = field(default_factory=dict)
    window: int = 10
    repeat_steps: int = 10
    reward_lost_fraction: float = 0.5  # of what the reward had gained, and
    reward_lost_stds: float = 4.0  # so many standard deviations of a step's reward, below its best mean
    tool_rate_fraction: float = 0.3  # of its mean, below which tool use has collapsed
    entropy_fraction: float = 0.1  # of the entropy of the first window
    repeated_fraction: float = 0.2  # of the trajectories that end in a loop
    degenerate_fraction: float = 1.0  # of the groups whose rewards are all alike
    hacking_reward_stds: float = 4.0  # a jump of the reward by so many standard deviations, with accuracy not above its mean

    def __post_init__(self) -> None:
        for name, action in self.actions.items():
            if name not in DEFAULT_ACTIONS:
                raise ConfigError(f"observe.alarms.actions.{name}: no such alarm; there are {', '.join(DEFAULT_ACTIONS)}")
            if action not in ACTIONS:
                raise ConfigError(f"observe.alarms.actions.{name}={action!r}; allowed: {', '.join(ACTIONS)}")
        for name in ("window", "repeat_steps"):
            if getattr(self, name) < RECENT_STEPS:
                raise ConfigError(f"observe.alarms.{name}={getattr(self, name)} must be {RECENT_STEPS} steps or more")
        for name in (
            "reward_lost_fraction",
            "tool_rate_fraction",
            "entropy_fraction",
            "repeated_fraction",
            "degenerate_fraction",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"observe.alarms.{name}={getattr(self, name)} must lie between 0 and 1")
        for name in ("hacking_reward_stds", "reward_lost_stds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"observe.alarms.{name}={getattr(self, name)} must be above 0")


@dataclass(frozen=True)
class Alarm:
    name: str
    action: str
    text: str


class Alarms:
    """consumes: the metrics of every step. produces: alarms, when they begin and now and then while they last."""

    def __init__(self, config: AlarmsConfig, logprob_gap: float) -> None:
        self.config, self.logprob_gap = config, logprob_gap
        self._history: dict[str, list[float]] = {name: [] for name in REMEMBERED}
        self._first: dict[str, list[float]] = {"entropy": [], "reward": []}  # the first window of a run
        self._best_reward: float | None = None  # the highest mean of RECENT_STEPS
        self._said: dict[str, int] = {}  # step at which an alarm that lasts was last reported

    def check(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        found = {
            "not_finite": self._not_finite(metrics),
            "logprob_gap": self._gap(metrics),
            "reward_collapse": self._reward_collapse(metrics),
            "tool_collapse": self._tool_collapse(metrics),
            "entropy_collapse": self._entropy_collapse(metrics),
            "repetition": self._repetition(metrics),
            "judge_hacking": self._judge_hacking(metrics),
            "degenerate_groups": self._degenerate(metrics),
        }
        self._remember(metrics)
        alarms = []
        for name, text in found.items():
            action = (DEFAULT_ACTIONS | self.config.actions)[name]
            if not text:
                self._said.pop(name, None)
            elif action != "ignore" and (name not in self._said or step - self._said[name] >= self.config.repeat_steps):
                self._said[name] = step
                alarms.append(Alarm(name, action, text))
        return alarms

    def state(self) -> dict[str, Any]:
        """As JSON, for a restart."""
        return {"history": self._history, "first": self._first, "best_reward": self._best_reward, "said": self._said}

    def load_state(self, state: Mapping[str, Any]) -> None:
        if state:
            self._history = {name: list(state["history"].get(name, [])) for name in REMEMBERED}
            self._first = {name: list(values) for name, values in state.get("first", self._first).items()}
            self._best_reward, self._said = state.get("best_reward"), dict(state["said"])

    def _remember(self, metrics: Mapping[str, float]) -> None:
        for name, values in self._history.items():
            value = metrics.get(name)
            if value is not None and math.isfinite(value):
                values.append(float(value))
                del values[: -self.config.window]
        for name, values in self._first.items():
            value = metrics.get(name)
            if value is not None and math.isfinite(value) and len(values) < self.config.window:
                values.append(float(value))
        recent = self._history["reward"][-RECENT_STEPS:]
        if len(recent) == RECENT_STEPS:
            self._best_reward = max(statistics.fmean(recent), -math.inf if self._best_reward is None else self._best_reward)

    def _usual(self, name: str) -> list[float]:
        """The last window, or nothing while it is not full."""
        values = self._history[name]
        return values if len(values) >= self.config.window else []

    def _not_finite(self, metrics: Mapping[str, float]) -> str:
        bad = [f"{name}={metrics[name]}" for name in WATCHED if name in metrics and not math.isfinite(metrics[name])]
        what = "lower training.lr or look for a bad row; the last checkpoint is from before"
        return f"{', '.join(bad)}: not finite; {what}" if bad else ""

    def _gap(self, metrics: Mapping[str, float]) -> str:
        gap = metrics.get("logprob_gap_mean", 0.0)
        if not gap > self.logprob_gap:
            return ""
        return (
            f"vLLM's and the trainer's log-probs differ by {gap:.2g} on average (training.logprob_gap_alarm="
            f"{self.logprob_gap}): the two sides do not run the same model"
        )

    def _reward_collapse(self, metrics: Mapping[str, float]) -> str:
        first, best = self._first["reward"], self._best_reward
        recent = [*self._history["reward"][1 - RECENT_STEPS :], metrics.get("reward", math.nan)]
        if best is None or len(first) < self.config.window or not all(map(math.isfinite, recent)):
            return ""
        # From step to step, so that a steady rise is no noise.
        noise = statistics.pstdev(later - earlier for earlier, later in itertools.pairwise(first)) / math.sqrt(2)
        gained = best - statistics.fmean(first[:RECENT_STEPS])
        now = statistics.fmean(recent)
        lost = max(self.config.reward_lost_fraction * gained, self.config.reward_lost_stds * noise, 1e-3)
        if best - now <= lost:
            return ""
        return (
            f"the reward fell to {now:.3g} over {RECENT_STEPS} steps, from {best:.3g}: the policy is being lost; go back to a "
            f"checkpoint, lower training.lr, or correct for stale tokens (algorithm.importance)"
        )

    def _tool_collapse(self, metrics: Mapping[str, float]) -> str:
        usual, rate = self._usual("tool_rate"), metrics.get("tool_rate")
        if not usual or rate is None or rate >= self.config.tool_rate_fraction * statistics.fmean(usual):
            return ""
        return (
            f"tools are used in {rate:.1%} of the trajectories, {statistics.fmean(usual):.1%} in the steps before: look at "
            f"transcripts.jsonl; a reward that needs no tool, or tool errors (tool/errors), drive it out"
        )

    def _entropy_collapse(self, metrics: Mapping[str, float]) -> str:
        first, entropy = self._first["entropy"], metrics.get("entropy")
        if entropy is None or len(first) < self.config.window:
            return ""
        start = statistics.fmean(first)
        if entropy >= self.config.entropy_fraction * start:
            return ""
        return (
            f"entropy fell to {entropy:.3g}, from {start:.3g} in the first {len(first)} steps: rollouts are nearly alike; "
            f"raise algorithm.clip_high or algorithm.entropy_coefficient, or lower training.lr"
        )

    def _repetition(self, metrics: Mapping[str, float]) -> str:
        share = metrics.get("repeated_fraction", 0.0)
        if not share > self.config.repeated_fraction:
            return ""
        return f"{share:.1%} of the trajectories end in a loop of the same tokens (limit {self.config.repeated_fraction:.1%})"

    def _judge_hacking(self, metrics: Mapping[str, float]) -> str:
        rewards, accuracies = self._usual("reward"), self._usual("accuracy")
        if not rewards or not accuracies or "reward" not in metrics or "accuracy" not in metrics:
            return ""
        jump, spread = metrics["reward"] - statistics.fmean(rewards), statistics.pstdev(rewards)
        if jump <= self.config.hacking_reward_stds * max(spread, 1e-3) or metrics["accuracy"] > statistics.fmean(accuracies):
            return ""
        return (
            f"the reward jumped by {jump:.3g} to {metrics['reward']:.3g} (its standard deviation is {spread:.3g}) and accuracy "
            f"did not rise: a part of the reward may be hacked; compare reward/* in metrics.jsonl"
        )

    def _degenerate(self, metrics: Mapping[str, float]) -> str:
        share = metrics.get("degenerate_groups", 0.0)
        if share < self.config.degenerate_fraction or share == 0:
            return ""
        return f"{share:.0%} of the groups have equal rewards throughout: nothing can be learned from them"
