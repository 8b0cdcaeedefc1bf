"""DeepEyes' reward (arXiv 2505.14362): accuracy, format, and a bonus for tools only where they led to a right answer."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_agent.rewards.common_reasoning import CommonReasoningReward
from megatron_agent.types import RewardParts, Task, Trajectory, Unscored

RIGHT_ABOVE = 0.5


class VlAgentReward(CommonReasoningReward):
    """Parts: accuracy 0..1, format 0 or -1, tool 0 or 1 (a tool succeeded and the answer is right).

    Without the condition on the answer tools flood; without the bonus their use dies out.
    """

    @dataclass
    class Config(CommonReasoningReward.Config):
        """Weights of the parts."""

        tool_weight: float = 1.2

    config: Config

    async def score(self, trajectory: Trajectory, task: Task) -> RewardParts | Unscored:
        scored = await super().score(trajectory, task)
        if isinstance(scored, Unscored):
            return scored
        used_tool = any(call.ok for call in trajectory.tool_calls)
        bonus = float(used_tool and scored.parts["accuracy"] > RIGHT_ABOVE)
        return RewardParts({**scored.parts, "tool": bonus}, {**scored.weights, "tool": self.config.tool_weight})


COMPONENT = VlAgentReward
