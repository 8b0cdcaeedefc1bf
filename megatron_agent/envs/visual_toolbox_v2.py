"""Zoom and rotate: the tools of DeepEyes (arXiv 2505.14362), with boxes in the coordinates of the picture the model saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from megatron_agent.data.images import MAX_ASPECT_RATIO, PixelLimits
from megatron_agent.envs.base import Observation, PictureTool, model_function
from megatron_agent.errors import ConfigError, EnvError
from megatron_agent.types import Box, ImageRef, Message, ToolCall

BoxXYXY = tuple[float, float, float, float]


class VisualToolboxV2(PictureTool):
    """`image_zoom_in_tool` cuts a region from the original picture, `image_rotate_tool` turns a picture."""

    name = "visual_toolbox_v2"
    argument_aliases: ClassVar[dict[str, str]] = {"img_idx": "image_index"}

    @dataclass
    class Config:
        """`coordinate_space` of boxes: "seen" (the picture as the model saw it) or "original" (its unscaled pixels).

        `user_prompt` follows the returned picture; empty: nothing does.
        """

        coordinate_space: str = "seen"
        min_side_px: float = 4.0  # in the coordinates of the seen picture
        max_aspect_ratio: float = 100.0
        min_pixels: int = 3136
        max_pixels: int = 1003520  # 1,280 image tokens a crop
        user_prompt: str = "Give the answer in <answer></answer> if this shows enough; otherwise call a tool again."
        rotate: bool = True

        def __post_init__(self) -> None:
            PixelLimits(self.min_pixels, self.max_pixels)
            if self.coordinate_space not in ("seen", "original"):
                raise ConfigError(f"coordinate_space is {self.coordinate_space!r}; allowed: seen, original")
            if not 1 <= self.max_aspect_ratio <= MAX_ASPECT_RATIO:
                raise ConfigError(f"max_aspect_ratio is {self.max_aspect_ratio}; allowed: 1 to {MAX_ASPECT_RATIO}")
            if self.min_side_px < 0:
                raise ConfigError(f"min_side_px is {self.min_side_px}; it must be 0 or more")

    config: Config

    @model_function
    def image_zoom_in_tool(self, bbox_2d: list[float], label: str = "", image_index: int = 0) -> tuple[Observation, ToolCall]:
        """Zoom in on a region of a picture.

        bbox_2d: The region as [x1, y1, x2, y2] in pixels of the picture, from its top left corner.
        label: What is looked for.
        image_index: Which picture, in the order in which they were shown; 0 is the first.
        """
        ref = self._picture(image_index)
        shown_box = self._shown_box(ref, bbox_2d)
        self._check_shape(shown_box)
        crop = self.store.crop_unscaled if self.config.coordinate_space == "original" else self.store.crop
        x1, y1, x2, y2 = bbox_2d
        return self._look("image_zoom_in_tool", crop(ref, (x1, y1, x2, y2), self._limits()), image_index, shown_box)

    @model_function
    def image_rotate_tool(self, angle: int, image_index: int = 0) -> tuple[Observation, ToolCall]:
        """Rotate a picture.

        angle: Degrees, counter-clockwise.
        image_index: Which picture, in the order in which they were shown; 0 is the first.
        """
        turned = self.store.rotate(self._picture(image_index), angle, self._limits())
        return self._look("image_rotate_tool", turned, image_index, None)

    def functions(self) -> dict[str, Callable[..., tuple[Observation, ToolCall]]]:
        functions = super().functions()
        if not self.config.rotate:
            del functions["image_rotate_tool"]
        return functions

    def _limits(self) -> PixelLimits:
        return PixelLimits(self.config.min_pixels, self.config.max_pixels)

    def _picture(self, image_index: int) -> ImageRef:
        if not 0 <= image_index < len(self.image_refs):
            raise EnvError(f"there is no picture {image_index}; there are {len(self.image_refs)}, counted from 0")
        return self.image_refs[image_index]

    def _shown_box(self, ref: ImageRef, bbox_2d: list[float]) -> BoxXYXY:
        """The box clipped to the picture, in its shown coordinates. Raises EnvError: not a box, or outside."""
        if len(bbox_2d) != 4:
            raise EnvError(f"bbox_2d must be [x1, y1, x2, y2], got {len(bbox_2d)} numbers")
        x_scale = y_scale = 1.0
        if self.config.coordinate_space == "original":
            left, top, right, bottom = self.store.region_px(ref)
            x_scale, y_scale = ref.width_px / (right - left), ref.height_px / (bottom - top)
        x1, x2 = (min(max(x * x_scale, 0.0), ref.width_px) for x in bbox_2d[::2])
        y1, y2 = (min(max(y * y_scale, 0.0), ref.height_px) for y in bbox_2d[1::2])
        if x1 >= x2 or y1 >= y2:
            raise EnvError(
                f"bbox_2d {bbox_2d} holds nothing of the picture: x1 < x2 and y1 < y2 must hold within "
                f"{ref.width_px / x_scale:.0f} x {ref.height_px / y_scale:.0f} pixels"
            )
        return x1, y1, x2, y2

    def _check_shape(self, box: BoxXYXY) -> None:
        width, height = box[2] - box[0], box[3] - box[1]
        if min(width, height) < self.config.min_side_px:
            raise EnvError(
                f"the region of {width:g} x {height:g} pixels is too small; at least {self.config.min_side_px:g} a side"
            )
        if max(width, height) > self.config.max_aspect_ratio * min(width, height):
            raise EnvError(
                f"the region of {width:g} x {height:g} pixels is too thin; at most {self.config.max_aspect_ratio:g} to 1"
            )

    def _look(self, name: str, ref: ImageRef, image_index: int, shown_box: BoxXYXY | None) -> tuple[Observation, ToolCall]:
        content: list[dict[str, str]] = [{"type": "image"}]
        if self.config.user_prompt:
            content.append({"type": "text", "text": self.config.user_prompt})
        message: Message = {"role": "tool", "content": content}
        shown_box_px: Box | None = None
        if shown_box is not None:
            x1, y1, x2, y2 = shown_box
            shown_box_px = (int(x1), int(y1), -int(-x2 // 1), -int(-y2 // 1))
        call = ToolCall(name, True, image_index=image_index, box_px=self.store.original_box_px(ref), shown_box_px=shown_box_px)
        return Observation([message], [ref], "<image>" + self.config.user_prompt), call


COMPONENT = VisualToolboxV2
