"""mRoPE positions of Qwen2.5-VL rows (Qwen2-VL, arXiv 2409.12191, section 2.1; transformers' `get_rope_index`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def mrope_positions(token_ids: np.ndarray, image_token_id: int, grids: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Positions int64 [3, T] (time, height, width) of a row with pictures anywhere in it.

    `grids` are (time, rows, columns) in merged patches, in row order; the row holds time x rows x columns image
    tokens for each. Text advances all three axes by one; a picture spreads over them and the text after it goes on
    from the largest position used. Raises ValueError when tokens and grids do not match.
    """
    positions = np.zeros((3, len(token_ids)), dtype=np.int64)
    is_image = token_ids == image_token_id
    starts = np.flatnonzero(is_image)
    at = next_position = 0
    for time, rows, columns in grids:
        remaining = starts[starts >= at]
        if not len(remaining):
            raise ValueError(f"the row has fewer pictures than the {len(grids)} grids given")
        start = int(remaining[0])
        stop = start + time * rows * columns
        if stop > len(token_ids) or not is_image[start:stop].all():
            raise ValueError(
                f"picture at token {start}: expected {stop - start} image tokens for its {time}x{rows}x{columns} grid"
            )
        positions[:, at:start] = next_position + np.arange(start - at)
        next_position += start - at
        positions[:, start:stop] = next_position + np.indices((time, rows, columns)).reshape(3, -1)
        next_position += max(time, rows, columns)
        at = stop
    if is_image[at:].any():
        raise ValueError(f"the row has more image tokens than its {len(grids)} grids account for")
    positions[:, at:] = next_position + np.arange(len(token_ids) - at)
    return positions
