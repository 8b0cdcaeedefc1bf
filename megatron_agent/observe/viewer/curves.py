"""The curves of a run as one picture: reward, accuracy, tool use and IoU over steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_agent.observe.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

PANELS = (  # title, metric, is it a fraction
    ("Reward", "reward", False),
    ("Accuracy", "accuracy", True),
    ("Tool use", "tool_rate", True),
    ("IoU of the looked-at region", "iou", True),
)
TRAIN_COLOR = "#2563eb"
EVAL_STYLES = (("#ea580c", "o"), ("#16a34a", "s"), ("#9333ea", "D"))
INK, FAINT = "#1f2937", "#9ca3af"

Series = tuple[list[int], list[float]]  # steps, values


def draw_curves(metrics_path: Path, out_png: Path, title: str) -> None:
    """Draw a metrics.jsonl as a 2 x 2 figure: training as lines, every phase named eval* as marked points.

    A thin line is the raw value, the thick one its running mean. A panel without numbers says so.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = read_metrics(metrics_path)
    eval_phases = sorted({row["phase"] for row in rows if row["phase"].startswith("eval")})
    figure = Figure(figsize=(11, 7), dpi=130, facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12))
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=15, fontweight="bold", color=INK)
    panels = figure.subplots(2, 2, sharex=True)
    for axes, (name, metric, is_fraction) in zip(panels.flat, PANELS, strict=True):
        _draw_panel(axes, rows, eval_phases, name, metric, is_fraction)
    for axes in panels[1]:
        axes.set_xlabel("step", color=INK)
    handles: dict[str, Artist] = {}
    for axes in panels.flat:
        lines, labels = axes.get_legend_handles_labels()
        handles.update(zip(labels, lines, strict=True))
    if handles:
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=len(handles), frameon=False)
    Path(out_png).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png)


def _draw_panel(axes: Axes, rows: list[dict], eval_phases: list[str], name: str, metric: str, is_fraction: bool) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.set_title(name, loc="left", fontsize=12, color=INK)
    axes.grid(True, color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, length=0, labelbottom=True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    if is_fraction:
        axes.set_ylim(-0.03, 1.03)
    if is_fraction and metric != "iou":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    steps, values = series(rows, "train", metric)
    if steps:
        window = max(1, len(values) // 20)
        if window > 1:
            axes.plot(steps, values, color=TRAIN_COLOR, linewidth=0.9, alpha=0.3)
        label = f"training, mean of {window} steps" if window > 1 else "training"
        axes.plot(steps, running_mean(values, window), color=TRAIN_COLOR, linewidth=2, label=label)
    has_points = False
    for phase, (color, marker) in zip(eval_phases, EVAL_STYLES, strict=False):
        eval_steps, eval_values = series(rows, phase, metric)
        if eval_steps:
            has_points = True
            label = "held-out evaluation" + phase.removeprefix("eval").replace("_", " ")
            axes.plot(eval_steps, eval_values, marker, color=color, ms=7, mec="white", label=label, zorder=3)
    if not steps and not has_points:
        axes.text(0.5, 0.5, "no numbers", transform=axes.transAxes, ha="center", va="center", color=FAINT)


def series(rows: list[dict], phase: str, metric: str) -> Series:
    """The steps and values of one metric, by step; of a step that was done twice (after a resume) the later counts."""
    points = {row["step"]: row[metric] for row in rows if row["phase"] == phase and row.get(metric) is not None}
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def running_mean(values: list[float], window: int) -> list[float]:
    """The mean of each value and the up to `window - 1` before it."""
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        means.append(sum(recent) / len(recent))
    return means
