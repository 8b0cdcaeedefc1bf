"""DeepEyes' reward (arXiv 2505.14362): accuracy, format, and a bonus for tools only where they led to a right answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from megatron_agent.errors import ConfigError
from megatron_agent.rewards.base import RewardBase, final_answer
from megatron_agent.rewards.judge import ExactMatchJudge, Judge
from megatron_agent.types import RewardParts, Status, Task, Trajectory, Turn, Unscored

# Tokens that only the chat template and the renderer may write.
RESERVED = ("<|image_pad|>", "<|video_pad|>", "<|vision_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>")
CUT_SHORT = (Status.EMITTED_PLACEHOLDER, Status.CONTEXT_FULL, Status.LENGTH)
RIGHT_ABOVE = 0.5
_END = r"\s*(?:<\|im_end\|>|<\|endoftext\|>)*\s*"
_TOOL_TURN = re.compile(rf"\s*<think>.*</think>\s*<tool_call>.*</tool_call>{_END}", re.DOTALL)
_ANSWER_TURN = re.compile(r".*<answer>.*</answer>.*", re.DOTALL)


class VlAgentReward(RewardBase):
    """Parts: accuracy 0..1, format 0 or -1, tool 0 or 1 (a tool succeeded and the answer is right).

    Without the condition on the answer tools flood; without the bonus their use dies out.
    """

    @dataclass
    class Config:
        """Weights of the parts. An answer of `max_answer_chars` or more talks to the judge: wrong, and a format error."""

        accuracy_weight: float = 0.8
        format_weight: float = 0.2
        tool_weight: float = 1.2
        max_answer_chars: int = 1000

        def __post_init__(self) -> None:
            if self.max_answer_chars < 1:
                raise ConfigError(f"reward.max_answer_chars is {self.max_answer_chars}; it must be at least 1")

    config: Config

    def __init__(self, config: Any = None, judge: Judge | None = None) -> None:
        super().__init__(config)
        self.judge: Judge = judge or ExactMatchJudge()

    async def score(self, trajectory: Trajectory, task: Task) -> RewardParts | Unscored:
        if trajectory.status is Status.ABORTED:
            return Unscored("the episode was aborted")
        answer = final_answer(trajectory)
        accuracy, is_format_error = 0.0, has_format_error(trajectory)
        if answer is not None and len(answer) >= self.config.max_answer_chars:
            is_format_error = True
        elif answer is not None:
            verdict = await self.judge.verdict(task.question, task.ground_truth, answer)
            if isinstance(verdict, Unscored):
                return verdict
            if not 0.0 <= verdict <= 1.0:
                return Unscored(f"the judge's verdict {verdict} is not within 0 to 1")
            accuracy = float(verdict)
        used_tool = any(call.ok for call in trajectory.tool_calls)
        return RewardParts(
            parts={
                "accuracy": accuracy,
                "format": -1.0 if is_format_error else 0.0,
                "tool": float(used_tool and accuracy > RIGHT_ABOVE),
            },
            weights={
                "accuracy": self.config.accuracy_weight,
                "format": self.config.format_weight,
                "tool": self.config.tool_weight,
            },
        )


def has_format_error(trajectory: Trajectory) -> bool:
    """Every turn thinks and then acts, the last one answers exactly once, and the episode was not cut short."""
    if trajectory.status in CUT_SHORT or not trajectory.turns:
        return True
    *tool_turns, final_turn = trajectory.turns
    if any(_is_broken(turn) for turn in trajectory.turns) or not all(_TOOL_TURN.fullmatch(turn.text) for turn in tool_turns):
        return True
    text = final_turn.text
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return True
    after_thoughts = text.rpartition("</think>")[2]
    return not _ANSWER_TURN.fullmatch(after_thoughts)


def _is_broken(turn: Turn) -> bool:
    """A reserved token, or think tags that do not open and close by turns."""
    tags = re.findall(r"</?think>", turn.text)
    balanced = tags == ["<think>", "</think>"] * (len(tags) // 2)
    return not balanced or any(token in turn.text for token in RESERVED)


COMPONENT = VlAgentReward
