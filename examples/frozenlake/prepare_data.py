"""Make the game example: `python -m examples.frozenlake.prepare_data --seed 0 --out data/frozenlake/seed0`.

Every row is a frozen lake of 4 x 4 cells, named by a seed: the prompt shows the map that the environment will play. The ice
is not slippery. Written below the output folder, from the seed alone:

- `model/`: a Qwen2.5 of under a million parameters with random weights (../tiny_text.py).
- `warmup.parquet`: scripted walks for a supervised warm start. Each turn says what lies to the right and below, as it
  is, and then, out of habit, goes right: less often into a hole, but even there more often than not.
- `train.parquet`: lakes for reinforcement learning, without scripts. Reward has to teach to go around holes.
- `heldout.parquet`: lakes that are in neither of the others.
"""

import argparse
from itertools import count, islice
from pathlib import Path

import numpy as np

from examples.tiny_text import prepare, write_rows, write_text_model
from megatron_agent.envs.frozenlake import make_map, place
from megatron_agent.envs.grid_game import HEADING, show

SIZE, FROZEN = 4, 0.8
SYSTEM = "Walk to G, not into H."
PROTOCOL = ["<action>", "</action>"]
WARMUP_ROWS, TRAIN_ROWS, HELDOUT_ROWS = 4000, 800, 200
EDGE = "edge"
RIGHT, RIGHT_INTO_HOLE = 0.75, 0.55  # how often a script goes right where it could go down as well


def make_row(lines: list[str], seed: int) -> dict:
    return {
        "data_source": "frozenlake",
        "prompt": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"{HEADING}\n{show(place(lines, 0))}"},
        ],
        "env_name": "frozenlake",
        "ability": "planning",
        "reward_model": {"style": "env", "ground_truth": "goal"},
        "extra_info": {"question": "Walk to G.", "seed": seed, "size": SIZE, "p": FROZEN},
    }


def turn(right: str, below: str, move: str) -> str:
    return f"<think> right {right} down {below}</think><action> {move}</action>"


def walk(lines: list[str], rng: np.random.Generator) -> list[str]:
    """The turns of a walk that goes right or down until it ends, in a hole or at the goal."""

    def cell(row: int, column: int) -> str:
        return lines[row][column] if max(row, column) < SIZE else EDGE

    script, row, column = [], 0, 0
    while lines[row][column] not in "HG":
        right, below = cell(row, column + 1), cell(row + 1, column)
        goes_right = below == EDGE or (right != EDGE and rng.random() < (RIGHT_INTO_HOLE if right == "H" else RIGHT))
        script.append(turn(right, below, "right" if goes_right else "down"))
        row, column = (row, column + 1) if goes_right else (row + 1, column)
    return script


def vocabulary_texts() -> list[str]:
    """Everything that is said, for the tokenizer to learn as whole words."""
    board = f"{HEADING}\n" + show(["FHGP"] * 2) + "\nF\nH\nG\nP"
    moves = [turn("F H G", EDGE, move) for move in ("left", "down", "right", "up")]
    errors = "Error: end your turn with one of <action>left</action>, <action>down</action>, <action>right</action>"
    return ["system\n", "user\n", "assistant\n", SYSTEM, board, *moves, errors]


def write_all(folder: Path, seed: int) -> None:
    """Write model and rows below a folder that exists and is empty."""
    rng = np.random.default_rng(seed)
    write_text_model(folder / "model", vocabulary_texts(), PROTOCOL, seed)
    lakes = ((make_map(SIZE, FROZEN, lake_seed), lake_seed) for lake_seed in count(int(rng.integers(2**31))))
    heldout = list(islice(lakes, HELDOUT_ROWS))
    shown = {tuple(lines) for lines, _ in heldout}
    others = (lake for lake in lakes if tuple(lake[0]) not in shown)
    warmup = [make_row(*lake) | {"script": walk(lake[0], rng)} for lake in islice(others, WARMUP_ROWS)]
    write_rows(folder / "warmup.parquet", warmup)
    write_rows(folder / "train.parquet", [make_row(*lake) for lake in islice(others, TRAIN_ROWS)])
    write_rows(folder / "heldout.parquet", [make_row(*lake) for lake in heldout])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: data/frozenlake/seed<SEED>")
    args = parser.parse_args()
    out = args.out or Path(f"data/frozenlake/seed{args.seed}")
    print(("wrote " if prepare(out, args.seed, [Path(__file__)], write_all) else "kept ") + str(out))


if __name__ == "__main__":
    main()
