"""What passes between the agent loop and an engine: how a turn is sampled, and the turn."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Sampling:
    """How one turn is sampled; `max_tokens` bounds it, `stop` are strings that end it (and stay in it)."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    seed: int | None = None
    banned_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Generation:
    """One turn as it was sampled: three lists of equal length, and why it ended ("stop", "length", "aborted").

    `logprobs` are natural, under the distribution that was sampled from (after temperature, top-p and top-k);
    `weight_versions` says which weights made each token, 0 being those of the checkpoint. `num_cached_tokens` of the row
    were in the engine's prefix cache.
    """

    token_ids: list[int]
    logprobs: list[float]
    weight_versions: list[int]
    stop_reason: str
    num_cached_tokens: int = 0

    def first(self, num_tokens: int) -> Generation:
        """Without the tokens behind the first `num_tokens`."""
        kept = slice(max(0, num_tokens))
        return replace(
            self, token_ids=self.token_ids[kept], logprobs=self.logprobs[kept], weight_versions=self.weight_versions[kept]
        )

    def then(self, rest: Generation) -> Generation:
        """This, and the rest of the turn, sampled behind it."""
        return Generation(
            self.token_ids + rest.token_ids,
            self.logprobs + rest.logprobs,
            self.weight_versions + rest.weight_versions,
            rest.stop_reason,
            self.num_cached_tokens,
        )


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> str:
    """Where two rows part, in words."""
    for index, (left, right) in enumerate(itertools.zip_longest(ours, theirs)):
        if left != right:
            return f"at token {index}: {left} in our row, {right} in vLLM's (lengths {len(ours)} and {len(theirs)})"
    return "nowhere"


def versions_of(output: Any, num_tokens: int) -> list[int]:
    """vLLM's spans of weight versions -> one int per token ("default", the checkpoint as loaded, is 0)."""
    versions = [0] * num_tokens
    for span in output.weight_versions or ():
        version = 0 if span.version == "default" else int(span.version)
        versions[span.start : span.end] = [version] * (span.end - span.start)
    return versions
