"""Is a Hugging Face checkpoint the same model in Megatron, in every layout? Measured against transformers.

    python tools/parity.py --hf DIR [--layouts tp2,pp2,tp2pp2,cp2,vpp2,dp2,tp2sp,tp2cp2sp] [--json FILE]

A layout's name joins degrees: tp2 (tensor), pp2 (pipeline), vpp2 (virtual pipeline; of pp2 unless it says pp), cp2 (context),
dp2 (data parallel), sp (sequence parallel, with tp); `one` is a single rank. Layers are dealt to the stages of a pipeline as
in a run: by their costs, unevenly. Each layout runs on real ranks over gloo, in fp32 on CPU, on rows with no, one and many
pictures (none for a text model), once packed (several rows a micro-batch) and once with one row a micro-batch. Compared
with transformers: the log-prob of every action token, the gradient of every tensor, the loss after Adam steps.

Exit status: 0, 1 past the limits or where a layout fails (it says which), 2 for input that cannot be used.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from _parity_ranks import (
    BETAS,
    CLIP,
    LR,
    WEIGHT_DECAY,
    RankError,
    RankResult,
    Ranks,
    Reference,
    family_of,
    in_process,
    make_rows,
    max_of,
    run_megatron,
    run_transformers,
)

from megatron_agent.errors import CheckpointError, ConfigError, MegatronAgentError
from megatron_agent.models.qwen2 import Qwen2
from megatron_agent.training.hf_export import HfLayout, check_against_table
from megatron_agent.training.layout import Layout, megatron_pieces
from megatron_agent.types import TrainSample

LOGPROB_LIMIT = 2e-5  # |difference| of every log-prob
GRADIENT_LIMIT = 1e-4  # of every tensor: max |difference| / max |transformers' gradient|
LOSS_LIMIT = 1e-5  # after the Adam steps: spread of the losses of all layouts, and of each to transformers'
DEFAULT_LAYOUTS = "one,tp2,pp2,dp2,cp2,tp2pp2,pp2vpp2,tp2sp,tp2cp2sp"
MIN_ROWS = 3  # no, one and many pictures

ENVIRONMENT = {  # of the processes that are started
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",  # CPU everywhere: the limits are those of fp32 without TF32
    "OMP_NUM_THREADS": "1",  # where torch is imported; every job sets its own
    "PYTHONWARNINGS": "ignore",  # Megatron's, about what is not installed
}
DEGREES = {
    "tp": "tensor_parallel",
    "pp": "pipeline_parallel",
    "vpp": "virtual_pipeline",
    "cp": "context_parallel",
    "dp": "data_parallel",
}


def parse_layout(name: str) -> Layout:
    """Raises ConfigError."""
    parts = re.findall(r"(vpp|tp|pp|cp|dp)(\d+)|(sp)", name)
    if name != "one" and (not parts or "".join(map("".join, parts)) != name):
        raise ConfigError(f"layout {name!r}: unknown; join degrees of {', '.join(DEGREES)} and sp, as in tp2pp2 or tp2cp2sp")
    options: dict[str, int | bool] = {}
    for axis, degree, flag in parts:
        key, value = ("sequence_parallel", True) if flag else (DEGREES[axis], int(degree))
        if key in options:
            raise ConfigError(f"layout {name!r}: {flag or axis} is given twice")
        options[key] = value
    if "virtual_pipeline" in options:
        options.setdefault("pipeline_parallel", 2)
    try:
        return Layout(**options)  # type: ignore[arg-type]
    except ConfigError as error:
        raise ConfigError(f"layout {name!r}: {error}") from error


def checked_layouts(names: str, family: Qwen2) -> dict[str, Layout]:
    """Name -> layout, with its layers dealt to the stages. Raises ConfigError for what is no layout, or none of this model."""
    layouts = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        layouts[name] = family.balanced(parse_layout(name))
        try:
            family.check(layouts[name])
        except ConfigError as error:
            raise ConfigError(f"layout {name!r}: {error}") from error
    if not layouts:
        raise ConfigError("--layouts names no layout")
    return layouts


def checked_family(path: Path) -> Qwen2:
    """Raises CheckpointError when the folder is no complete checkpoint of a known family."""
    family = family_of(path)
    check_against_table(path, HfLayout.of_folder(path).regions(path), family.table(Layout(), transformer_engine=False))
    return family


def rows_of(path: Path, family: Qwen2, count: int, seed: int) -> list[TrainSample]:
    """Text of random tokens of the tokenizer's vocabulary without added ones. Raises CheckpointError without tokenizer.json."""
    from tokenizers import Tokenizer

    file = path / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{path}: no tokenizer.json; the text of the rows is drawn from its vocabulary")
    tokenizer = Tokenizer.from_file(str(file))
    ids = set(tokenizer.get_vocab(with_added_tokens=False).values()) - set(tokenizer.get_added_tokens_decoder())
    ordinary = sorted(i for i in ids if i < family.text.vocab_size)
    around = tuple(family.hf_config.get(f"vision_{side}_token_id") for side in ("start", "end"))
    if family.image_token_id is not None and None in around:
        raise CheckpointError(f"{path / 'config.json'}: no vision_start_token_id or no vision_end_token_id")
    return make_rows(family, ordinary, around, count, seed)


# Comparison


class IncomparableError(Exception):
    """Numbers that ought to be there are not."""


@dataclass(frozen=True)
class Outcome:
    """One layout, packed or not, against transformers. `gradients`: HF tensor -> relative error."""

    layout: str
    packed: bool
    world_size: int
    stage_layers: tuple[int, ...]
    num_microbatches: int
    logprob_max: float
    logprob_mean: float
    gradient_max: float
    gradient_worst: str
    gradients: dict[str, float]
    losses: list[float]  # before every step and after the last
    loss_difference: float  # of the last, to transformers'
    seconds: float

    @property
    def title(self) -> str:
        return title(self.layout, self.packed)


def title(layout: str, packed: bool) -> str:
    return f"{layout} {'packed' if packed else 'not packed'}"


def merged(results: Sequence[RankResult], key: str, num_rows: int) -> list[list[float]]:
    """Log-probs in row order. Raises IncomparableError when a row is reported by no rank or by two."""
    reports = [(row, values) for result in results for row, values in getattr(result, key).items()]
    if sorted(row for row, _ in reports) != list(range(num_rows)):
        raise IncomparableError(f"rows {sorted(row for row, _ in reports)} were reported instead of each of {num_rows} once")
    return [values for _, values in sorted(reports)]


def token_mean_loss(logprobs: Sequence[Sequence[float]]) -> float:
    return -sum(map(sum, logprobs)) / sum(map(len, logprobs))


def relative_error(difference: float, peak: float) -> float:
    """max |difference| / max |reference|; of a tensor without gradient: 0 where it is matched, else infinite."""
    if peak:
        return difference / peak
    return difference and math.inf


def compare(name: str, layout: Layout, packed: bool, results: Sequence[RankResult], reference: Reference, seconds: float):
    """-> Outcome. Raises IncomparableError when rows or tokens are missing."""
    logprobs = merged(results, "logprobs", len(reference.logprobs))
    if list(map(len, logprobs)) != list(map(len, reference.logprobs)):
        raise IncomparableError("rows have other numbers of action tokens than in transformers")
    gaps = np.abs(np.concatenate(logprobs) - np.concatenate(reference.logprobs))
    errors: dict[str, float] = {}
    for result in results:
        for tensor, error in result.errors.items():
            errors[tensor] = max_of(error, errors.get(tensor, 0.0))
    if set(errors) != set(reference.gradient_peaks):
        raise IncomparableError(
            f"gradients of {sorted(set(errors) ^ set(reference.gradient_peaks))[:3]} have nothing to compare with"
        )
    gradients = {tensor: relative_error(errors[tensor], peak) for tensor, peak in reference.gradient_peaks.items()}
    worst = max(gradients, key=lambda tensor: math.inf if math.isnan(gradients[tensor]) else gradients[tensor])
    sums = [sum(step) for step in zip(*(result.loss_sums for result in results))]
    last = token_mean_loss(merged(results, "last_logprobs", len(logprobs)))
    losses = [*(total / gaps.size for total in sums), last]
    return Outcome(
        layout=name,
        packed=packed,
        world_size=layout.world_size,
        stage_layers=layout.stage_layers,
        num_microbatches=max(result.num_microbatches for result in results),
        logprob_max=float(gaps.max()),
        logprob_mean=float(gaps.mean()),
        gradient_max=gradients[worst],
        gradient_worst=worst,
        gradients=gradients,
        losses=losses,
        loss_difference=abs(last - reference.losses[-1]),
        seconds=round(seconds, 2),
    )


def not_covered(family: Qwen2, layout: Layout) -> list[str]:
    """HF tensors of which some part lies on no rank: the comparison of the ranks' parts would pass over it."""
    table = family.table(layout, transformer_engine=False)
    boxes = {
        (piece.hf_name, piece.hf_slice)
        for rank in range(layout.world_size)
        for piece in megatron_pieces(table, layout, family.num_layers, rank)
    }
    covered: dict[str, int] = {}
    for tensor, box in boxes:
        covered[tensor] = covered.get(tensor, 0) + math.prod(stop - start for start, stop in box)
    return sorted({e.hf_name for e in table if covered.get(e.hf_name) != math.prod(e.shape)})


def spread(outcomes: Sequence[Outcome]) -> float:
    """Largest difference between two layouts' losses after the Adam steps."""
    last = [outcome.losses[-1] for outcome in outcomes]
    return max_of(*last) - float(np.min(last)) if last else 0.0


def failures(outcomes: Sequence[Outcome]) -> list[str]:
    """What is past its limit, one line each; a NaN is."""
    found = []
    for outcome in outcomes:
        if not outcome.logprob_max <= LOGPROB_LIMIT:
            found.append(
                f"{outcome.title}: a log-prob is {outcome.logprob_max:.1e} off transformers' (limit {LOGPROB_LIMIT:.0e})"
            )
        bad = {tensor: error for tensor, error in outcome.gradients.items() if not error <= GRADIENT_LIMIT}
        if bad:
            others = f", and of {len(bad) - 1} more" if len(bad) > 1 else ""
            found.append(
                f"{outcome.title}: the gradient of {outcome.gradient_worst} is {outcome.gradient_max:.1e} off, relative to its "
                f"largest value (limit {GRADIENT_LIMIT:.0e}){others}"
            )
        if not outcome.loss_difference <= LOSS_LIMIT:
            found.append(
                f"{outcome.title}: the loss after the Adam steps is {outcome.loss_difference:.1e} off transformers' "
                f"(limit {LOSS_LIMIT:.0e})"
            )
    if not spread(outcomes) <= LOSS_LIMIT:
        by_loss = sorted(outcomes, key=lambda o: o.losses[-1])
        ends = f"{by_loss[0].title} and {by_loss[-1].title}"
        found.append(f"the losses of {ends} after the Adam steps are {spread(outcomes):.1e} apart (limit {LOSS_LIMIT:.0e})")
    return found


# Output


def table(outcomes: Sequence[Outcome], reference: Reference, adam_steps: int) -> str:
    rows = [("layout", "packed", "ranks", "micro-", "log-prob difference", "", "relative gradient error", "",
             f"loss after {adam_steps}", "minus")]  # fmt: skip
    rows.append(("", "", "", "batches", "max", "mean", "max", "worst tensor", "Adam steps", "transformers"))
    rows.append(("transformers", "", "", "", "", "", "", "", f"{reference.losses[-1]:.7f}", ""))
    for o in outcomes:
        rows.append((
            o.layout, "yes" if o.packed else "no", str(o.world_size), str(o.num_microbatches), f"{o.logprob_max:.1e}",
            f"{o.logprob_mean:.1e}", f"{o.gradient_max:.1e}", o.gradient_worst, f"{o.losses[-1]:.7f}",
            f"{o.losses[-1] - reference.losses[-1]:+.1e}",
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows[1:]) for column in range(len(rows[0]))]
    widths[4] = max(widths[4], len(rows[0][4]) - widths[5] - 2)  # headings over two columns
    widths[:3], widths[8:] = ([max(widths[i], len(rows[0][i])) for i in part] for part in (range(3), range(8, 10)))
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        if row is rows[0]:
            cells[4:8] = [row[4].ljust(widths[4] + 2 + widths[5]), row[6].ljust(widths[6] + 2 + widths[7])]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def without_nan(value):
    """NaN and infinities are no JSON."""
    if isinstance(value, dict):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report_json(options: argparse.Namespace, samples: list[TrainSample], reference: Reference, outcomes, found, seconds) -> str:
    content = {
        "hf": str(options.hf),
        "reference": str(options.reference or options.hf),
        "seed": options.seed,
        "num_rows": len(samples),
        "num_tokens": sum(s.num_tokens for s in samples),
        "num_action_tokens": sum(s.num_action_tokens for s in samples),
        "pictures_px": [[[ref.width_px, ref.height_px] for ref in s.images] for s in samples],
        "adam": {"steps": options.adam_steps, "lr": LR, "betas": list(BETAS), "weight_decay": WEIGHT_DECAY, "clip": CLIP},
        "limits": {"logprob": LOGPROB_LIMIT, "gradient": GRADIENT_LIMIT, "loss": LOSS_LIMIT},
        "transformers": {"losses": reference.losses, "gradient_peaks": reference.gradient_peaks},
        "results": [asdict(outcome) for outcome in outcomes],
        "loss_spread": spread(outcomes),
        "failures": found,
        "passed": not found,
        "seconds": round(seconds, 1),
    }
    return json.dumps(without_nan(content), indent=1) + "\n"


# The command


def say(text: str) -> None:
    print(f"parity: {text}", file=sys.stderr, flush=True)


def run_layouts(
    options: argparse.Namespace, family: Qwen2, layouts: dict[str, Layout], samples: list[TrainSample], ranks: Ranks
) -> tuple[Reference, list[Outcome], list[str]]:
    """-> transformers' numbers, those of every layout, and what failed to run."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        say(f"transformers, {len(samples)} rows of {sum(s.num_tokens for s in samples)} tokens ...")
        gradient_file = Path(folder) / "gradients.safetensors"
        reference: Reference = in_process(
            run_transformers, options.reference or options.hf, samples, options.adam_steps, gradient_file
        )
        say(f"transformers took {time.monotonic() - start:.1f} s, loss {reference.losses[0]:.4f} -> {reference.losses[-1]:.4f}")
        outcomes, broken = [], []
        cases = [(name, layout, packed) for name, layout in layouts.items() for packed in (True, False)]
        for index, (name, layout, packed) in enumerate(cases, 1):
            what = f"[{index}/{len(cases)}] {title(name, packed)}"
            say(f"{what}, {layout.world_size} rank{'s'[: layout.world_size > 1]} ...")
            start = time.monotonic()
            try:
                if missing := not_covered(family, layout):
                    raise IncomparableError(f"no rank holds all of {missing[:3]}")
                results = ranks.run(
                    layout.world_size, run_megatron, options.hf, layout, packed, samples, options.adam_steps, gradient_file
                )
                outcomes.append(compare(name, layout, packed, results, reference, time.monotonic() - start))
            except (RankError, IncomparableError) as error:
                say(f"{what} failed: {error}")
                broken.append(f"{title(name, packed)}: {str(error).strip().splitlines()[-1]}")
            else:
                o = outcomes[-1]
                say(f"{what} took {o.seconds:.1f} s, log-probs {o.logprob_max:.1e}, gradients {o.gradient_max:.1e}")
    return reference, outcomes, broken


def run(options: argparse.Namespace) -> int:
    start = time.monotonic()
    if options.rows < MIN_ROWS:
        raise ConfigError(f"--rows {options.rows}: {MIN_ROWS} or more, for rows with no, one and many pictures")
    if options.adam_steps < 0:
        raise ConfigError(f"--adam-steps {options.adam_steps}: 0 or more")
    if options.json and not options.json.resolve().parent.is_dir():
        raise ConfigError(f"--json {options.json}: there is no folder {options.json.resolve().parent}")
    family = checked_family(options.hf)
    if options.reference:
        checked_family(options.reference)
    layouts = checked_layouts(options.layouts, family)
    samples = rows_of(options.hf, family, options.rows, options.seed)
    os.environ.update(ENVIRONMENT)
    ranks = Ranks(max(layout.world_size for layout in layouts.values()))
    ranks.start()  # they import Megatron while transformers runs
    try:
        reference, outcomes, broken = run_layouts(options, family, layouts, samples, ranks)
    finally:
        ranks.stop()
    found = broken + failures(outcomes)
    print(table(outcomes, reference, options.adam_steps))
    print(f"\nlosses of all layouts: within {spread(outcomes):.1e}; {time.monotonic() - start:.0f} s")
    for line in found:
        print(f"PAST THE LIMIT  {line}" if line not in broken else f"FAILED  {line}")
    if options.json:
        options.json.write_text(report_json(options, samples, reference, outcomes, found, time.monotonic() - start))
    return 1 if found else 0


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"parity: {message}\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face folder")
    parser.add_argument("--layouts", default=DEFAULT_LAYOUTS, help="comma-separated (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")
    parser.add_argument("--rows", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of rows and pixels")
    parser.add_argument("--adam-steps", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="transformers reads this folder instead of --hf")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        return run(options)
    except (MegatronAgentError, OSError) as error:
        say(str(error))
        return 2
    except RankError as error:
        say(f"transformers failed: {error}")
        return 1
    except KeyboardInterrupt:
        say("stopped")
        return 130


if __name__ == "__main__":
    sys.exit(main())
