"""Where a pixel goes when a picture is turned and cropped. Pure; boxes are (left, top, right, bottom), y downwards.

A turned picture lies on the smallest canvas that holds all of it; angles are counter-clockwise degrees.
"""

from __future__ import annotations

import math
from fractions import Fraction

from PIL import Image

from megatron_agent.types import Box

SLACK_PX = 1e-6  # a corner this far beyond a pixel's edge is rounding of sine and cosine, not a further pixel

_TRANSPOSES = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


def rotated_size(width: int, height: int, degrees: int) -> tuple[int, int]:
    """Size of the canvas that holds a width x height picture turned by `degrees`."""
    cos, sin = _direction(degrees)
    return (
        math.ceil(abs(width * cos) + abs(height * sin) - SLACK_PX),
        math.ceil(abs(width * sin) + abs(height * cos) - SLACK_PX),
    )


def turn_box(box: Box, size: tuple[int, int], from_degrees: int, to_degrees: int) -> Box:
    """The bounding box, on the canvas turned by `to_degrees`, of a box on the one turned by `from_degrees`.

    `size` is that of the unturned picture. Rounded outward, clipped to the canvas; exact for quarter turns.
    """
    left, top, right, bottom = box
    corners = [(left, top), (right, top), (left, bottom), (right, bottom)]
    points = [_turn(*_turn(x, y, size, from_degrees, back=True), size, to_degrees) for x, y in corners]
    width, height = rotated_size(*size, to_degrees)
    return (
        max(0, math.floor(min(x for x, _ in points) + SLACK_PX)),
        max(0, math.floor(min(y for _, y in points) + SLACK_PX)),
        min(width, math.ceil(max(x for x, _ in points) - SLACK_PX)),
        min(height, math.ceil(max(y for _, y in points) - SLACK_PX)),
    )


def scale_box(box: tuple[float, float, float, float], from_size: tuple[int, int], onto: Box) -> Box:
    """A box on a picture of `from_size` that shows the region `onto` -> the pixels that it covers, rounded outward.

    Computed in exact fractions: a box that ends on a pixel's edge stays there. The result is clipped to `onto`.
    """
    left, top, right, bottom = onto
    x1, y1, x2, y2 = (Fraction(value) for value in box)
    x_scale, y_scale = Fraction(right - left, from_size[0]), Fraction(bottom - top, from_size[1])
    return (
        max(left, left + math.floor(x1 * x_scale)),
        max(top, top + math.floor(y1 * y_scale)),
        min(right, left + math.ceil(x2 * x_scale)),
        min(bottom, top + math.ceil(y2 * y_scale)),
    )


def cut(picture: Image.Image, degrees: int, box: Box | None) -> Image.Image:
    """Turn, then crop; what lies outside the picture is black. An oblique turn samples only the box, bicubic."""
    if degrees % 90:
        left, top, right, bottom = box or (0, 0, *rotated_size(*picture.size, degrees))
        return picture.transform(
            (right - left, bottom - top), Image.Transform.AFFINE, _sampling(picture.size, degrees, left, top),
            Image.Resampling.BICUBIC,
        )  # fmt: skip
    if degrees % 360:
        picture = picture.transpose(_TRANSPOSES[degrees % 360])
    return picture if box is None else picture.crop(box)


def _direction(degrees: int) -> tuple[float, float]:
    """(cos, sin), exact for quarter turns."""
    if degrees % 90 == 0:
        return ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))[degrees // 90 % 4]
    return math.cos(math.radians(degrees)), math.sin(math.radians(degrees))


def _turn(x: float, y: float, size: tuple[int, int], degrees: int, back: bool = False) -> tuple[float, float]:
    canvas = rotated_size(*size, degrees)
    source, target = (canvas, size) if back else (size, canvas)
    cos, sin = _direction(-degrees if back else degrees)
    dx, dy = x - source[0] / 2, y - source[1] / 2
    return cos * dx + sin * dy + target[0] / 2, cos * dy - sin * dx + target[1] / 2


def _sampling(size: tuple[int, int], degrees: int, left: int, top: int) -> tuple[float, ...]:
    """Affine coefficients from the pixels of the cropped, turned canvas to those of the picture."""
    (x0, y0), (x1, y1), (x2, y2) = (_turn(left + dx, top + dy, size, degrees, back=True) for dx, dy in ((0, 0), (1, 0), (0, 1)))
    return (x1 - x0, x2 - x0, x0, y1 - y0, y2 - y0, y0)
