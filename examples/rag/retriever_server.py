"""A BM25 retriever over HTTP: `python -m examples.rag.retriever_server --corpus data/rag/seed0/corpus.jsonl --port 8018`.

POST /queries `{"queries": [...], "k": 3}` -> `{"queries": [...], "answers": [["12 a document", ...], ...]}`, what R1-Searcher
(env `rag_v2`) asks; POST /retrieve `{"queries": [...], "topk": 3}` -> `{"result": [[{"document": {"contents": ...}, "score":
...}]]}`, what Search-R1 (env `rag`) asks. A document without a word of the query is not returned. The corpus is JSON lines
with `text` and, optionally, `title`.
"""

import argparse
import json
from pathlib import Path

import bm25s
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, Field


class Index:
    """BM25 over the documents of a corpus file."""

    def __init__(self, corpus: Path) -> None:
        with corpus.open() as lines:
            rows = [json.loads(line) for line in lines if line.strip()]
        self.contents = [f"{row['title']}\n{row['text']}" if row.get("title") else row["text"] for row in rows]
        self.bm25 = bm25s.BM25()
        self.bm25.index(self._tokens(self.contents), show_progress=False)

    def search(self, queries: list[str], k: int) -> list[list[tuple[int, float]]]:
        """Of every query the `k` best (document, score), best first, those of score 0 left out."""
        k = min(k, len(self.contents))
        documents, scores = self.bm25.retrieve(self._tokens(queries), k=k, show_progress=False, n_threads=0)
        rows = zip(documents.tolist(), scores.tolist(), strict=True)
        return [[(d, s) for d, s in zip(*row, strict=True) if s > 0] for row in rows]

    @staticmethod
    def _tokens(texts: list[str]) -> list[list[str]]:
        return bm25s.tokenize(texts, stopwords=None, return_ids=False, show_progress=False)


class R1SearcherRequest(BaseModel):
    queries: list[str]
    k: int = Field(3, ge=1)


class SearchR1Request(BaseModel):
    queries: list[str]
    topk: int = Field(3, ge=1)
    return_scores: bool = True


def make_app(index: Index) -> FastAPI:
    """Both protocols over one index. Requests are answered on the event loop: each takes well under a millisecond."""
    app = FastAPI()

    @app.post("/queries")
    async def queries(request: R1SearcherRequest) -> dict:
        found = index.search(request.queries, request.k)
        answers = [[f"{number} {index.contents[number]}" for number, _ in documents] for documents in found]
        return {"queries": request.queries, "answers": answers}

    @app.post("/retrieve")
    async def retrieve(request: SearchR1Request) -> dict:
        found = index.search(request.queries, request.topk)
        items = [[{"document": {"contents": index.contents[n]}, "score": score} for n, score in found_] for found_ in found]
        return {"result": items if request.return_scores else [[item["document"] for item in row] for row in items]}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8018)
    args = parser.parse_args()
    uvicorn.run(make_app(Index(args.corpus)), host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
