"""The contract of a reward, and what rewards share: finding the answer, comparing boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_agent.envs.functional import last_tagged
from megatron_agent.types import RewardParts, Task, Trajectory, Unscored


class RewardBase:
    """Scores one trajectory. One object serves many trajectories at once: keep no state of a trajectory in it."""

    config: Any

    @dataclass
    class Config:
        """Options of the reward in the run's `reward:` section."""

    def __init__(self, config: Any = None) -> None:
        self.config = config if config is not None else type(self).Config()

    async def score(self, trajectory: Trajectory, task: Task) -> RewardParts | Unscored:
        """Named parts and their weights, or why the trajectory could not be judged (it is then left out of its group)."""
        raise NotImplementedError(f"{type(self).__name__} does not define score")


def answer_of(text: str) -> str | None:
    """What stands in the last `<answer>...</answer>`, stripped; None where there is none or it is empty."""
    answer = last_tagged(text, "answer")
    return (answer.strip() or None) if answer is not None else None


def final_answer(trajectory: Trajectory) -> str | None:
    """The answer in the last turn of a trajectory."""
    return answer_of(trajectory.turns[-1].text) if trajectory.turns else None


def iou(box_a: Sequence[float], box_b: Sequence[float]) -> float:
    """Intersection over union of two boxes (left, top, right, bottom); 0 where either is empty."""
    width = min(box_a[2], box_b[2]) - max(box_a[0], box_b[0])
    height = min(box_a[3], box_b[3]) - max(box_a[1], box_b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (box_a, box_b)]
    return width * height / (sum(areas) - width * height)
