"""A circuit breaker: what keeps failing is left alone for a while, then asked once before everybody asks again."""

from __future__ import annotations

import time
from collections.abc import Callable


class CircuitBreaker:
    """Closed: calls pass. After `max_failures` in a row open: none passes for `pause_s`. Then half-open: one call passes,
    and its outcome closes or reopens.

    Every call that `begin` let pass ends in `succeed`, `fail` or `abandon` (neither: it was cancelled).
    """

    def __init__(self, max_failures: int, pause_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_failures, self._pause_s, self._clock = max_failures, pause_s, clock
        self._num_failures = 0
        self._opened_at: float | None = None
        self._is_probing = False

    @property
    def state(self) -> str:
        """closed, open or half-open."""
        if self._opened_at is None:
            return "closed"
        return "open" if self._clock() - self._opened_at < self._pause_s else "half-open"

    @property
    def lets_pass(self) -> bool:
        state = self.state
        return state == "closed" or (state == "half-open" and not self._is_probing)

    def begin(self) -> None:
        assert self.lets_pass
        self._is_probing = self._opened_at is not None

    def succeed(self) -> bool:
        """-> whether it was open until now."""
        was_open = self._opened_at is not None
        self._num_failures, self._opened_at, self._is_probing = 0, None, False
        return was_open

    def fail(self) -> bool:
        """-> whether this failure opened it. One that arrives late, while it is open, does not prolong the pause."""
        self._num_failures += 1
        if self.state == "open" or self._num_failures < self._max_failures:
            return False
        is_first = self._opened_at is None
        self._opened_at, self._is_probing = self._clock(), False
        return is_first

    def abandon(self) -> None:
        self._is_probing = False
