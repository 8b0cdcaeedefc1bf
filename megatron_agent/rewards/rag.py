"""Answers found by searching, as R1-Searcher scores them (arXiv 2503.05592): overlap of words, and the protocol."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from megatron_agent.errors import ConfigError
from megatron_agent.rewards.base import CUT_SHORT, RewardBase, alternates, final_answer, has_reserved_token
from megatron_agent.types import RewardParts, Status, Task, Trajectory, Unscored

QUERY_TAGS = (("<|begin_of_query|>", "<|end_of_query|>"), ("<search>", "</search>"))
DOCUMENT_TAGS = ("<|begin_of_documents|>", "<|end_of_documents|>", "<information>", "</information>")
YES_NO = ("yes", "no")


class RagReward(RewardBase):
    """Parts: accuracy 0..1, format 0 or -1, retrieval 0 or 1 (a search succeeded).

    The defaults are R1-Searcher's second stage; its first, which teaches to search, is accuracy 0, format 0.5, retrieval 0.5.
    """

    @dataclass
    class Config:
        """Weights of the parts. `metric`: f1 of the words, or em (1 where they are equal). Longer answers break the format."""

        metric: str = "f1"
        accuracy_weight: float = 1.0
        format_weight: float = 2.0
        retrieval_weight: float = 0.0
        max_answer_words: int = 10

        def __post_init__(self) -> None:
            if self.metric not in ("f1", "em"):
                raise ConfigError(f"reward.metric is {self.metric!r}; allowed: f1, em")
            if self.max_answer_words < 1:
                raise ConfigError(f"reward.max_answer_words is {self.max_answer_words}; it must be at least 1")

    config: Config

    async def score(self, trajectory: Trajectory, task: Task) -> RewardParts | Unscored:
        if trajectory.status is Status.ABORTED:
            return Unscored("the episode was aborted")
        answer = final_answer(trajectory)
        is_format_error = has_search_format_error(trajectory, self.config.max_answer_words)
        return RewardParts(
            parts={
                "accuracy": max(self._agreement(answer, truth) for truth in truths(task)) if answer is not None else 0.0,
                "format": -1.0 if is_format_error else 0.0,
                "retrieval": float(any(call.ok for call in trajectory.tool_calls)),
            },
            weights={
                "accuracy": self.config.accuracy_weight,
                "format": self.config.format_weight,
                "retrieval": self.config.retrieval_weight,
            },
        )

    def _agreement(self, answer: str, truth: str) -> float:
        return f1(answer, truth) if self.config.metric == "f1" else float(words(answer) == words(truth))


def truths(task: Task) -> list[str]:
    """The ground truth and, in `extra_info["answers"]`, other texts that are as right."""
    others = task.extra_info.get("answers")
    return [task.ground_truth, *map(str, others if isinstance(others, (list, tuple)) else ())]


def words(text: str) -> list[str]:
    """In order, without case, punctuation and articles; a text of articles keeps them. True and False are yes and no."""
    text = {"true": "yes", "false": "no"}.get(text.strip().casefold(), text)
    found = re.findall(r"[^\W_]+", text.casefold())
    return [word for word in found if word not in ("a", "an", "the")] or found


def f1(answer: str, truth: str) -> float:
    """Harmonic mean of precision and recall of the words; yes and no count only when they are all of both."""
    said, true = words(answer), words(truth)
    if said == true:
        return float(bool(said))
    if any(" ".join(side) in YES_NO for side in (said, true)):
        return 0.0
    num_common = (Counter(said) & Counter(true)).total()
    return 2 * num_common / (len(said) + len(true))


def has_search_format_error(trajectory: Trajectory, max_answer_words: int) -> bool:
    """Thoughts and queries open and close by turns over the whole episode (documents come in the middle of a thought), one
    short answer follows them, and the model wrote no documents itself."""
    if trajectory.status in CUT_SHORT or not trajectory.turns:
        return True
    text = trajectory.text
    if not all(alternates(text, *tags) for tags in (("<think>", "</think>"), *QUERY_TAGS)):
        return True
    if has_reserved_token(text) or any(tag in text for tag in DOCUMENT_TAGS):
        return True
    ending = text.rpartition("</think>")[2]
    if text.count("<answer>") != 1 or text.count("</answer>") != 1 or "<answer>" not in ending:
        return True
    answer = final_answer(trajectory)
    return answer is None or len(answer.split()) > max_answer_words or any(tag in answer for pair in QUERY_TAGS for tag in pair)


COMPONENT = RagReward
