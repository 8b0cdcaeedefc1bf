"""Convert checkpoints between Hugging Face and Megatron, and compare them.

    python tools/convert.py hf-to-megatron --in HF_DIR --out DIR --tp 2 --pp 2
    python tools/convert.py megatron-to-hf --in DIR --out HF_DIR [--like HF_DIR]
    python tools/convert.py verify A B [--like HF_DIR]

The Megatron side is a distributed checkpoint: it loads into any layout, --tp and --pp say only how it is cut into files.
Exit status: 0, 1 when `verify` found a difference (it names the first), 2 for input that cannot be used.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tqdm import tqdm

from megatron_agent.errors import CheckpointError, ConfigError, MegatronAgentError
from megatron_agent.training.dist_checkpoint import (
    FORMAT_FILE,
    Chunk,
    DistCheckpoint,
    checkpoint_table,
    plan_chunks,
    write_skeleton,
)
from megatron_agent.training.hf_export import (
    HF_FOLDER,
    LAYOUT_FILE,
    HfLayout,
    as_views,
    carried_files,
    carry,
    check_against_table,
    export_hf,
    fill,
    hf_side,
    read_family,
    written_aside,
)
from megatron_agent.training.layout import Layout
from megatron_agent.training.regions import Copy, Files, Region, View

SPARE_BYTES = 16 << 20  # of a checkpoint's own bookkeeping


def hf_to_megatron(source: Path, out: Path, layout: Layout, workers: int = 2, quiet: bool = False) -> None:
    """Raises CheckpointError; nothing bears the name `out` then."""
    hf = HfLayout.of_folder(source)
    regions = hf.regions(source)
    family = read_family(source)
    try:
        family.check(layout)
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from error
    table = checkpoint_table(family)
    check_against_table(source, regions, table)
    chunks = plan_chunks(table, layout)
    dtypes = _dtypes_of_keys(chunks, regions)
    order = {name: (str(region.file), region.offset) for name, region in regions.items()}
    chunks.sort(key=lambda chunk: min(order[part.hf_name] for part in chunk.parts))  # the source is read front to back
    with written_aside(out, hf.num_bytes(source) + SPARE_BYTES) as aside:
        views = [_view_of(chunk, regions, dtypes) for chunk in chunks]
        targets = list(zip(write_skeleton(aside, chunks, dtypes, list(map(_start, views))), views))
        carry(source, aside / HF_FOLDER)
        hf.write(aside / HF_FOLDER / LAYOUT_FILE)
        with progress(sum(view.num_bytes for _, view in targets), out, quiet) as bar:
            fill(targets, bar.update, workers)


def _dtypes_of_keys(chunks: Sequence[Chunk], regions: dict[str, Region]) -> dict[str, torch.dtype]:
    dtypes: dict[str, torch.dtype] = {}
    for chunk in chunks:
        for part in chunk.parts:
            dtype = regions[part.hf_name].dtype
            if dtypes.setdefault(chunk.key, dtype) != dtype:
                raise CheckpointError(f"{part.hf_name} is {dtype}, other tensors of {chunk.key} are {dtypes[chunk.key]}")
    return dtypes


def _view_of(chunk: Chunk, regions: dict[str, Region], dtypes: dict[str, torch.dtype]) -> View:
    origin = [start for start, _ in chunk.box]
    copies = []
    for part in chunk.parts:
        box = tuple((start - at, stop - at) for (start, stop), at in zip(part.box, origin))
        copies.append(Copy(regions[part.hf_name], part.hf_slice, box))
    return View(chunk.shape, dtypes[chunk.key], tuple(copies))


def _start(view: View) -> int:
    """Where in its file a view starts, or would if its first rows were there."""
    first = view.copies[0]
    return first.source.offset + (first.source_slice[0][0] - first.target_slice[0][0]) * first.source.row_bytes


def megatron_to_hf(source: Path, out: Path, like: Path | None, workers: int = 2, quiet: bool = False) -> None:
    """Raises CheckpointError; nothing bears the name `out` then."""
    folder, layout = hf_side(source, like)
    with progress(sum(r.row_bytes * r.shape[0] for r in layout.regions(folder).values()), out, quiet) as bar:
        export_hf(source, out, like, bar.update, workers)


def is_megatron(folder: Path) -> bool:
    return (folder / FORMAT_FILE).is_file()


def hf_part(folder: Path) -> Path | None:
    """The Hugging Face folder or the one that a Megatron checkpoint carries."""
    if not is_megatron(folder):
        return folder
    return folder / HF_FOLDER if (folder / HF_FOLDER / LAYOUT_FILE).is_file() else None


def verify(a: Path, b: Path, like: Path | None, quiet: bool = False) -> str | None:
    """The first difference in words, None when there is none. Dtypes count; carried files where both sides have them."""
    config = like or hf_part(a) or hf_part(b)

    def views_of(folder: Path) -> dict[str, View]:
        if not is_megatron(folder):
            return as_views(HfLayout.of_folder(folder).regions(folder))
        if config is None:
            raise CheckpointError(f"{folder}: neither side has a config.json; say --like HF_DIR")
        return DistCheckpoint(folder).views(checkpoint_table(read_family(config)))

    ours, theirs = views_of(a), views_of(b)
    if only := sorted(set(ours) ^ set(theirs)):
        return f"tensor {only[0]!r} is only in {a if only[0] in ours else b}"
    for name, view in ours.items():
        for what, one, other in (("shape", view.shape, theirs[name].shape), ("dtype", view.dtype, theirs[name].dtype)):
            if one != other:
                return f"tensor {name!r}: {what} {one} in {a}, {other} in {b}"
    return _first_other_bytes(ours, theirs, quiet) or _first_other_file(a, b)


def _first_other_bytes(ours: dict[str, View], theirs: dict[str, View], quiet: bool) -> str | None:
    with Files() as files, progress(sum(view.num_bytes for view in ours.values()), "verify", quiet) as bar:
        files.open(copy.source.file for views in (ours, theirs) for view in views.values() for copy in view.copies)
        for name, view in ours.items():
            for start, stop in view.blocks():
                one, other = files.read(view, start, stop), files.read(theirs[name], start, stop)
                differs = (one.view(torch.uint8) != other.view(torch.uint8)).view(*one.shape, -1).any(-1)
                if differs.any():
                    index = differs.nonzero()[0].tolist()
                    values = f"{one[tuple(index)].item()} and {other[tuple(index)].item()}"
                    return f"tensor {name!r}: {values} at {[index[0] + start, *index[1:]]}"
                bar.update(one.nbytes)
    return None


def _first_other_file(a: Path, b: Path) -> str | None:
    """Of shard files and of what travels with them."""
    ours, theirs = hf_part(a), hf_part(b)
    if ours is None or theirs is None:
        return None
    layouts = [HfLayout.read(p / LAYOUT_FILE) if (p / LAYOUT_FILE).is_file() else HfLayout.of_folder(p) for p in (ours, theirs)]
    for one, other in zip_longest(*(layout.files for layout in layouts)):
        if one != other:
            return f"safetensors files: {one and one.name} in {a}, {other and other.name} in {b}, or their headers, differ"
    names = [{p.name for p in carried_files(folder)} for folder in (ours, theirs)]
    for name in sorted(names[0] | names[1]):
        if not all(name in side for side in names) or (ours / name).read_bytes() != (theirs / name).read_bytes():
            return f"file {name!r} differs or is on one side only"
    return None


def progress(total_bytes: int, what: object, quiet: bool) -> tqdm:
    return tqdm(total=total_bytes, unit="B", unit_scale=True, desc=str(what), disable=quiet)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    to_megatron = commands.add_parser("hf-to-megatron", help="Hugging Face folder -> distributed checkpoint")
    to_hf = commands.add_parser("megatron-to-hf", help="distributed checkpoint (also of a training run) -> Hugging Face folder")
    for command in (to_megatron, to_hf):
        command.add_argument("--in", dest="source", type=Path, required=True, metavar="DIR")
        command.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty")
        command.add_argument("--workers", type=int, default=2, help="threads")
    to_megatron.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    to_megatron.add_argument("--pp", type=int, default=1, help="pipeline stages")
    to_megatron.add_argument("--vpp", type=int, default=1, help="chunks per pipeline stage (interleaved)")
    compare = commands.add_parser("verify", help="compare two checkpoints of either kind; exit 1 on a difference")
    compare.add_argument("a", type=Path)
    compare.add_argument("b", type=Path)
    for command in (to_hf, compare):
        command.add_argument("--like", type=Path, metavar="HF_DIR", help="config and shard files of a checkpoint without hf/")
    for command in (to_megatron, to_hf, compare):
        command.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    if options.command == "verify":
        difference = verify(options.a, options.b, options.like, options.quiet)
        print(difference or "equal")
        return 1 if difference else 0
    if options.workers < 1:
        raise CheckpointError(f"--workers {options.workers}: must be 1 or more")
    if options.command == "megatron-to-hf":
        megatron_to_hf(options.source, options.out, options.like, options.workers, options.quiet)
        return 0
    layout = Layout(options.tp, options.pp, virtual_pipeline=options.vpp)
    hf_to_megatron(options.source, options.out, layout, options.workers, options.quiet)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(1)  # the threads of --workers copy; more of torch's under each would wait for one another
    try:
        return run(options)
    except (MegatronAgentError, OSError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
