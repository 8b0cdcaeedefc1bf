"""A client of the HTTP services that tools ask: several endpoints, retries with back-off, a deadline for every call."""

from __future__ import annotations

import functools
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from megatron_agent.errors import ConfigError, EnvError

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)
T = TypeVar("T")
ASK_LATER = (408, 425, 429)  # the only refusals that another attempt may turn


@dataclass
class ServiceConfig:
    """`deadline_s` bounds a call with all its attempts: keep it below agent.tool_timeout_s."""

    endpoints: list[str] = field(default_factory=list)  # any of them gives the same answer
    timeout_s: float = 5.0  # of one attempt
    deadline_s: float = 20.0
    max_attempts: int = 6
    rest_s: float = 10.0  # an endpoint that failed is passed over for so long while others stand

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise ConfigError("endpoints is empty; give the URL of at least one server")
        for endpoint in self.endpoints:
            if not is_web_address(endpoint):
                raise ConfigError(f"endpoints: {endpoint!r} is no http:// or https:// URL")
        if not 0 < self.timeout_s <= self.deadline_s:
            raise ConfigError(f"timeout_s is {self.timeout_s}; it must be above 0 and at most deadline_s={self.deadline_s}")
        if self.max_attempts < 1 or self.rest_s < 0:
            raise ConfigError(f"max_attempts={self.max_attempts} must be 1 or more, rest_s={self.rest_s} 0 or more")


class AnswerError(EnvError):
    """An endpoint did not answer, or not in the service's terms: another attempt may go through."""


class Service:
    """Calls from many threads at once share one pool of connections."""

    def __init__(self, endpoints: tuple[str, ...], timeout_s: float, deadline_s: float, max_attempts: int, rest_s: float):
        import httpx

        self.endpoints, self.timeout_s, self.deadline_s = endpoints, timeout_s, deadline_s
        self.max_attempts, self.rest_s = max_attempts, rest_s
        self._client = httpx.Client(limits=httpx.Limits(max_connections=None, max_keepalive_connections=64))
        self._rests_until_s: dict[str, float] = {}
        self._random = random.Random()

    def post(self, payload: dict[str, Any], read: Callable[[httpx.Response], T], path: str = "") -> T:
        """`read` of an endpoint's answer to `payload`; whatever `read` raises makes the answer a bad one.

        waits for: an endpoint, and between attempts. unblocked by: the first good answer, a refusal, `deadline_s`.
        Raises EnvError, AnswerError among them, in words for the model: they name no address.
        """
        from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, stop_before_delay, wait_random_exponential

        until_s = time.monotonic() + self.deadline_s
        attempts = Retrying(
            retry=retry_if_exception_type(AnswerError),
            stop=stop_after_attempt(self.max_attempts) | stop_before_delay(self.deadline_s),
            wait=wait_random_exponential(multiplier=0.1, max=2.0),
            reraise=True,
        )
        return attempts(self._attempt, payload, read, path, until_s)

    def _attempt(self, payload: dict[str, Any], read: Callable[[httpx.Response], T], path: str, until_s: float) -> T:
        import httpx

        endpoint = self._endpoint()
        timeout_s = max(0.001, min(self.timeout_s, until_s - time.monotonic()))
        try:
            response = self._client.post(endpoint + path, json=payload, timeout=timeout_s)
            if response.is_client_error and response.status_code not in ASK_LATER:
                raise EnvError(f"the service refused the request: {response.status_code}")
            response.raise_for_status()
        except httpx.HTTPError as error:
            what = f"{response.status_code}" if isinstance(error, httpx.HTTPStatusError) else type(error).__name__
            raise self._failed(endpoint, f"the service did not answer: {what}", error) from error
        try:
            return read(response)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._failed(endpoint, "the service's answer could not be read", error) from error

    def _failed(self, endpoint: str, reason: str, error: Exception) -> AnswerError:
        logger.warning("%s: %s (%r)", endpoint, reason, error)
        self._rests_until_s[endpoint] = time.monotonic() + self.rest_s
        return AnswerError(reason)

    def _endpoint(self) -> str:
        now_s = time.monotonic()
        ready = [endpoint for endpoint in self.endpoints if self._rests_until_s.get(endpoint, 0.0) <= now_s]
        return self._random.choice(ready or self.endpoints)


def service_of(config: ServiceConfig) -> Service:
    """The one client of all tools with these settings. Raises ImportError where httpx is not installed."""
    return _service(tuple(config.endpoints), config.timeout_s, config.deadline_s, config.max_attempts, config.rest_s)


_service = functools.cache(Service)


def is_web_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:  # a broken IPv6 address
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def quoted(text: str, max_chars: int, tags: tuple[str, ...] = ()) -> str:
    """Text from outside at most `max_chars` long, safe to stand in a token row: it spells no special token, no picture
    marker, no lone surrogate, and none of `tags`, with which it could end its own quotation."""
    text = text.encode(errors="replace").decode()
    for token in ("<|", "<image>", *tags):
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text if len(text) <= max_chars else text[: max(0, max_chars - 3)] + "..."
