"""The image store: pictures by the hash of their content, what is shown of them by recipe. The only place that resizes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_agent.data.cache import BoundedCache
from megatron_agent.data.decode import check_picture, decode_picture, picture_size_px, to_rgb
from megatron_agent.data.geometry import cut, rotated_size, scale_box, turn_box
from megatron_agent.errors import ConfigError, DataError
from megatron_agent.types import Box, ImageRef

PATCH_SIDE_PX = 28  # one image token of Qwen2-VL covers 28 x 28 px: 14 px patches, merged 2 x 2
MAX_ASPECT_RATIO = 200
IMAGE_MARKER = "<image>"
SIZES_FILE = "sizes.json"


@dataclass(frozen=True)
class PixelLimits:
    """How many pixels a shown picture may have. Raises ConfigError."""

    min_pixels: int
    max_pixels: int

    def __post_init__(self) -> None:
        if not 1 <= self.min_pixels <= self.max_pixels or self.max_pixels < PATCH_SIDE_PX**2:
            raise ConfigError(
                f"min_pixels={self.min_pixels}, max_pixels={self.max_pixels}: allowed are 1 <= min_pixels <= max_pixels, "
                f"and max_pixels at least {PATCH_SIDE_PX**2} (one image token)"
            )


def fit_size(width: int, height: int, limits: PixelLimits, factor: int = PATCH_SIDE_PX) -> tuple[int, int]:
    """(width, height) at which a picture is shown: sides are multiples of `factor`, the area lies within the limits.

    The choice of transformers' Qwen2-VL image processor (`smart_resize`), so that a picture of this size passes
    through any processor unchanged. Small pictures are enlarged. Raises DataError above an aspect ratio of 200.
    """
    if min(width, height) < 1:
        raise DataError(f"a picture of {width}x{height} px shows nothing")
    if max(width, height) / min(width, height) > MAX_ASPECT_RATIO:
        raise DataError(f"a picture of {width}x{height} px is too thin; the aspect ratio may be at most {MAX_ASPECT_RATIO}")
    fitted = [round(side / factor) * factor for side in (width, height)]
    if fitted[0] * fitted[1] > limits.max_pixels:
        shrink = math.sqrt(height * width / limits.max_pixels)
        fitted = [max(factor, math.floor(side / shrink / factor) * factor) for side in (width, height)]
    elif fitted[0] * fitted[1] < limits.min_pixels:
        grow = math.sqrt(limits.min_pixels / (height * width))
        fitted = [math.ceil(side * grow / factor) * factor for side in (width, height)]
    return fitted[0], fitted[1]


def content_items(text: str) -> list[dict[str, str]]:
    """Text with literal `<image>` markers -> the items of a chat message, in order; text is kept to the letter."""
    items: list[dict[str, str]] = []
    for index, piece in enumerate(text.split(IMAGE_MARKER)):
        if index:
            items.append({"type": "image"})
        if piece:
            items.append({"type": "text", "text": piece})
    return items


class ImageStore:
    """Content-addressed pictures below a node-local folder; originals and shown pictures are decoded once per process.

    Threads may share a store, processes may share its folder, and pickling takes the folder's name but no picture.
    Each of the two caches holds at most `cache_pictures` pictures and `cache_bytes` bytes.
    `fetch(source)` gives the bytes of a picture that this node lacks (it pickles with the store, and raises DataError where
    nobody has the picture); they enter the node once, however many processes ask.
    """

    def __init__(
        self,
        root: str | Path,
        limits: PixelLimits,
        cache_pictures: int = 512,
        cache_bytes: int = 512 << 20,
        fetch: Callable[[str], bytes] | None = None,
    ) -> None:
        self.root, self.limits, self.fetch = Path(root), limits, fetch
        self.cache_pictures, self.cache_bytes = cache_pictures, cache_bytes
        self._start_empty()

    def _start_empty(self) -> None:
        self._originals: BoundedCache[Image.Image] = BoundedCache(self.cache_pictures, self.cache_bytes)
        self._shown: BoundedCache[np.ndarray] = BoundedCache(self.cache_pictures, self.cache_bytes)
        self._sizes_px: dict[str, tuple[int, int]] = {}

    def fetching(self, fetch: Callable[[str], bytes]) -> ImageStore:
        """The same store for other nodes."""
        return ImageStore(self.root, self.limits, self.cache_pictures, self.cache_bytes, fetch)

    def __getstate__(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("root", "limits", "cache_pictures", "cache_bytes", "fetch")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._start_empty()

    # ---------------------------------------------------------------- in
    def put(self, data: bytes, limits: PixelLimits | None = None) -> ImageRef:
        """Store the bytes of a picture file under their sha256 and say how the picture is shown.

        Its pixels are checked, not kept. Raises DataError: unreadable, truncated, too large to decode, or thinner than 200:1.
        """
        source = hashlib.sha256(data).hexdigest()
        path = self._path(source)
        stored = path.is_file() and path.stat().st_size == len(data)
        if not stored:
            size_px = check_picture(data)
        elif source in self._sizes_px:
            size_px = self._sizes_px[source]
        else:
            size_px = picture_size_px(data)
        fitted = fit_size(*size_px, limits or self.limits)
        if not stored:
            self._write(path, data)
        self._sizes_px[source] = size_px
        return ImageRef(source, *fitted)

    def put_picture(self, picture: Image.Image, limits: PixelLimits | None = None) -> ImageRef:
        """Store a picture that a tool made, as PNG: the pixels are kept exactly. Raises DataError."""
        png = io.BytesIO()
        to_rgb(picture).save(png, "PNG", compress_level=1)
        return self.put(png.getvalue(), limits)

    def put_bytes(self, source: str, data: bytes) -> None:
        """Store what another node holds under `source`. Raises DataError where the bytes are not those."""
        if hashlib.sha256(data).hexdigest() != source:
            raise DataError(f"the {len(data)} bytes received for picture {source} have another hash")
        self._write(self._path(source), data)

    def load_sizes(self) -> None:
        """Sizes that `save_sizes` kept, so that pictures stored by earlier runs need no decoding to be known."""
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):  # none yet, or damaged: found again
            found = json.loads((self.root / SIZES_FILE).read_bytes())
            self._sizes_px.update({source: (int(width), int(height)) for source, (width, height) in found.items()})

    def save_sizes(self) -> None:
        """Keep the sizes of all pictures that this process knows, beside the pictures."""
        self.root.mkdir(parents=True, exist_ok=True)
        self._write(self.root / SIZES_FILE, json.dumps(self._sizes_px).encode())

    # ---------------------------------------------------------------- out
    def __contains__(self, source: str) -> bool:
        return self._path(source).is_file()

    def bytes_of(self, source: str) -> bytes:
        """The bytes as they were put. Raises DataError where this node has no such picture and cannot fetch it."""
        path = self._path(source)
        try:
            return path.read_bytes()
        except FileNotFoundError as error:
            if self.fetch is None:
                raise DataError(f"picture {source} is not in the image store {self.root} of this node") from error
        with self._only_one(path.parent):
            if not path.is_file():
                self.put_bytes(source, self.fetch(source))
        return path.read_bytes()

    def original(self, source: str) -> Image.Image:
        """The whole picture: RGB, upright, full size. Shared by all callers: copy it before drawing on it."""
        picture = self._originals.get(source)
        if picture is None:
            picture = decode_picture(self.bytes_of(source))
            self._keep_original(source, picture)
        return picture

    def original_size_px(self, source: str) -> tuple[int, int]:
        if source not in self._sizes_px:
            self._sizes_px[source] = picture_size_px(self.bytes_of(source))
        return self._sizes_px[source]

    def pixels(self, ref: ImageRef) -> np.ndarray:
        """What the model sees: uint8 [height_px, width_px, 3], C-contiguous, read-only (it is shared), deterministic."""
        shown = self._shown.get(ref.key)
        if shown is None:
            picture = cut(self.original(ref.source), ref.rotation_deg, ref.crop_box_px)
            if picture.size != (ref.width_px, ref.height_px):
                picture = picture.resize((ref.width_px, ref.height_px), Image.Resampling.BICUBIC)
            shown = np.ascontiguousarray(picture, dtype=np.uint8)
            shown.flags.writeable = False
            self._shown.put(ref.key, shown, shown.nbytes)
        return shown

    def picture(self, ref: ImageRef) -> Image.Image:
        """`pixels` as a picture of its own."""
        return Image.fromarray(self.pixels(ref).copy())

    def pixel_hash(self, ref: ImageRef) -> str:
        """Of what the model sees: equal wherever the picture is decoded, cut and resized alike."""
        return hashlib.sha256(self.pixels(ref).data).hexdigest()

    # ---------------------------------------------------------------- recipes
    def region_px(self, ref: ImageRef) -> Box:
        """What `ref` shows, in the pixels of its original after its rotation."""
        return ref.crop_box_px or (0, 0, *rotated_size(*self.original_size_px(ref.source), ref.rotation_deg))

    def original_box_px(self, ref: ImageRef) -> Box:
        """What `ref` shows, in the pixels of the unturned original: its bounding box, where it was turned."""
        return turn_box(self.region_px(ref), self.original_size_px(ref.source), ref.rotation_deg, 0)

    def crop(self, ref: ImageRef, shown_box: tuple[float, float, float, float], limits: PixelLimits | None = None) -> ImageRef:
        """Part of `ref`, cut from the original's pixels. `shown_box` is in the coordinates of the picture as shown.

        Rounded outward to whole pixels of the original and clipped to what `ref` shows, so a crop of a crop is a crop
        of the original. Raises DataError where nothing is left, or it is thinner than 200:1.
        """
        return self._cropped(ref, shown_box, (ref.width_px, ref.height_px), limits)

    def crop_unscaled(
        self, ref: ImageRef, box_px: tuple[float, float, float, float], limits: PixelLimits | None = None
    ) -> ImageRef:
        """As `crop`, with the box in original pixels counted from the top left of what `ref` shows."""
        left, top, right, bottom = self.region_px(ref)
        return self._cropped(ref, box_px, (right - left, bottom - top), limits)

    def rotate(self, ref: ImageRef, degrees: int, limits: PixelLimits | None = None) -> ImageRef:
        """`ref` turned counter-clockwise. Of a crop, the bounding box of the turned region is shown."""
        turned = (ref.rotation_deg + degrees) % 360
        size_px = self.original_size_px(ref.source)
        box = None if ref.crop_box_px is None else turn_box(ref.crop_box_px, size_px, ref.rotation_deg, turned)
        width, height = rotated_size(*size_px, turned) if box is None else (box[2] - box[0], box[3] - box[1])
        return ImageRef(ref.source, *fit_size(width, height, limits or self.limits), box, turned)

    # ---------------------------------------------------------------- inside
    def _cropped(
        self, ref: ImageRef, part: tuple[float, float, float, float], out_of: tuple[int, int], limits: PixelLimits | None
    ) -> ImageRef:
        if part[0] >= part[2] or part[1] >= part[3]:
            raise DataError(f"the box {part} is empty: its left must be below its right, its top below its bottom")
        box = scale_box(part, out_of, self.region_px(ref))
        if box[0] >= box[2] or box[1] >= box[3]:
            raise DataError(f"the box {part} lies outside the picture of {out_of[0]}x{out_of[1]} px")
        fitted = fit_size(box[2] - box[0], box[3] - box[1], limits or self.limits)
        return ImageRef(ref.source, *fitted, box, ref.rotation_deg)

    def _keep_original(self, source: str, picture: Image.Image) -> None:
        self._sizes_px[source] = picture.size
        self._originals.put(source, picture, picture.width * picture.height * 3)

    def _path(self, source: str) -> Path:
        return self.root / source[:2] / source

    @contextlib.contextmanager
    def _only_one(self, folder: Path) -> Iterator[None]:
        """Of all threads and processes of this node, one at a time in `folder`. The system frees the lock of a dead one."""
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=".")  # a reader sees all of a picture or none
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(aside, path)
        except BaseException:  # an interrupt too must not leave the part behind; it goes on to the caller
            Path(aside).unlink(missing_ok=True)
            raise
