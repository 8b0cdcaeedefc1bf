r"""DeepEyes' reward for mathematics (arXiv 2505.14362): the answer stands in `\boxed{}`; math-verify first, then the judge."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_agent.errors import ConfigError
from megatron_agent.rewards import math_verifier
from megatron_agent.rewards.base import after_thoughts, has_broken_turn
from megatron_agent.rewards.judge import normalised
from megatron_agent.rewards.judged import JudgedReward
from megatron_agent.types import RewardParts, Status, Task, Trajectory, Unscored

BOX = r"\boxed{"


class MathReward(JudgedReward):
    """Parts: accuracy 0..1, format 0 or -1 (exactly one box after the thoughts, and every turn in order)."""

    @dataclass
    class Config(JudgedReward.Config):
        """Weights of the parts. A formula that costs math-verify more than `verify_limit_s` of CPU goes to the judge."""

        accuracy_weight: float = 1.2
        format_weight: float = 0.4
        verify_limit_s: float = 5.0

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.verify_limit_s <= 0:
                raise ConfigError(f"reward.verify_limit_s is {self.verify_limit_s}; it must be above 0")

    config: Config

    async def score(self, trajectory: Trajectory, task: Task) -> RewardParts | Unscored:
        if trajectory.status is Status.ABORTED:
            return Unscored("the episode was aborted")
        found = boxed(after_thoughts(trajectory.turns[-1])) if trajectory.turns else []
        answer = found[-1] if found else None
        accuracy = await self.accuracy(task, answer)
        if isinstance(accuracy, Unscored):
            return accuracy
        is_format_error = len(found) != 1 or self.talks_too_much(answer) or has_broken_turn(trajectory)
        return RewardParts(
            {"accuracy": accuracy, "format": -1.0 if is_format_error else 0.0},
            {"accuracy": self.config.accuracy_weight, "format": self.config.format_weight},
        )

    async def accuracy(self, task: Task, answer: str | None) -> float | Unscored:
        if answer is not None and not self.talks_too_much(answer):
            truth = (boxed(task.ground_truth) or [task.ground_truth])[-1]
            if normalised(truth) == normalised(answer) or await math_verifier.equal(truth, answer, self.config.verify_limit_s):
                return 1.0
        return await super().accuracy(task, answer)


def boxed(text: str) -> list[str]:
    r"""What stands in every outermost `\boxed{...}` whose braces match, stripped; empty ones are left out."""
    found, start = [], text.find(BOX)
    while start >= 0:
        first = start + len(BOX)
        end = _closing_brace(text, first)
        if end is not None and text[first:end].strip():
            found.append(text[first:end].strip())
        start = text.find(BOX, first if end is None else end)
    return found


def _closing_brace(text: str, position: int) -> int | None:
    """The brace that closes one opened before `position`; `\\{` and `\\}` are no braces."""
    depth, is_escaped = 1, False
    for index in range(position, len(text)):
        character = text[index]
        if not is_escaped and character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return index
        is_escaped = character == "\\" and not is_escaped
    return None


COMPONENT = MathReward
