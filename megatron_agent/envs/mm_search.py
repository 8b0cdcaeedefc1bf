"""Search the web and look at its pages: DeepEyes' multimodal search, with a service in place of a browser in the tool.

The service takes POST `/search` `{"query": ..., "k": 5}` and gives `{"results": [{...}, ...]}`, any JSON objects (title,
link, text); POST `/browse` `{"url": ...}` gives a screenshot of the page, the bytes of a picture.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_agent.envs.base import ToolBase
from megatron_agent.envs.functional import between, last_tagged
from megatron_agent.envs.service import ServiceConfig, is_web_address, quoted, service_of
from megatron_agent.errors import ConfigError, EnvError

if TYPE_CHECKING:
    import httpx

SEARCH, BROWSE = ("<search>", "</search>"), ("<browse>", "</browse>")
MAX_SHOWN_ADDRESS_CHARS = 200


class MmSearch(ToolBase):
    """`<search>words</search>` brings `<search_result>`, `<browse>address</browse>` a screenshot in `<browse_result>`."""

    name = "mm_search"
    stop: ClassVar[tuple[str, ...]] = (SEARCH[1], BROWSE[1])

    @dataclass
    class Config(ServiceConfig):
        """`endpoints` are the service's addresses without `/search` and `/browse`."""

        endpoints: list[str] = field(default_factory=lambda: ["http://127.0.0.1:8000"])
        top_k: int = 5
        max_pages: int = 2  # of one turn
        max_query_chars: int = 512
        max_result_chars: int = 2000

        def __post_init__(self) -> None:
            super().__post_init__()
            self.endpoints = [endpoint.rstrip("/") for endpoint in self.endpoints]
            for name in ("top_k", "max_pages", "max_query_chars", "max_result_chars"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more")

    config: Config

    def __init__(self, name: Any = None, description: Any = None, parameters: Any = None, **kwargs: Any) -> None:
        super().__init__(name, description, parameters, **kwargs)
        self.service = service_of(self.config)

    def execute(self, action_string: str, **kwargs: Any) -> tuple[Any, float, bool, dict[str, Any]]:
        """Results of a search, or else screenshots; a turn that answers, or asks nothing, ends the episode."""
        queries, addresses = ([asked.strip() for asked in between(action_string, *tags)] for tags in (SEARCH, BROWSE))
        if not (queries or addresses) or last_tagged(action_string, "answer") is not None:
            return None, 0.0, True, {}
        if queries:
            return self._search(" ".join(queries))
        return self._browse(addresses)

    def _search(self, query: str) -> tuple[Any, float, bool, dict[str, Any]]:
        info: dict[str, Any] = {"tool_used": "search"}
        try:
            if not query.strip() or len(query) > self.config.max_query_chars:
                raise EnvError(f"a query has 1 to {self.config.max_query_chars} characters, this has {len(query.strip())}")
            results = self.service.post({"query": query, "k": self.config.top_k}, self._results, "/search")
            text = "\n".join(results) or "None"
        except EnvError as error:
            text = info["error"] = f"Error: {error}"
        return f"\n<search_result>\n{text}\n</search_result>\n", 0.0, False, info

    def _results(self, response: httpx.Response) -> list[str]:
        results = response.json()["results"][: self.config.top_k]
        if not all(isinstance(result, dict) for result in results):
            raise TypeError("a result is no JSON object")
        texts = [json.dumps(result, ensure_ascii=False, indent=2) for result in results]
        return [quoted(text, self.config.max_result_chars, ("</search_result>",)) for text in texts]

    def _browse(self, addresses: list[str]) -> tuple[Any, float, bool, dict[str, Any]]:
        """Pages that cannot be shown are named in the text; the others come with it."""
        info: dict[str, Any] = {"tool_used": "browse"}
        pages, pictures = [], []
        for address in addresses[: self.config.max_pages]:
            shown = quoted(address, MAX_SHOWN_ADDRESS_CHARS, ("</browse_result>",))
            try:
                pictures.append(self._screenshot(address))
                pages.append(f"Screenshot for website {shown}\n<image>")
            except EnvError as error:
                info["error"] = str(error)
                pages.append(f"Website {shown}\nError: {error}")
        if len(addresses) > self.config.max_pages:
            pages.append(f"Error: at most {self.config.max_pages} websites at once")
        text = "\n<browse_result>\n" + "\n\n".join(pages) + "\n</browse_result>\n"
        return {"prompt": text, "multi_modal_data": {"image": pictures}}, 0.0, False, info

    def _screenshot(self, address: str) -> bytes:
        if not is_web_address(address):
            raise EnvError("give an address that begins with http:// or https://")
        return self.service.post({"url": address}, _picture, "/browse")


def _picture(response: httpx.Response) -> bytes:
    if not response.headers.get("content-type", "").startswith("image/"):
        raise ValueError(f"{response.headers.get('content-type')} is no picture")
    return response.content


COMPONENT = MmSearch
