"""What rewards with a judge share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_agent.errors import ConfigError
from megatron_agent.rewards.base import RewardBase
from megatron_agent.rewards.judge import Judge, JudgeConfig, make_judge
from megatron_agent.rewards.judge_check import require_accuracy
from megatron_agent.types import Task, Unscored


class JudgedReward(RewardBase):
    """Asks a judge. One that is given serves several rewards, and whoever made it starts and closes it."""

    @dataclass
    class Config(RewardBase.Config):
        """An answer of `max_answer_chars` or more talks to the judge: it is wrong, and a format error."""

        max_answer_chars: int = 1000
        judge: JudgeConfig = field(default_factory=JudgeConfig)

        def __post_init__(self) -> None:
            if self.max_answer_chars < 1:
                raise ConfigError(f"reward.max_answer_chars is {self.max_answer_chars}; it must be at least 1")

    config: Any

    def __init__(self, config: Any = None, judge: Judge | None = None) -> None:
        super().__init__(config)
        self.owns_judge = judge is None
        self.judge: Judge = judge or make_judge(self.config.judge)

    async def start(self) -> None:
        """Raises ConfigError where the judge errs more often than `judge.min_accuracy` allows."""
        if self.owns_judge:
            await require_accuracy(self.judge, self.config.judge.min_accuracy)

    async def close(self) -> None:
        if self.owns_judge:
            await self.judge.close()

    def talks_too_much(self, answer: str | None) -> bool:
        return answer is not None and len(answer) >= self.config.max_answer_chars

    async def accuracy(self, task: Task, answer: str | None) -> float | Unscored:
        """The judge's verdict within 0 to 1; 0 without asking where there is no answer or it is too long."""
        if answer is None or self.talks_too_much(answer):
            return 0.0
        verdict = await self.judge.verdict(task.question, task.ground_truth, answer)
        if isinstance(verdict, Unscored) or 0.0 <= verdict <= 1.0:
            return verdict if isinstance(verdict, Unscored) else float(verdict)
        return Unscored(f"the judge's verdict {verdict} is not within 0 to 1")
