"""Zoom and rotate, one call a turn: what DeepEyes' published models were trained with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from megatron_agent.envs.base import model_function
from megatron_agent.envs.zoom import Answer, ZoomTool


class VisualToolboxV2(ZoomTool):
    """`image_zoom_in_tool` cuts a region from the original picture, `image_rotate_tool` turns a picture.

    The last call of a turn counts; an answer, or no call, ends the episode. Left out of DeepEyes' `visual_toolbox_v2`:
    that rotating cut the corners off, and that only the first picture could be looked at.
    """

    name = "visual_toolbox_v2"
    argument_aliases: ClassVar[dict[str, str]] = {"img_idx": "image_index"}

    @dataclass
    class Config(ZoomTool.Config):
        rotate: bool = True  # offer image_rotate_tool

    config: Config

    @model_function
    def image_zoom_in_tool(self, bbox_2d: list[float], label: str = "", image_index: int = 0) -> Answer:
        """Zoom in on a region of a picture.

        bbox_2d: The region as [x1, y1, x2, y2] in pixels of the picture, from its top left corner.
        label: What is looked for.
        image_index: Which picture, in the order in which they were shown; 0 is the first.
        """
        return self.zoomed("image_zoom_in_tool", bbox_2d, image_index)

    @model_function
    def image_rotate_tool(self, angle: int, image_index: int = 0) -> Answer:
        """Rotate a picture.

        angle: Degrees, counter-clockwise.
        image_index: Which picture, in the order in which they were shown; 0 is the first.
        """
        return self.rotated("image_rotate_tool", angle, image_index)

    def functions(self) -> dict[str, Callable[..., Answer]]:
        functions = super().functions()
        if not self.config.rotate:
            del functions["image_rotate_tool"]
        return functions


COMPONENT = VisualToolboxV2
