"""Does the shown picture give the pattern away? A linear probe on the asked tile: `python check_leak.py DATA_DIR ...`

It is told where the tile is and gets its pixels and their spectrum, as shown to the model (56 px) and in full (224 px).
Fitted on the training pictures and tested on the held-out ones, it must stay at chance (0.125) on the first.
"""

import io
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from prepare_data import PATTERNS, SCALE, SIDE

RIDGE = 1e2


def features(row: dict, side_px: int) -> np.ndarray:
    """Pixels and amplitudes (which do not depend on the pattern's shift) of the tile, in a picture of this side."""
    picture = (
        Image.open(io.BytesIO(row["images"][0]["bytes"])).convert("RGB").resize((side_px, side_px), Image.Resampling.BICUBIC)
    )
    x1, y1, x2, y2 = (v * side_px // (SIDE * SCALE) for v in row["extra_info"]["target_bbox"])
    tile = np.asarray(picture, np.float64)[y1:y2, x1:x2].mean(-1)
    tile -= tile.mean()
    return np.concatenate([tile.ravel(), np.abs(np.fft.fft2(tile)).ravel()])


def split(folders: list[Path], name: str, side_px: int) -> tuple[np.ndarray, np.ndarray]:
    rows = [row for folder in folders for row in pq.read_table(folder / f"{name}.parquet").to_pylist() if row["env_name"]]
    labels = [list(PATTERNS).index(row["reward_model"]["ground_truth"]) for row in rows]
    return np.stack([features(row, side_px) for row in rows]), np.array(labels)


def probe(folders: list[Path], side_px: int) -> float:
    """Held-out accuracy of ridge regression onto the patterns."""
    train, labels = split(folders, "train", side_px)
    test, expected = split(folders, "heldout", side_px)
    mean, scale = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / scale, (test - mean) / scale
    targets = np.eye(len(PATTERNS))[labels] - 1 / len(PATTERNS)
    weights = train.T @ np.linalg.solve(train @ train.T + RIDGE * np.eye(len(train)), targets)
    return float(((test @ weights).argmax(1) == expected).mean())


def main() -> None:
    folders = [Path(name) for name in sys.argv[1:]] or [Path("data/quickstart/seed0")]
    for side_px in (SIDE, SIDE * SCALE):
        print(f"asked tile in a picture of {side_px} px: {probe(folders, side_px):.3f} (chance {1 / len(PATTERNS)})")


if __name__ == "__main__":
    main()
