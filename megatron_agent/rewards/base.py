"""The contract of a reward, and what rewards share: finding the answer, its format, comparing boxes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_agent.envs.functional import last_tagged
from megatron_agent.types import Box, RewardParts, Status, Task, Trajectory, Turn, Unscored

# Tokens that only the chat template and the renderer may write.
RESERVED = ("<|image_pad|>", "<|video_pad|>", "<|vision_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>")
CUT_SHORT = (Status.EMITTED_PLACEHOLDER, Status.CONTEXT_FULL, Status.LENGTH)
_END = r"\s*(?:<\|im_end\|>|<\|endoftext\|>)*\s*"
_TOOL_TURN = re.compile(rf"\s*<think>.*</think>\s*<tool_call>.*</tool_call>{_END}", re.DOTALL)
_ANSWER_TURN = re.compile(r".*<answer>.*</answer>.*", re.DOTALL)


class RewardBase:
    """Scores one trajectory. One object serves many trajectories at once: keep no state of a trajectory in it."""

    config: Any

    @dataclass
    class Config:
        """Options of the reward in the run's `reward:` section."""

    def __init__(self, config: Any = None) -> None:
        self.config = config if config is not None else type(self).Config()

    async def start(self) -> None:
        """Awaited once before the first trajectory. Raises ConfigError where the reward cannot do its work."""

    async def score(self, trajectory: Trajectory, task: Task) -> RewardParts | Unscored:
        """Named parts and their weights, or why the trajectory could not be judged (it is then left out of its group)."""
        raise NotImplementedError(f"{type(self).__name__} does not define score")

    async def close(self) -> None:
        """Awaited once after the last trajectory, on the event loop of `score`."""


def answer_of(text: str) -> str | None:
    """What stands in the last `<answer>...</answer>`, stripped; None where there is none or it is empty."""
    answer = last_tagged(text, "answer")
    return (answer.strip() or None) if answer is not None else None


def final_answer(trajectory: Trajectory) -> str | None:
    """The answer in the last turn of a trajectory."""
    return answer_of(trajectory.turns[-1].text) if trajectory.turns else None


def after_thoughts(turn: Turn) -> str:
    """What a turn says after its last thought."""
    return turn.text.rpartition("</think>")[2]


def has_format_error(trajectory: Trajectory) -> bool:
    """Every turn thinks and then acts, the last one answers exactly once, and the episode was not cut short."""
    if has_broken_turn(trajectory):
        return True
    final_turn = trajectory.turns[-1]
    if final_turn.text.count("<answer>") != 1 or final_turn.text.count("</answer>") != 1:
        return True
    return not _ANSWER_TURN.fullmatch(after_thoughts(final_turn))


def has_broken_turn(trajectory: Trajectory) -> bool:
    """No turn, an episode that was cut short, a turn before the last that is not a thought and a tool call, a reserved
    token, or think tags that do not open and close by turns."""
    if trajectory.status in CUT_SHORT or not trajectory.turns:
        return True
    if any(not alternates(turn.text, "<think>", "</think>") or has_reserved_token(turn.text) for turn in trajectory.turns):
        return True
    return not all(_TOOL_TURN.fullmatch(turn.text) for turn in trajectory.turns[:-1])


def has_reserved_token(text: str) -> bool:
    return any(token in text for token in RESERVED)


def alternates(text: str, opening: str, closing: str) -> bool:
    """Whether every opening tag is followed by a closing one before the next, and none is left open."""
    tags = re.findall(f"{re.escape(opening)}|{re.escape(closing)}", text)
    return tags == [opening, closing] * (len(tags) // 2)


def iou(box_a: Sequence[float], box_b: Sequence[float]) -> float:
    """Intersection over union of two boxes (left, top, right, bottom); 0 where either is empty."""
    width = min(box_a[2], box_b[2]) - max(box_a[0], box_b[0])
    height = min(box_a[3], box_b[3]) - max(box_a[1], box_b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (box_a, box_b)]
    return width * height / (sum(areas) - width * height)


def target_box(task: Task) -> Box | None:
    """`extra_info["target_bbox"]`, the region that holds the answer, in pixels of the original picture; None: unknown."""
    box = task.extra_info.get("target_bbox")
    if not isinstance(box, (list, tuple)) or len(box) != 4:
        return None
    left, top, right, bottom = (int(side) for side in box)
    return left, top, right, bottom
