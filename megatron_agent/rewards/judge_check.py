"""How good a judge is on labelled cases: before a run, which can refuse it, and for tools/check_judge.py."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_agent.errors import ConfigError, DataError
from megatron_agent.rewards.judge import Judge
from megatron_agent.types import Unscored

CASES_FILE = Path(__file__).with_name("judge_cases.jsonl")
RIGHT_ABOVE = 0.5
SWAP_KIND = "swap"  # pairs in which reference and prediction change places, and with them the label


@dataclass(frozen=True)
class JudgeCase:
    """`is_right`: the label. `kind` says what it tries: plain, phrasing, number, choice, partial, swap, injection."""

    question: str
    answer: str
    prediction: str
    is_right: bool
    kind: str


@dataclass(frozen=True)
class JudgeReport:
    """What a judge said to every case. Unscored ones count as errors of neither sort, but not as right."""

    cases: Sequence[JudgeCase]
    verdicts: Sequence[float | Unscored]

    @property
    def accuracy(self) -> float:
        return sum(map(_agrees, self.cases, self.verdicts)) / len(self.cases)

    @property
    def false_accept_rate(self) -> float:
        """Of the wrong predictions, the share that it called right: what a policy learns to exploit."""
        return self._error_rate(is_right=False)

    @property
    def false_reject_rate(self) -> float:
        """Of the right predictions, the share that it called wrong."""
        return self._error_rate(is_right=True)

    @property
    def num_unscored(self) -> int:
        return sum(isinstance(verdict, Unscored) for verdict in self.verdicts)

    def of_kind(self, kind: str) -> JudgeReport:
        chosen = [(case, verdict) for case, verdict in zip(self.cases, self.verdicts, strict=True) if case.kind == kind]
        return JudgeReport([case for case, _ in chosen], [verdict for _, verdict in chosen])

    @property
    def errors(self) -> list[tuple[JudgeCase, float | Unscored]]:
        return [(case, said) for case, said in zip(self.cases, self.verdicts, strict=True) if not _agrees(case, said)]

    @property
    def looks_swapped(self) -> bool:
        """Worse than chance where only the places of reference and prediction tell right from wrong."""
        swaps = self.of_kind(SWAP_KIND)
        return bool(swaps.cases) and swaps.num_unscored == 0 and swaps.accuracy < 0.5

    def __str__(self) -> str:
        swapped = "; reference and prediction look swapped" if self.looks_swapped else ""
        return (
            f"accuracy {self.accuracy:.3f} on {len(self.cases)} labelled cases (false accepts {self.false_accept_rate:.3f}, "
            f"false rejects {self.false_reject_rate:.3f}, {self.num_unscored} unscored{swapped})"
        )

    def _error_rate(self, is_right: bool) -> float:
        said = [verdict for case, verdict in zip(self.cases, self.verdicts, strict=True) if case.is_right is is_right]
        errors = [not isinstance(verdict, Unscored) and (verdict > RIGHT_ABOVE) is not is_right for verdict in said]
        return sum(errors) / len(errors) if errors else 0.0


def _agrees(case: JudgeCase, verdict: float | Unscored) -> bool:
    return not isinstance(verdict, Unscored) and (verdict > RIGHT_ABOVE) is case.is_right


def read_cases(file: str | Path = CASES_FILE) -> list[JudgeCase]:
    """JSON lines with the fields of JudgeCase. Raises DataError naming file and line."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    cases = []
    for number, line in enumerate(lines, 1):
        try:
            case = JudgeCase(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise DataError(f"{file}: line {number}: {error}") from error
        if not isinstance(case.is_right, bool) or not all(
            isinstance(text, str) for text in (case.question, case.answer, case.prediction, case.kind)
        ):
            raise DataError(f"{file}: line {number}: is_right must be true or false, and the other fields texts")
        cases.append(case)
    if not cases:
        raise DataError(f"{file}: no cases")
    return cases


async def measure(judge: Judge, cases: Sequence[JudgeCase]) -> JudgeReport:
    """Asks all cases at once; the judge bounds its own concurrency."""
    asked = (judge.verdict(case.question, case.answer, case.prediction) for case in cases)
    return JudgeReport(cases, await asyncio.gather(*asked))


async def require_accuracy(judge: Judge, min_accuracy: float) -> None:
    """Raises ConfigError, with the figures, where the judge is under `min_accuracy` on the shipped cases; 0 asks nothing."""
    if min_accuracy <= 0:
        return
    report = await measure(judge, read_cases())
    if report.accuracy >= min_accuracy:
        return
    reasons = {verdict.reason for verdict in report.verdicts if isinstance(verdict, Unscored)}
    why = f": {sorted(reasons)[0]}" if reasons else ""
    raise ConfigError(
        f"reward.judge.min_accuracy={min_accuracy:g} is not reached: {report}{why}. Give another judge, or a lower threshold; "
        f"python tools/check_judge.py shows every error"
    )
