"""Where the model looked, or says that the answer is: overlap with `extra_info["target_bbox"]`.

The target is in pixels of the original picture (right and bottom exclusive). So is a looked-at box; an answered one is in
the coordinates that `space` names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_agent.errors import ConfigError
from megatron_agent.rewards.base import RewardBase, final_answer, has_format_error, iou, target_box
from megatron_agent.types import RewardParts, Status, Task, Trajectory, Unscored

BOXES = ("answer", "looked_at")
SPACES = ("original", "shown", "per_mille", "fraction")
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX = re.compile(rf"[\[(]{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}[\])]")


class GroundingIouReward(RewardBase):
    """Parts: iou 0..1, accuracy 0 or 1 (at least `right_iou`), format 0 or -1. A task without a target is unscored."""

    @dataclass
    class Config:
        """`box`: the one `answer`ed, four numbers in brackets, or the best of those `looked_at` by successful tool calls.

        `space` of an answered box: pixels of the `original` picture; pixels of the first picture as `shown` to the model;
        `per_mille` or `fraction` of its sides. All but the first need `extra_info["image_size"]`, the original's
        [width, height] in pixels.
        """

        box: str = "answer"
        space: str = "original"
        right_iou: float = 0.5
        iou_weight: float = 1.0
        accuracy_weight: float = 0.0
        format_weight: float = 0.2

        def __post_init__(self) -> None:
            if self.box not in BOXES:
                raise ConfigError(f"reward.box is {self.box!r}; allowed: {', '.join(BOXES)}")
            if self.space not in SPACES:
                raise ConfigError(f"reward.space is {self.space!r}; allowed: {', '.join(SPACES)}")
            if not 0 < self.right_iou <= 1:
                raise ConfigError(f"reward.right_iou is {self.right_iou}; it must be above 0 and at most 1")

    config: Config

    async def score(self, trajectory: Trajectory, task: Task) -> RewardParts | Unscored:
        if trajectory.status is Status.ABORTED:
            return Unscored("the episode was aborted")
        target = target_box(task)
        if target is None:
            return Unscored('extra_info["target_bbox"] is not a box')
        if self.config.box == "looked_at":
            boxes = [call.box_px for call in trajectory.tool_calls if call.ok and call.box_px is not None]
            overlap = max((iou(box, target) for box in boxes), default=0.0)
        else:
            scale = self._scale(task)
            if scale is None:
                return Unscored(f'reward.space={self.config.space} needs extra_info["image_size"] and a picture')
            box = box_in(final_answer(trajectory) or "")
            overlap = iou([side * factor for side, factor in zip(box, scale * 2, strict=True)], target) if box else 0.0
        is_right = overlap >= self.config.right_iou
        is_format_error = has_format_error(trajectory)
        return RewardParts(
            {"iou": overlap, "accuracy": float(is_right), "format": -1.0 if is_format_error else 0.0},
            {"iou": self.config.iou_weight, "accuracy": self.config.accuracy_weight, "format": self.config.format_weight},
        )

    def _scale(self, task: Task) -> tuple[float, float] | None:
        """Original pixels per unit of the answered box, across and down; None: unknown."""
        if self.config.space == "original":
            return 1.0, 1.0
        size = task.extra_info.get("image_size")
        if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(isinstance(side, (int, float)) for side in size):
            return None
        width_px, height_px = float(size[0]), float(size[1])
        if self.config.space == "shown":
            if not task.images:
                return None
            return width_px / task.images[0].width_px, height_px / task.images[0].height_px
        units = 1000.0 if self.config.space == "per_mille" else 1.0
        return width_px / units, height_px / units


def box_in(answer: str) -> tuple[float, ...] | None:
    """The four numbers of the one box in a text, however it is wrapped; None where there is none or more than one."""
    found = _BOX.findall(answer)
    return tuple(map(float, found[0])) if len(found) == 1 else None


COMPONENT = GroundingIouReward
