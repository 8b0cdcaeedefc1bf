"""Zoom and rotate as DeepEyes first had them: a call is rewarded, and a turn must call or answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from megatron_agent.envs.base import model_function
from megatron_agent.envs.zoom import Answer, ZoomTool


class VisualToolbox(ZoomTool):
    """The box is called `bbox`; the first call of a turn counts; a turn without call and answer is told so and goes on.

    Left out of DeepEyes' `visual_toolbox`: its pictures lay under a misspelt key and never reached the model, boxes were
    not checked, rotating cut the corners off, and the prompt called its counter-clockwise angle clockwise.
    """

    name = "visual_toolbox"
    answer_role: ClassVar[str] = "user"
    ends_without_call: ClassVar[bool] = False

    @dataclass
    class Config(ZoomTool.Config):
        user_prompt: str = "This is what the tool call returned."
        call_reward: float = 0.5

    def carry_out(self, calls: Sequence[str]) -> list[Answer]:
        return [self.call(calls[0])]

    @model_function
    def image_zoom_in_tool(self, bbox: list[float], image_path: str = "") -> Answer:
        """Zoom in on a region of the picture.

        bbox: The region as [x1, y1, x2, y2] in pixels of the picture, from its top left corner.
        image_path: Not used: there is one picture.
        """
        return self.zoomed("image_zoom_in_tool", bbox)

    @model_function
    def image_rotate_tool(self, angle: int, image_path: str = "") -> Answer:
        """Rotate the picture.

        angle: Degrees, counter-clockwise.
        image_path: Not used: there is one picture.
        """
        return self.rotated("image_rotate_tool", angle)


COMPONENT = VisualToolbox
