"""Questions to a retriever in the protocol of R1-Searcher (arXiv 2503.05592).

The retriever takes `{"queries": [...], "k": 3}` and gives `{"answers": [["12 a document", ...], ...]}`, a list for every
query; the number before a document, its place in the corpus, is not shown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from megatron_agent.envs.search import SearchConfig, SearchTool

CORPUS_NUMBER = re.compile(r"^\d+\s+")


class RagV2(SearchTool):
    """`<|begin_of_query|>keywords<|end_of_query|>` brings numbered lines between `<|begin_of_documents|>` and its end."""

    name = "rag_v2"
    stop: ClassVar[tuple[str, ...]] = ("<|end_of_query|>",)
    query_tags = ("<|begin_of_query|>", "<|end_of_query|>")
    document_tags = ("<|begin_of_documents|>", "<|end_of_documents|>")

    @dataclass
    class Config(SearchConfig):
        """The retriever and how much of it is shown."""

        endpoints: list[str] = field(default_factory=lambda: ["http://127.0.0.1:8000/queries"])

    def request(self, queries: list[str]) -> dict[str, Any]:
        return {"queries": queries, "k": self.config.top_k}

    def documents(self, answer: Any) -> list[list[str]]:
        return [[CORPUS_NUMBER.sub("", document).strip() for document in found] for found in answer["answers"]]

    def line(self, number: int, document: str) -> str:
        return f"({number}){document}"

    def framed(self, text: str) -> str:
        start, end = self.document_tags
        return f"\n{start}\n{text}{end}\n"


COMPONENT = RagV2
