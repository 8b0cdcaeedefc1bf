"""Who decides whether an answer is right. The embedded judge compares texts; it needs no service."""

from __future__ import annotations

import re
import unicodedata
from typing import Protocol

from megatron_agent.types import Unscored


class Judge(Protocol):
    """Says how far a prediction agrees with the true answer: 0 (wrong) to 1 (right), or why that cannot be said."""

    async def verdict(self, question: str, answer: str, prediction: str) -> float | Unscored: ...


class ExactMatchJudge:
    """1 where the normalised texts are equal, otherwise 0."""

    async def verdict(self, question: str, answer: str, prediction: str) -> float | Unscored:
        return float(normalised(answer) == normalised(prediction))


def normalised(text: str) -> str:
    """Without case, spacing, articles, and the punctuation around words; signs and decimal points of numbers are kept.

    A text of nothing but articles or punctuation keeps them: "A" is an answer to a multiple choice question.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)  # 1,000
    words = re.split(r"[\s,;]+", text)
    stripped = [word.lstrip("\"'`([{<:!?").rstrip("\"'`)]}>.:!?") for word in words]
    kept = [word for word in stripped if word]
    without_articles = [word for word in kept if word not in ("a", "an", "the")]
    return " ".join(without_articles or kept) or text.strip()
