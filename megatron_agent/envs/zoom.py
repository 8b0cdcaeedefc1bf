"""What the picture tools of DeepEyes (arXiv 2505.14362) share: zooming in, turning, and the words that follow a picture.

All of them leave out what went wrong there: a box is in the coordinates of the picture that the model saw and is cut from
the original (there it was read as original pixels, although the model had seen a resized copy); boxes are clipped, and one
that cannot be used is answered with the reason; text of the model is parsed as JSON and never evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_agent.data.images import MAX_ASPECT_RATIO, PixelLimits
from megatron_agent.envs.base import Observation, PictureTool
from megatron_agent.errors import ConfigError, EnvError
from megatron_agent.types import Box, ImageRef, ToolCall

BoxXYXY = tuple[float, float, float, float]
Answer = tuple[Observation, ToolCall]


class ZoomTool(PictureTool):
    """`zoomed` and `rotated` are what the functions of a tool return; `user_prompt` follows once for all of a turn."""

    @dataclass
    class Config:
        """`coordinate_space` of boxes: "seen" (the picture as the model saw it) or "original" (its unscaled pixels).

        `user_prompt` follows the returned pictures, with the region for `{box}`; empty: nothing does. `call_reward` is
        given for a turn whose call worked.
        """

        coordinate_space: str = "seen"
        min_side_px: float = 4.0  # in the coordinates of the seen picture
        max_aspect_ratio: float = 100.0
        min_pixels: int = 3136
        max_pixels: int = 1003520  # 1,280 image tokens a crop
        user_prompt: str = "Give the answer in <answer></answer> if this shows enough; otherwise call a tool again."
        call_reward: float = 0.0

        def __post_init__(self) -> None:
            PixelLimits(self.min_pixels, self.max_pixels)
            if self.coordinate_space not in ("seen", "original"):
                raise ConfigError(f"coordinate_space is {self.coordinate_space!r}; allowed: seen, original")
            if not 1 <= self.max_aspect_ratio <= MAX_ASPECT_RATIO:
                raise ConfigError(f"max_aspect_ratio is {self.max_aspect_ratio}; allowed: 1 to {MAX_ASPECT_RATIO}")
            if self.min_side_px < 0:
                raise ConfigError(f"min_side_px is {self.min_side_px}; it must be 0 or more")
            if not math.isfinite(self.call_reward):
                raise ConfigError(f"call_reward is {self.call_reward}; it must be a finite number")

    config: Config

    def execute(self, action_string: str, **kwargs: Any) -> tuple[Any, float, bool, dict[str, Any]]:
        observation, reward, done, info = super().execute(action_string, **kwargs)
        looked = [call for call in info.get("tool_calls", ()) if call.ok]
        if not looked:
            return observation, reward, done, info
        box = looked[-1].box_px if self.config.coordinate_space == "original" else looked[-1].shown_box_px
        _append(observation, self.config.user_prompt.replace("{box}", str(list(box or looked[-1].box_px))))
        return observation, self.config.call_reward, done, info

    def zoomed(self, name: str, bbox_2d: Sequence[float], image_index: int = 0, space: str = "") -> Answer:
        """Part of a picture, in `space`, or in that of the configuration. Raises EnvError, DataError."""
        ref, space = self._picture(image_index), space or self.config.coordinate_space
        shown_box = self._shown_box(ref, bbox_2d, space)
        self._check_shape(shown_box)
        crop = self.store.crop_unscaled if space == "original" else self.store.crop
        x1, y1, x2, y2 = bbox_2d
        return self._look(name, crop(ref, (x1, y1, x2, y2), self._limits()), image_index, shown_box)

    def rotated(self, name: str, degrees: int, image_index: int = 0) -> Answer:
        """A picture turned counter-clockwise, all of it in view. Raises EnvError, DataError."""
        turned = self.store.rotate(self._picture(image_index), degrees, self._limits())
        return self._look(name, turned, image_index, None)

    def first_that_works(self, calls: Sequence[str]) -> list[Answer]:
        """Of several calls of a turn, the first that can be carried out; where none can, what is wrong with the first."""
        answers = (self.call(text) for text in calls)
        first = next(answers)
        return [first if first[1].ok else next((answer for answer in answers if answer[1].ok), first)]

    def _limits(self) -> PixelLimits:
        return PixelLimits(self.config.min_pixels, self.config.max_pixels)

    def _picture(self, image_index: int) -> ImageRef:
        if not 0 <= image_index < len(self.image_refs):
            raise EnvError(f"there is no picture {image_index}; there are {len(self.image_refs)}, counted from 0")
        return self.image_refs[image_index]

    def _shown_box(self, ref: ImageRef, bbox_2d: Sequence[float], space: str) -> BoxXYXY:
        """The box clipped to the picture, in its shown coordinates. Raises EnvError: not a box, or outside."""
        if len(bbox_2d) != 4:
            raise EnvError(f"bbox_2d must be [x1, y1, x2, y2], got {len(bbox_2d)} numbers")
        x_scale = y_scale = 1.0
        if space == "original":
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

    def _look(self, name: str, ref: ImageRef, image_index: int, shown_box: BoxXYXY | None) -> Answer:
        shown_box_px: Box | None = None
        if shown_box is not None:
            x1, y1, x2, y2 = shown_box
            shown_box_px = (int(x1), int(y1), -int(-x2 // 1), -int(-y2 // 1))
        call = ToolCall(name, True, image_index=image_index, box_px=self.store.original_box_px(ref), shown_box_px=shown_box_px)
        return Observation([{"role": self.answer_role, "content": [{"type": "image"}]}], [ref], "<image>"), call


def _append(observation: Observation, words: str) -> None:
    if not words:
        return
    message = observation.messages[-1]
    content = message["content"]
    if isinstance(content, list):
        content.append({"type": "text", "text": words})
    else:  # the last call of several failed
        words = f"\n{words}"
        message["content"] = f"{content}{words}"
    observation.text += words
