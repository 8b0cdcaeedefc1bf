"""What the retrieval tools share: queries between two tags, documents from a retriever, an answer or silence ends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_agent.envs.base import ToolBase
from megatron_agent.envs.functional import between, last_tagged
from megatron_agent.envs.service import ServiceConfig, quoted, service_of
from megatron_agent.errors import ConfigError, EnvError

if TYPE_CHECKING:
    import httpx

NO_DOCUMENTS = "None"


@dataclass
class SearchConfig(ServiceConfig):
    """`top_k` documents a query; what is longer than `max_document_chars` is cut."""

    endpoints: list[str] = field(default_factory=lambda: ["http://127.0.0.1:8000/retrieve"])
    top_k: int = 3
    max_queries: int = 4  # of one turn
    max_query_chars: int = 512
    max_document_chars: int = 2000

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("top_k", "max_queries", "max_query_chars", "max_document_chars"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more")


class SearchTool(ToolBase):
    """A retriever that is asked between `query_tags`; its documents come back as raw text, in the middle of the model's
    turn, not as a message. A retriever that fails is an error in the documents' place."""

    query_tags: ClassVar[tuple[str, str]]
    document_tags: ClassVar[tuple[str, str]]
    config: SearchConfig

    def __init__(self, name: Any = None, description: Any = None, parameters: Any = None, **kwargs: Any) -> None:
        super().__init__(name, description, parameters, **kwargs)
        self.service = service_of(self.config)

    def execute(self, action_string: str, **kwargs: Any) -> tuple[Any, float, bool, dict[str, Any]]:
        """Documents of every query of the turn; a turn that answers, or asks nothing, ends the episode."""
        queries = [query.strip() for query in between(action_string, *self.query_tags)]
        if not queries or last_tagged(action_string, "answer") is not None:
            return None, 0.0, True, {}
        try:
            self._check(queries)
            found = self.service.post(self.request(queries), lambda response: self._read(response, len(queries)))
        except EnvError as error:
            return self.framed(f"Error: {error}\n"), 0.0, False, {"error": str(error)}
        return self.framed("".join(map(self._listed, found))), 0.0, False, {}

    def request(self, queries: list[str]) -> dict[str, Any]:
        """What the retriever is sent."""
        raise NotImplementedError

    def documents(self, answer: Any) -> list[list[str]]:
        """The retriever's JSON -> the documents of every query. May raise what a malformed answer leads to."""
        raise NotImplementedError

    def line(self, number: int, document: str) -> str:
        """One document as the model reads it; numbers count from 1."""
        raise NotImplementedError

    def framed(self, text: str) -> str:
        """The whole observation around its documents."""
        raise NotImplementedError

    def _check(self, queries: Sequence[str]) -> None:
        if not all(queries):
            raise EnvError("the query is empty")
        if len(queries) > self.config.max_queries:
            raise EnvError(f"{len(queries)} queries at once; at most {self.config.max_queries}")
        longest = max(map(len, queries))
        if longest > self.config.max_query_chars:
            raise EnvError(f"the query has {longest} characters; at most {self.config.max_query_chars}")

    def _read(self, response: httpx.Response, num_queries: int) -> list[list[str]]:
        found = self.documents(response.json())
        if len(found) != num_queries:
            raise ValueError(f"{len(found)} answers to {num_queries} queries")
        return [documents[: self.config.top_k] for documents in found]

    def _listed(self, documents: list[str]) -> str:
        limit, tags = self.config.max_document_chars, (*self.query_tags, *self.document_tags)
        lines = [self.line(number, quoted(text, limit, tags)) for number, text in enumerate(documents, start=1)]
        return "".join(f"{line}\n" for line in lines or [NO_DOCUMENTS])
