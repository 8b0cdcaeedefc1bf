"""What the text examples prepare: read as a run reads it, and every script played through its real tool; the retriever is
the real server. Few rows; not covered: that a model learns from it (the examples' READMEs say what was measured)."""

import json
import socket
import threading
import time

import pyarrow.parquet as pq
import pytest
import uvicorn
from fastapi.testclient import TestClient

from examples import tiny_text
from examples.frozenlake import prepare_data as lake
from examples.rag import prepare_data as rag
from examples.rag.retriever_server import Index, make_app
from megatron_agent.config import load
from megatron_agent.data.dataset import read_tasks
from megatron_agent.data.images import ImageStore
from megatron_agent.envs.base import make_session
from megatron_agent.models.qwen2 import Qwen2

EXAMPLES = {"rag": rag, "frozenlake": lake}
SIZES = {
    "rag": {"WARMUP_ROWS": {"home": 12, "town": 6}, "FIRST": rag.FIRST[:6], "LAST": rag.LAST[:4]},
    "frozenlake": {"WARMUP_ROWS": 12, "TRAIN_ROWS": 10, "HELDOUT_ROWS": 8},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Name of an example -> the folder that its prepare_data.py makes, with few rows."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in EXAMPLES.items():
            for key, value in SIZES[name].items():
                patch.setattr(module, key, value)
            folders[name] = tmp_path_factory.mktemp(name) / "seed3"
            assert tiny_text.prepare(folders[name], 3, [], module.write_all)
    return folders


@pytest.fixture(scope="module")
def index(made):
    return Index(made["rag"] / "corpus.jsonl")


def tasks_of(name, folder, file, store, **options):
    config = load(f"examples/{name}/run.yaml")
    tasks, report = read_tasks([folder / f"{file}.parquet"], config.data, store, **options)
    assert report.num_bad == 0 and set(report.by_env) == {tasks[0].env_name}
    return config, tasks


@pytest.mark.parametrize("name", EXAMPLES)
def test_rows_are_read_and_their_prompts_are_short(name, made, tmp_path):
    store = ImageStore(tmp_path, load(f"examples/{name}/run.yaml").data.pixel_limits())
    family = Qwen2(made[name] / "model")
    renderer = family.renderer(str(made[name] / "model"))
    prompts = {}
    for file in ("warmup", "train", "heldout"):
        config, tasks = tasks_of(name, made[name], file, store, require_script=file == "warmup")
        assert all(bool(task.script) == (file == "warmup") and not task.images for task in tasks)
        prompts[file] = {str(task.messages) for task in tasks}
        rows = [renderer.prompt(task.messages, []) for task in tasks]
        assert max(map(len, rows)) < 60 and max(map(max, rows)) < family.text.vocab_size
    assert config.env.keys() == {tasks[0].env_name} and not prompts["heldout"] & (prompts["train"] | prompts["warmup"])


def test_every_word_is_one_token(made):
    renderer = Qwen2(made["rag"] / "model").renderer(str(made["rag"] / "model"))
    assert len(renderer.encode(rag.query("Mira Olsen lives"))) == 5 and len(renderer.encode(rag.answer("cheese"))) == 3
    assert len(renderer.encode(rag.HOME_QUESTION.format("Nadia Kaya"))) == 10
    renderer = Qwen2(made["frozenlake"] / "model").renderer(str(made["frozenlake"] / "model"))
    assert len(renderer.encode(lake.turn("F", "H", "right"))) == 9


def test_the_same_seed_makes_the_same_files_and_finished_ones_are_kept(made, tmp_path):
    again = tmp_path / "seed3"
    with pytest.MonkeyPatch.context() as patch:
        for key, value in SIZES["frozenlake"].items():
            patch.setattr(lake, key, value)
        assert tiny_text.prepare(again, 3, [], lake.write_all) and not tiny_text.prepare(again, 3, [], lake.write_all)
        for file in sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file()):
            assert (again / file).read_bytes() == (made["frozenlake"] / file).read_bytes(), file
        assert tiny_text.prepare(again, 4, [], lake.write_all)
    assert pq.read_table(again / "train.parquet") != pq.read_table(made["frozenlake"] / "train.parquet")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(SystemExit, match="not ours"):
        tiny_text.prepare(tmp_path / "mine", 3, [], lake.write_all)


def test_walks_end_with_their_game(made, tmp_path):
    store = ImageStore(tmp_path, load("examples/frozenlake/run.yaml").data.pixel_limits())
    config, tasks = tasks_of("frozenlake", made["frozenlake"], "warmup", store, require_script=True)
    ends = set()
    for task in tasks:
        session = make_session("frozenlake", config.env, store, store.limits)
        session.reset(task)
        assert lake.show(session.tool.cells()) in task.messages[1]["content"]  # the map that is shown is the one played
        results = [session.step(turn) for turn in task.script]
        assert [result.done for result in results] == [False] * (len(task.script) - 1) + [True]
        ends.add(results[-1].reward)
    assert ends == {0.0, 1.0} and max(len(task.script) for task in tasks) <= config.agent.max_turns


@pytest.fixture(scope="module")
def retriever(index):
    """The server as its command runs it, on a free port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(make_app(index), port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}/queries"
    server.should_exit = True
    thread.join(10)


def test_scripts_find_what_they_say(made, retriever, tmp_path):
    store = ImageStore(tmp_path, load("examples/rag/run.yaml").data.pixel_limits())
    config, tasks = tasks_of("rag", made["rag"], "warmup", store, require_script=True)
    config.env["rag_v2"].endpoints = [retriever]
    right = []
    for task in tasks:
        session = make_session("rag_v2", config.env, store, store.limits)
        session.reset(task)
        *searches, last = task.script
        found = [session.step(turn).rendered_text.split("\n")[2] for turn in searches]
        assert session.step(last).done and all(turn.endswith(session.tool.stop) for turn in searches)
        right.append(rag.answer(task.ground_truth) == last)
        if len(searches) == 2 or (task.question.endswith("famous for?") and "home" not in task.question):
            assert right[-1] and found[-1].endswith(f"is famous for {task.ground_truth}.")
        else:
            assert " lives in " in found[0]
    assert 0 < sum(right) < len(right)  # some scripts guess


def test_the_retriever_speaks_both_protocols(index):
    client = TestClient(make_app(index))
    fact = next(text for text in index.contents if " lives in " in text)
    words = " ".join(fact.split()[:3])
    answer = client.post("/queries", json={"queries": [words, "zzz"], "k": 2}).json()
    assert answer["queries"] == [words, "zzz"] and answer["answers"][1] == []
    assert answer["answers"][0][0] == f"{index.contents.index(fact)} {fact}" and len(answer["answers"][0]) == 2
    (found,) = client.post("/retrieve", json={"queries": [words], "topk": 1, "return_scores": True}).json()["result"]
    assert found[0]["document"] == {"contents": fact} and found[0]["score"] > 0
    for bad in ({}, {"queries": "x"}, {"queries": ["x"], "k": 0}):
        assert client.post("/queries", json=bad).status_code == 422


def test_a_corpus_with_titles(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    rows = [{"title": "Tolo", "text": "A town."}, {"text": "Mira sings."}]
    corpus.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    index = Index(corpus)
    assert index.contents == ["Tolo\nA town.", "Mira sings."] and index.search(["tolo"], 9)[0][0][0] == 0
