"""Who decides whether an answer is right. The embedded judge compares texts; it needs no service."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from typing import Any

from megatron_agent.options import require
from megatron_agent.types import Unscored

KINDS = ("exact_match", "openai")
ON_FAILURE = ("unscored", "wait")


@dataclass
class JudgeConfig:
    """`exact_match` compares texts; `openai` asks a model behind any of `endpoints` ("http://host:8000/v1").

    A request that fails is tried again `max_retries` times, at any endpoint, with back-off; then the trajectory is unscored
    (the run goes on), or, with `on_failure: wait`, an outage is waited out for up to `max_wait_s`. An endpoint that fails
    `breaker_failures` times in a row is left alone for `breaker_pause_s`.
    """

    kind: str = "exact_match"
    endpoints: list[str] = field(default_factory=list)
    model: str = ""  # empty: the first that the endpoint lists
    api_key_env: str = ""  # the environment variable that holds the key; empty: none is needed
    timeout_s: float = 30.0  # of one request, from connecting to the last byte
    max_tokens: int = 16  # of the reply; a judge that thinks first needs more
    extra_body: dict[str, Any] = field(default_factory=dict)  # further fields of the request, such as chat_template_kwargs
    concurrency: int = 64  # requests under way, over all endpoints
    cache_size: int = 65536  # verdicts kept; 0: none
    max_retries: int = 4
    backoff_s: float = 0.5  # doubles up to max_backoff_s
    max_backoff_s: float = 20.0
    breaker_failures: int = 5
    breaker_pause_s: float = 10.0
    on_failure: str = "unscored"
    max_wait_s: float = 1800.0
    min_accuracy: float = 0.0  # on the labelled cases (judge_cases.jsonl), below which a run does not start; 0: not asked

    def __post_init__(self) -> None:
        require(self.kind in KINDS, f"reward.judge.kind={self.kind!r}; allowed: {', '.join(KINDS)}")
        require(self.on_failure in ON_FAILURE, f"reward.judge.on_failure={self.on_failure!r}; allowed: {', '.join(ON_FAILURE)}")
        require(
            self.kind != "openai" or bool(self.endpoints),
            "reward.judge.endpoints is empty; give at least one base URL, such as http://127.0.0.1:8000/v1",
        )
        for url in self.endpoints:
            require(
                url.startswith(("http://", "https://")),
                f"reward.judge.endpoints: {url!r} is no base URL; write it as http://host:8000/v1",
            )
        for name in ("max_tokens", "concurrency", "breaker_failures"):
            require(getattr(self, name) >= 1, f"reward.judge.{name}={getattr(self, name)} must be 1 or more")
        for name in ("cache_size", "max_retries", "backoff_s", "max_backoff_s", "breaker_pause_s", "max_wait_s"):
            require(getattr(self, name) >= 0, f"reward.judge.{name}={getattr(self, name)} must be 0 or more")
        require(self.timeout_s > 0, f"reward.judge.timeout_s={self.timeout_s} must be above 0")
        require(0 <= self.min_accuracy <= 1, f"reward.judge.min_accuracy={self.min_accuracy} must lie between 0 and 1")


class Judge:
    """Says how far a prediction agrees with the true answer: 0 (wrong) to 1 (right), or why that cannot be said.

    One object serves all trajectories of a process, on one event loop.
    """

    async def verdict(self, question: str, answer: str, prediction: str) -> float | Unscored:
        raise NotImplementedError(f"{type(self).__name__} does not define verdict")

    async def close(self) -> None:
        """Gives back connections; verdicts under way are cancelled."""


def make_judge(config: JudgeConfig) -> Judge:
    """The judge of a configuration. Raises ConfigError: the key's environment variable is not set."""
    if config.kind == "exact_match":
        return ExactMatchJudge()
    from megatron_agent.rewards.judge_client import OpenAIJudge

    return OpenAIJudge(config)


class ExactMatchJudge(Judge):
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
