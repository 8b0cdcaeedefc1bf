"""DeepEyes' reward for questions of reasoning (arXiv 2505.14362): accuracy and format, nothing for tools."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_agent.rewards.base import final_answer, has_format_error
from megatron_agent.rewards.judged import JudgedReward
from megatron_agent.types import RewardParts, Status, Task, Trajectory, Unscored


class CommonReasoningReward(JudgedReward):
    """Parts: accuracy 0..1, format 0 or -1."""

    @dataclass
    class Config(JudgedReward.Config):
        """Weights of the parts."""

        accuracy_weight: float = 0.8
        format_weight: float = 0.2

    config: Config

    async def score(self, trajectory: Trajectory, task: Task) -> RewardParts | Unscored:
        if trajectory.status is Status.ABORTED:
            return Unscored("the episode was aborted")
        answer = final_answer(trajectory)
        accuracy = await self.accuracy(task, answer)
        if isinstance(accuracy, Unscored):
            return accuracy
        is_format_error = self.talks_too_much(answer) or has_format_error(trajectory)
        return RewardParts(
            {"accuracy": accuracy, "format": -1.0 if is_format_error else 0.0},
            {"accuracy": self.config.accuracy_weight, "format": self.config.format_weight},
        )


COMPONENT = CommonReasoningReward
