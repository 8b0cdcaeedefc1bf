"""Accuracy alone, by comparing normalised texts: for short closed answers, and for evaluation."""

from __future__ import annotations

from megatron_agent.rewards.base import RewardBase, final_answer
from megatron_agent.rewards.judge import ExactMatchJudge
from megatron_agent.types import RewardParts, Status, Task, Trajectory, Unscored


class ExactMatchReward(RewardBase):
    """One part, accuracy: 1 where the final answer equals the ground truth, otherwise 0; no answer is 0."""

    async def score(self, trajectory: Trajectory, task: Task) -> RewardParts | Unscored:
        if trajectory.status is Status.ABORTED:
            return Unscored("the episode was aborted")
        answer = final_answer(trajectory)
        verdict = 0.0 if answer is None else await ExactMatchJudge().verdict(task.question, task.ground_truth, answer)
        return verdict if isinstance(verdict, Unscored) else RewardParts({"accuracy": verdict}, {"accuracy": 1.0})


COMPONENT = ExactMatchReward
