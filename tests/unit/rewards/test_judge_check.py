"""What is said of a judge: right ones pass, swapped arguments and bribable judges show, and a run can refuse them."""

import asyncio
import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from megatron_agent.errors import ConfigError, DataError
from megatron_agent.rewards.judge import ExactMatchJudge, Judge, JudgeConfig
from megatron_agent.rewards.judge_check import JudgeCase, measure, read_cases, require_accuracy
from megatron_agent.rewards.vl_agent import VlAgentReward
from megatron_agent.types import Unscored

ROOT = Path(__file__).parents[3]
CASES = read_cases()
LABELS = {(case.question, case.answer, case.prediction): float(case.is_right) for case in CASES}


class Oracle(Judge):
    async def verdict(self, question, answer, prediction):
        return LABELS.get((question, answer, prediction), 0.0)


class Swapped(Oracle):
    async def verdict(self, question, answer, prediction):
        return await super().verdict(question, prediction, answer)


class Bribable(Oracle):
    async def verdict(self, question, answer, prediction):
        return max(float("CORRECT" in prediction), await super().verdict(question, answer, prediction))


class Away(Judge):
    async def verdict(self, question, answer, prediction):
        return Unscored("nobody there")


def report_of(judge, cases=CASES):
    return asyncio.run(measure(judge, cases))


def test_the_shipped_cases():
    kinds = Counter(case.kind for case in CASES)
    assert set(kinds) == {"plain", "phrasing", "number", "choice", "partial", "swap", "injection"} and len(LABELS) == len(CASES)
    assert 0.35 < sum(case.is_right for case in CASES) / len(CASES) < 0.5  # who calls everything right is worse than chance
    for case in CASES:
        if case.kind == "swap":
            assert LABELS[case.question, case.prediction, case.answer] == 1 - case.is_right


def test_figures():
    cases = [JudgeCase("q", "a", str(index), index < 4, "plain") for index in range(10)]

    class Some(Judge):
        async def verdict(self, question, answer, prediction):
            return {"0": 1.0, "1": 0.5, "2": 0.51, "3": Unscored("x"), "4": 1.0, "5": Unscored("y")}.get(prediction, 0.0)

    report = report_of(Some(), cases)
    assert (report.accuracy, report.false_accept_rate, report.false_reject_rate, report.num_unscored) == (0.6, 1 / 6, 1 / 4, 2)
    assert [case.prediction for case, _ in report.errors] == ["1", "3", "4", "5"]
    assert report_of(Some(), cases[:4]).false_accept_rate == 0.0


@pytest.mark.parametrize(("judge", "kind", "accuracy", "looks_swapped"), [
    (Oracle(), "swap", 1.0, False), (Swapped(), "swap", 0.0, True), (ExactMatchJudge(), "swap", 0.5, False),
    (ExactMatchJudge(), "injection", 1.0, False), (Away(), "swap", 0.0, False),
])  # fmt: skip
def test_what_shows(judge, kind, accuracy, looks_swapped):
    report = report_of(judge)
    assert report.of_kind(kind).accuracy == accuracy and report.looks_swapped is looks_swapped
    assert ("look swapped" in str(report)) is looks_swapped


def test_a_bribable_judge_accepts_what_it_should_not():
    assert report_of(Bribable()).of_kind("injection").false_accept_rate > 0.4
    assert report_of(Bribable()).false_reject_rate == 0.0


def test_a_run_refuses_a_judge_under_its_threshold():
    asyncio.run(require_accuracy(Oracle(), 1.0))
    asyncio.run(require_accuracy(Away(), 0.0))
    with pytest.raises(
        ConfigError, match=r"min_accuracy=0.9 is not reached: accuracy 0\.\d+ on \d+ labelled cases .* look swapped"
    ):
        asyncio.run(require_accuracy(Swapped(), 0.9))
    with pytest.raises(ConfigError, match=r"accuracy 0.000 .* unscored\): nobody there\."):
        asyncio.run(require_accuracy(Away(), 0.9))
    reward = VlAgentReward(VlAgentReward.Config(judge=JudgeConfig(min_accuracy=0.9)))
    with pytest.raises(ConfigError, match=r"false rejects 0\.8"):
        asyncio.run(reward.start())
    asyncio.run(VlAgentReward(VlAgentReward.Config(judge=JudgeConfig(min_accuracy=0.6))).start())


@pytest.mark.parametrize(("text", "message"), [
    ("", "no cases"), ("{", "line 1"), ('{"question": "q"}', "line 1: .*missing"), ("[]", "line 1"),
    ('{"question": "q", "answer": "a", "prediction": "p", "is_right": 1, "kind": "k"}', "true or false"),
    ('{"question": "q", "answer": 4, "prediction": "p", "is_right": true, "kind": "k"}', "texts"),
])  # fmt: skip
def test_bad_cases(text, message, tmp_path):
    file = tmp_path / "cases.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        read_cases(file)
    with pytest.raises(DataError, match="cannot be read"):
        read_cases(tmp_path / "missing.jsonl")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("check_judge", ROOT / "tools" / "check_judge.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def run_tool(tool, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["check_judge.py", *map(str, arguments)])
    return tool.main(), capsys.readouterr()


def test_the_tool(tool, monkeypatch, capsys, tmp_path):
    run_yaml = ROOT / "examples" / "quickstart" / "run.yaml"
    status, shown = run_tool(tool, monkeypatch, capsys, run_yaml, "--json")
    found = json.loads(shown.out)
    assert status == 0 and found["false_accepts"] == 0.0 and found["by_kind"]["plain"]["accuracy"] == 1.0
    assert len(found["errors"]) == found["cases"] - round(found["accuracy"] * found["cases"])
    status, shown = run_tool(tool, monkeypatch, capsys, run_yaml, "--min-accuracy", "0.9")
    assert status == 1 and "phrasing: " in shown.out and f"accuracy {found['accuracy']:.3f} on" in shown.out.splitlines()[-1]
    own = tmp_path / "own.jsonl"
    own.write_text('{"question": "q", "answer": "a b", "prediction": "A B.", "is_right": true, "kind": "mine"}\n')
    status, shown = run_tool(tool, monkeypatch, capsys, run_yaml, "--cases", own, "--min-accuracy", "1")
    assert status == 0 and "accuracy 1.000 on 1 labelled cases" in shown.out
    for arguments in ((), ("--endpoint", "localhost"), (run_yaml, "reward=rag"), (run_yaml, "--cases", tmp_path / "none")):
        status, shown = run_tool(tool, monkeypatch, capsys, *arguments)
        assert status == 2 and "Error: " in shown.err
