"""Questions to a retriever in the protocol of Search-R1 (arXiv 2503.09516): `<search>` out, `<information>` back.

The retriever takes `{"queries": [...], "topk": 3, "return_scores": true}` and gives
`{"result": [[{"document": {"contents": "title\\ntext"}, "score": 1.0}, ...], ...]}`, a list for every query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_agent.envs.search import SearchConfig, SearchTool


class Rag(SearchTool):
    """`<search>query</search>` brings `<information>Doc 1(Title: ...) text ...</information>`."""

    name = "rag"
    stop: ClassVar[tuple[str, ...]] = ("</search>",)
    query_tags = ("<search>", "</search>")
    document_tags = ("<information>", "</information>")

    @dataclass
    class Config(SearchConfig):
        """The retriever and how much of it is shown."""

    def request(self, queries: list[str]) -> dict[str, Any]:
        return {"queries": queries, "topk": self.config.top_k, "return_scores": True}

    def documents(self, answer: Any) -> list[list[str]]:
        return [[_text(item["document"]["contents"]) for item in found] for found in answer["result"]]

    def line(self, number: int, document: str) -> str:
        title, _, text = document.partition("\n")
        return f"Doc {number}(Title: {title}) {text}"

    def framed(self, text: str) -> str:
        return f"\n\n<information>{text}</information>\n\n"


def _text(contents: Any) -> str:
    if not isinstance(contents, str):
        raise TypeError(f"contents is a {type(contents).__name__}, not a text")
    return contents


COMPONENT = Rag
