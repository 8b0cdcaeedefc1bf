"""Is this data fit to train on: rows, pictures, prompt lengths, tools and sources, and every bad row by name.

    python tools/check_data.py FILES [--model DIR] [--set max_bad_rows=0.05 max_prompt_tokens=8192 ...]
        [--histogram check_data.png] [--json FILE] [--store DIR]

FILES are .parquet or .jsonl; `--set` takes options of the section `data:`. With `--model`, the folder of a Hugging Face
checkpoint, prompts are rendered and counted as in a run, pictures included. Nothing is kept of the pictures, unless `--store`
names the folder of a run's (`data.image_dir`, or `.images` below output_dir): the run then starts without decoding them.
Exit code 0: fit. 1: too many bad rows (data.max_bad_rows), or no prompt within data.max_prompt_tokens. 2: a file, a column, a
tool or an option that cannot be.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_agent import registry
from megatron_agent.config import apply_override
from megatron_agent.data.dataset import DataConfig, DatasetReport, check_report, in_order, scan
from megatron_agent.data.images import PATCH_SIDE_PX, ImageStore
from megatron_agent.errors import ConfigError, DataError
from megatron_agent.options import build
from megatron_agent.types import Task

NAMED = 20  # bad rows and long prompts on the console; --json has all


class NoStore(ImageStore):
    """Pictures are checked and forgotten."""

    def _write(self, path: Path, data: bytes) -> None:
        pass


@dataclass
class Findings:
    """Of all files; `series` are the numbers behind the table and the histograms, one a row or one a picture."""

    reports: dict[str, DatasetReport] = field(default_factory=dict)
    series: dict[str, list[int]] = field(default_factory=dict)
    long_prompts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def count(self, name: str) -> dict[str, int]:
        total: dict[str, int] = {}
        for report in self.reports.values():
            for key, number in getattr(report, name).items():
                total[key or "(none)"] = total.get(key or "(none)", 0) + number
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    def spread(self, name: str) -> dict[str, int]:
        values = self.series[name]
        return dict(zip(("min", "median", "p99", "max"), map(int, np.percentile(values, (0, 50, 99, 100))))) if values else {}


def check(options: argparse.Namespace, config: DataConfig, store: ImageStore) -> Findings:
    found = Findings()
    tasks: list[Task] = []
    for file in options.files:
        of_file, found.reports[file] = scan([file], config, store, options.env_key, meta_key=options.meta_key)
        tasks += of_file
        try:
            check_report(found.reports[file], config.max_bad_rows, [file])
        except DataError as error:
            found.problems.append(f"{file}: {str(error).splitlines()[0]}")
    refs = [ref for task in tasks for ref in task.images]
    sizes_px = [store.original_size_px(ref.source) for ref in refs]
    found.series = {
        "pictures a row": [len(task.images) for task in tasks],
        "picture's long side, px": [max(size) for size in sizes_px],
        "picture's short side, px": [min(size) for size in sizes_px],
        "tokens a picture": [ref.width_px * ref.height_px // PATCH_SIDE_PX**2 for ref in refs],
    }
    if options.model:
        renderer = registry.resolve("models", options.family)(options.model).renderer(options.model)
        counts = list(in_order(lambda task: len(renderer.prompt(task.messages, task.images)), tasks, config.num_workers))
        found.series["tokens a prompt"] = counts
        limit = config.max_prompt_tokens or max(counts, default=0)
        found.long_prompts = [f"{task.task_id} ({n} tokens)" for task, n in zip(tasks, counts) if n > limit]
        if tasks and len(found.long_prompts) == len(tasks):
            found.problems.append(f"no prompt has at most data.max_prompt_tokens={limit} tokens")
    return found


def show(found: Findings, console: Console) -> None:
    files = Table("file", "MB", "rows", "bad", "pictures under 28 px")
    files.columns[0].overflow = "fold"
    for file, report in found.reports.items():
        size = f"{Path(file).stat().st_size / 1e6:,.1f}"
        files.add_row(escape(file), size, f"{report.num_rows:,}", f"{report.num_bad:,}", f"{report.num_upscaled:,}")
    spreads = Table("", "min", "median", "99%", "max")
    for name in found.series:
        spreads.add_row(name, *(f"{number:,}" for number in found.spread(name).values()))
    counts = Table("usable rows by", "", "rows")
    for title, name in (("tool", "by_env"), ("source", "by_source")):
        for key, number in found.count(name).items():
            counts.add_row(title, escape(key), f"{number:,}")
            title = ""
    for table in (files, spreads, counts):
        for column in table.columns[1:]:
            column.justify = "left" if column.header == "" else "right"
        console.print(table)
    bad_rows = [name for report in found.reports.values() for name in report.bad_rows]
    for title, names in (("bad rows", bad_rows), ("prompts that are too long", found.long_prompts)):
        if names:
            console.print(f"[bold]{len(names):,} {title}[/bold]")
            console.print("\n".join(f"  {escape(name)}" for name in names[:NAMED]), highlight=False, soft_wrap=True)
            if len(names) > NAMED:
                console.print(f"  ... and {len(names) - NAMED:,} more (--json)")
    for problem in found.problems:
        console.print(f"[red]{escape(problem)}[/red]", highlight=False)
    console.print("[red]not fit[/red]" if found.problems else "[green]fit[/green]")


def draw(found: Findings, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in found.series if name != "picture's short side, px" and found.series[name]]
    figure, panels = plt.subplots(1, len(names) + 1, figsize=(4 * len(names) + 4, 3.4), layout="constrained")
    for axes, name in zip(panels, names):
        most = max(found.series[name])
        axes.hist(found.series[name], bins=40 if most > 20 else np.arange(most + 2) - 0.5)
        axes.set_xlabel(name)
        axes.set_ylabel("rows" if name.endswith(("row", "prompt")) else "pictures")
        axes.grid(alpha=0.3)
    sources = list(found.count("by_source").items())[:12][::-1]
    panels[-1].barh([name for name, _ in sources], [number for _, number in sources])
    panels[-1].set_xlabel("rows by source")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def as_json(found: Findings) -> str:
    tree = {
        "files": {file: {"bytes": Path(file).stat().st_size, **asdict(report)} for file, report in found.reports.items()},
        "spreads": {name: found.spread(name) for name in found.series},
        "long_prompts": found.long_prompts,
        "problems": found.problems,
    }
    return json.dumps(tree, indent=1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--model", help="folder whose tokenizer and chat template count prompt tokens")
    parser.add_argument("--family", default="qwen2_5_vl")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="options of the section data:")
    parser.add_argument("--env-key", default="env_name", help="column that names the tool (agent.tool_name_key)")
    parser.add_argument("--meta-key", default="extra_info", help="column of further facts (agent.tool_meta_key)")
    parser.add_argument("--histogram", type=Path, help="a picture of the distributions")
    parser.add_argument("--json", type=Path, help="everything found, all bad rows included")
    parser.add_argument("--store", type=Path, help="keep the pictures here, for a run to use")
    options = parser.parse_args(arguments)
    tree: dict = {}
    with tempfile.TemporaryDirectory() as nowhere:
        try:
            for item in options.set:
                apply_override(tree, item)
            config = build(DataConfig, tree, "data")
            store = (ImageStore if options.store else NoStore)(options.store or nowhere, config.pixel_limits())
            found = check(options, config, store)
        except (ConfigError, DataError) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 2
    if options.store:
        store.save_sizes()
    if options.histogram:
        draw(found, options.histogram)
    if options.json:
        options.json.write_text(as_json(found))
    show(found, Console())
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
