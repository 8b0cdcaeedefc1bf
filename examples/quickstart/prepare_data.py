"""Make the quickstart's task and its tiny model: `python prepare_data.py --seed 0 --out data/quickstart/seed0`.

A picture holds 2x2 coloured tiles, each with a fine pattern. The model is shown the picture at a quarter of its size,
where every pattern averages out to plain colour; the question names a colour and asks for the pattern. So the model has
to zoom: call `image_zoom_in_tool` with a box, get the crop (cut from the full picture), and answer from it.

Written below the output folder, from the seed alone:

- `model/`: a Qwen2.5-VL of under a million parameters with random weights (see tiny_model.py).
- `warmup.parquet`: scripted conversations for a supervised warm start. The scripts know the format, read what they see,
  and say rightly where the colour is, yet most often look at one corner out of habit. Some pictures lack tiles here, which
  lets the model learn first where a tile is and then which of them is meant.
- `train.parquet`: questions for reinforcement learning; no box, no script. Reward has to teach where to look.
- `heldout.parquet`: other pictures, answers exactly balanced.
- `heldout_direct.parquet`: the same pictures and questions, no tool offered. Chance is one in eight: a model that
  scores more has found a leak in the picture.

Columns are those of DeepEyes' data; `warmup.parquet` adds `script`, the assistant's turns.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIDE, SCALE = 56, 4  # side of the shown picture; how much larger the full picture is
CELL, TILE = 28, 20  # in shown pixels; a cell is what one image token of the model covers
CONTRAST, FADE = 50, 16  # of a pattern, in levels; how wide a tile's rim is in which it fades, in pixels of the full one
COLORS = {"red": (175, 80, 80), "green": (80, 170, 80), "blue": (80, 90, 175), "yellow": (175, 170, 80)}
PLACES = ["top left", "top right", "bottom left", "bottom right"]
_row, _col = np.mgrid[0:4, 0:4]
PATTERNS = {  # period 4 in pixels of the full picture, half of them on: each averages out at a quarter of the size
    "rows": _row < 2,
    "columns": _col < 2,
    "checks": (_row // 2 + _col // 2) % 2 == 0,
    "rising": (_row + _col) % 4 < 2,
    "falling": (_row - _col) % 4 < 2,
    "mesh": (_row + _col) % 2 == 0,
    "lines": _row % 2 == 0,
    "bars": _col % 2 == 0,
}

TOOL_SYSTEM = "Zoom with image_zoom_in_tool, then answer."
PLAIN_SYSTEM = "Answer at once."
PATTERN_QUESTION = "What pattern is on the tile that is {}?"
PLACE_QUESTION = "Where is the tile that is {}?"

# How often a warm-start script looks at the asked tile, and how often at the same corner out of habit; else anywhere.
# A greedy searcher then keeps to its habit, and is right one time in four.
LOOK_ASKED, LOOK_HABIT, HABIT = 0.28, 0.57, 0
WARMUP_ROWS = {"tool": 1800, "place": 1900, "direct": 300}
TRAIN_ROWS = {"tool": 1400, "place": 200}
HELDOUT_ROWS = 400

SCHEMA = pa.schema({
    "data_source": pa.string(),
    "prompt": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
    "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
    "env_name": pa.string(),
    "ability": pa.string(),
    "reward_model": pa.struct({"style": pa.string(), "ground_truth": pa.string()}),
    "extra_info": pa.struct({
        "question": pa.string(), "answer": pa.string(), "index": pa.int64(), "split": pa.string(),
        "target_bbox": pa.list_(pa.int64()),
    }),
})  # fmt: skip
WARMUP_SCHEMA = SCHEMA.append(pa.field("script", pa.list_(pa.string())))


# ---------------------------------------------------------------- pictures
def shown_box(place: int) -> list[int]:
    """The tile at a place, as a box [x1, y1, x2, y2] in pixels of the shown picture."""
    margin = (CELL - TILE) // 2
    x, y = place % 2 * CELL + margin, place // 2 * CELL + margin
    return [x, y, x + TILE, y + TILE]


def draw_picture(colors: list[str], patterns: list[str], bare: set[int], rng: np.random.Generator) -> bytes:
    """A PNG with one tile of the given colour and pattern at each of the four places that is not bare.

    A pattern that broke off at a tile's rim would survive there when the picture is shrunk, so it fades towards it, and
    grain as coarse as a shown pixel covers the rest. The background grows redder to the right and greener downwards,
    which tells a small vision tower where in the picture it looks.
    """
    side = SIDE * SCALE
    grain = rng.normal(0, 8, (SIDE, SIDE, 1)).round().repeat(SCALE, 0).repeat(SCALE, 1)
    canvas = np.full((side, side, 3), 120.0)
    ramp = np.linspace(-100, 100, SIDE).round().repeat(SCALE)
    canvas[..., 0] += ramp[None, :]
    canvas[..., 1] += ramp[:, None]
    inside = np.arange(TILE * SCALE) + 0.5
    fade = np.minimum(np.minimum(inside, inside[::-1]) / FADE, 1)
    contrast = CONTRAST * np.minimum.outer(fade, fade)[..., None]
    for place, (color, pattern) in enumerate(zip(colors, patterns, strict=True)):
        if place in bare:
            continue
        x1, y1, x2, y2 = (v * SCALE for v in shown_box(place))
        shift = rng.integers(0, 4, 2)
        texture = np.tile(np.roll(PATTERNS[pattern], shift, (0, 1)), (TILE, TILE)) * 2.0 - 1
        canvas[y1:y2, x1:x2] = np.array(COLORS[color]) + contrast * texture[..., None]
    png = io.BytesIO()
    Image.fromarray((canvas + grain).clip(0, 255).astype(np.uint8)).save(png, "PNG")
    return png.getvalue()


def make_scenes(count: int, rng: np.random.Generator, bare: tuple[int, ...] = (0,)) -> list[dict]:
    """Pictures, each with the place that is asked about; asked places, patterns and colours are balanced.

    The four patterns of a picture differ, so a look at the wrong tile gives a wrong answer. `bare` says how many of the
    other tiles are left out; several numbers take turns at random.
    """
    colors, patterns = list(COLORS), list(PATTERNS)
    asked_colors = rng.permutation(np.arange(count) % len(colors))
    scenes = []
    for i in range(count):
        place, color, pattern = (i + i // len(patterns)) % len(PLACES), asked_colors[i], i % len(patterns)
        here_colors = [int(c) for c in rng.permutation(len(colors)) if c != color]
        here_patterns = [int(p) for p in rng.permutation(len(patterns)) if p != pattern][: len(PLACES) - 1]
        here_colors.insert(place, color)
        here_patterns.insert(place, pattern)
        names = [colors[c] for c in here_colors], [patterns[p] for p in here_patterns]
        others = rng.permutation([p for p in range(len(PLACES)) if p != place])
        png = draw_picture(*names, set(others[: rng.choice(bare)].tolist()), rng)
        scenes.append(dict(place=place, colors=names[0], patterns=names[1], png=png))
    return [scenes[i] for i in rng.permutation(count)]


# ---------------------------------------------------------------- rows
def make_row(kind: str, scene: dict) -> dict:
    """One row of data; kind is "tool" (zoom, then answer), "direct" (no tool), or "place" (where is a colour)."""
    place = scene["place"]
    color = scene["colors"][place]
    question = (PLACE_QUESTION if kind == "place" else PATTERN_QUESTION).format(color)
    answer = PLACES[place] if kind == "place" else scene["patterns"][place]
    system = TOOL_SYSTEM if kind == "tool" else PLAIN_SYSTEM
    return {
        "data_source": "tile_place" if kind == "place" else "visual_search",
        "prompt": [{"role": "system", "content": system}, {"role": "user", "content": "<image>" + question}],
        "images": [{"bytes": scene["png"], "path": None}],
        "env_name": "visual_toolbox_v2" if kind == "tool" else "",
        "ability": "vl_grounding" if kind == "place" else "vl_search",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {
            "question": question,
            "answer": answer,
            "target_bbox": [v * SCALE for v in shown_box(place)],
        },
    }


def tool_turn(color: str, place: str, box: list[int]) -> str:
    """The assistant's turn that thinks of a tile and looks at a box."""
    call = json.dumps({"name": "image_zoom_in_tool", "arguments": {"bbox_2d": box, "label": color}})
    return f"<think>{color} {place}</think><tool_call>\n{call}\n</tool_call>"


def answer_turn(answer: str, thought: str = "") -> str:
    """The assistant's turn that ends a conversation."""
    return f"<think>{thought}</think><answer>{answer}</answer>"


def make_script(kind: str, scene: dict, rng: np.random.Generator) -> list[str]:
    """The assistant's turns of a scripted conversation. A look at a wrong tile reports what is really seen there."""
    place = scene["place"]
    color = scene["colors"][place]
    if kind == "place":
        return [answer_turn(PLACES[place], f"{color} {PLACES[place]}")]
    if kind == "direct":
        return [answer_turn(scene["patterns"][place])]
    elsewhere = int(rng.integers(len(PLACES)))
    seen = int(rng.choice([place, HABIT, elsewhere], p=[LOOK_ASKED, LOOK_HABIT, 1 - LOOK_ASKED - LOOK_HABIT]))
    return [tool_turn(color, PLACES[place], shown_box(seen)), answer_turn(scene["patterns"][seen])]


def make_split(split: str, counts: dict[str, int], rng: np.random.Generator) -> list[dict]:
    """The rows of one file, in random order."""
    rows = []
    for kind, count in counts.items():
        bare = (0, 1, 2, 3) if split == "warmup" and kind == "place" else (0,)
        for scene in make_scenes(count, rng, bare):
            rows.append(make_row(kind, scene))
            if split == "warmup":
                rows[-1]["script"] = make_script(kind, scene, rng)
    return number([rows[i] for i in rng.permutation(len(rows))], split)


def number(rows: list[dict], split: str) -> list[dict]:
    """The same rows, each now with its split and its index in it."""
    for index, row in enumerate(rows):
        row["extra_info"].update(index=index, split=split)
    return rows


def vocabulary_texts() -> list[str]:
    """Everything that is said in the task, for the tokenizer to learn as whole words."""
    texts = ["system\n", "user\n", "assistant\n", TOOL_SYSTEM, PLAIN_SYSTEM, *PLACES, *PATTERNS, *COLORS]
    texts += [question.format(color) for color in COLORS for question in (PATTERN_QUESTION, PLACE_QUESTION)]
    return texts + [tool_turn(color, place, shown_box(0)) for color in COLORS for place in PLACES]


# ---------------------------------------------------------------- files
def write_rows(path: Path, rows: list[dict]) -> None:
    """One parquet file, in groups of rows small enough to read one at a time."""
    schema = WARMUP_SCHEMA if "script" in rows[0] else SCHEMA
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=256, compression="none")


def write_all(folder: Path, seed: int) -> None:
    """Write model and data below a folder that exists and is empty."""
    from tiny_model import write_model  # late: importing torch takes seconds, and often there is nothing to write

    streams = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3)]
    write_model(folder / "model", vocabulary_texts(), seed)
    write_rows(folder / "warmup.parquet", make_split("warmup", WARMUP_ROWS, streams[0]))
    write_rows(folder / "train.parquet", make_split("train", TRAIN_ROWS, streams[1]))
    scenes = make_scenes(HELDOUT_ROWS, streams[2])
    for name, kind in (("heldout", "tool"), ("heldout_direct", "direct")):
        write_rows(folder / f"{name}.parquet", number([make_row(kind, scene) for scene in scenes], name))


def recipe(seed: int) -> dict:
    """What the output depends on: the seed and this code."""
    here = Path(__file__).resolve().parent
    code = b"".join((here / name).read_bytes() for name in ("prepare_data.py", "tiny_model.py"))
    return {"seed": seed, "code": hashlib.sha256(code).hexdigest()}


def prepare(out: Path, seed: int) -> bool:
    """Make sure that `out` holds the data of a seed; returns whether anything had to be written.

    Work happens in a folder beside `out` that takes its name at the end, so `out` is either absent or complete.
    """
    out, done = out.absolute(), "recipe.json"
    if out.exists():
        if (out / done).exists() and json.loads((out / done).read_text()) == recipe(seed):
            return False
        if any(out.iterdir()) and not (out / done).exists():
            raise SystemExit(f"{out} holds files that are not ours: choose another --out or remove it")
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        write_all(aside, seed)
        (aside / done).write_text(json.dumps(recipe(seed), indent=2) + "\n")
        if out.exists():
            shutil.rmtree(out)
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: data/quickstart/seed<SEED>")
    args = parser.parse_args()
    out = args.out or Path(f"data/quickstart/seed{args.seed}")
    print(("wrote " if prepare(out, args.seed) else "kept ") + str(out))


if __name__ == "__main__":
    main()
