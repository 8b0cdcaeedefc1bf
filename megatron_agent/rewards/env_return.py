"""What the environment itself paid: for games, whose rules say what an episode is worth."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_agent.rewards.base import RewardBase
from megatron_agent.types import RewardParts, Status, Task, Trajectory, Unscored


class EnvReturnReward(RewardBase):
    """Parts: env_return, the sum of the environment's rewards; accuracy, 1 where the episode's last reward says solved."""

    @dataclass
    class Config:
        """Weights of the parts. An episode is solved where its last reward is above `solved_above`."""

        env_return_weight: float = 1.0
        accuracy_weight: float = 0.0
        solved_above: float = 0.5

    config: Config

    async def score(self, trajectory: Trajectory, task: Task) -> RewardParts | Unscored:
        if trajectory.status is Status.ABORTED:
            return Unscored("the episode was aborted")
        last = trajectory.turns[-1].tool_reward if trajectory.turns else 0.0
        return RewardParts(
            parts={"env_return": trajectory.process_reward, "accuracy": float(last > self.config.solved_above)},
            weights={"env_return": self.config.env_return_weight, "accuracy": self.config.accuracy_weight},
        )


COMPONENT = EnvReturnReward
