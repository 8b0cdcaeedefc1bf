"""How often is a judge right? Asks it a labelled set and shows the errors.

    python tools/check_judge.py run.yaml [section.key=value ...]        # the judge of a run's reward
    python tools/check_judge.py --endpoint http://127.0.0.1:8000/v1 [--model NAME]
    [--cases FILE.jsonl] [--min-accuracy 0.9] [--json]

The set has plain cases and tries what goes wrong: phrasing, numbers, options, half answers, pairs in which reference and
prediction change places (a judge that mixes them up fails these), and predictions that instruct the judge. False accepts
are what a policy learns to exploit. Exit status 1 where accuracy is under --min-accuracy, 2 for mistakes in the arguments.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_agent.config import load
from megatron_agent.errors import ConfigError, MegatronAgentError
from megatron_agent.rewards.judge import JudgeConfig, make_judge
from megatron_agent.rewards.judge_check import CASES_FILE, JudgeReport, measure, read_cases
from megatron_agent.types import Unscored


def judge_config(options: argparse.Namespace) -> JudgeConfig:
    if options.endpoint:
        return JudgeConfig(kind="openai", endpoints=options.endpoint, model=options.model)
    if not options.config:
        raise ConfigError("give a run's config file or --endpoint")
    reward = load(options.config, options.overrides).reward
    if not hasattr(reward, "judge"):
        raise ConfigError(f"{options.config}: its reward has no judge")
    return reward.judge


async def ask(config: JudgeConfig, cases_file: Path) -> tuple[JudgeReport, float]:
    judge = make_judge(config)
    start = time.perf_counter()
    try:
        return await measure(judge, read_cases(cases_file)), time.perf_counter() - start
    finally:
        await judge.close()


def as_dict(report: JudgeReport, seconds: float) -> dict[str, object]:
    def figures(part: JudgeReport) -> dict[str, float]:
        return {
            "cases": len(part.cases), "accuracy": part.accuracy, "false_accepts": part.false_accept_rate,
            "false_rejects": part.false_reject_rate, "unscored": part.num_unscored,
        }  # fmt: skip

    kinds = dict.fromkeys(case.kind for case in report.cases)
    errors = [
        dataclasses.asdict(case) | {"said": said.reason if isinstance(said, Unscored) else said} for case, said in report.errors
    ]
    by_kind = {kind: figures(report.of_kind(kind)) for kind in kinds}
    return {
        **figures(report), "looks_swapped": report.looks_swapped, "seconds": round(seconds, 2), "by_kind": by_kind,
        "errors": errors,
    }  # fmt: skip


def show(report: JudgeReport, seconds: float) -> None:
    print(f"{'kind':<12}{'cases':>6}{'accuracy':>10}{'false accepts':>15}{'false rejects':>15}{'unscored':>10}")
    kinds = dict.fromkeys(case.kind for case in report.cases)
    for name, part in [*((kind, report.of_kind(kind)) for kind in kinds), ("all", report)]:
        rates = f"{part.accuracy:>10.3f}{part.false_accept_rate:>15.3f}{part.false_reject_rate:>15.3f}"
        print(f"{name:<12}{len(part.cases):>6}{rates}{part.num_unscored:>10}")
    for case, said in report.errors:
        verdict = said.reason if isinstance(said, Unscored) else "called right" if said > 0.5 else "called wrong"
        print(f"{case.kind}: {case.question!r}: reference {case.answer!r}, prediction {case.prediction!r}: {verdict}")
    if report.looks_swapped:
        print("The judge seems to take the prediction for the reference: its arguments are swapped.")
    print(f"{report}, {seconds:.1f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="")
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--endpoint", action="append", default=[])
    parser.add_argument("--model", default="")
    parser.add_argument("--cases", type=Path, default=CASES_FILE)
    parser.add_argument("--min-accuracy", type=float, default=0.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    try:
        report, seconds = asyncio.run(ask(judge_config(options), options.cases))
    except MegatronAgentError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    if options.json:
        print(json.dumps(as_dict(report, seconds), indent=1, ensure_ascii=False))
    else:
        show(report, seconds)
    return int(report.accuracy < options.min_accuracy)


if __name__ == "__main__":
    sys.exit(main())
