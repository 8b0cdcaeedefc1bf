"""Zooming by a JSON block in a code fence, as models ground objects that know no tool calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_agent.envs.base import model_function
from megatron_agent.envs.functional import parse_flat_call
from megatron_agent.envs.zoom import Answer, ZoomTool


class VisualToolboxV3(ZoomTool):
    """```json {"function": "zoom_in", "bbox_2d": [...], "label": ...} ```, or a list that begins with such an object.

    The last block of a turn counts; the picture comes back as a message of the user. Left out of DeepEyes'
    `visual_toolbox_v3`: it read the keys of the object in place of the object, so that no call could ever work.
    """

    name = "visual_toolbox_v3"
    answer_role: ClassVar[str] = "user"
    call_tags: ClassVar[tuple[str, str]] = ("```json", "```")

    @dataclass
    class Config(ZoomTool.Config):
        user_prompt: str = (
            "\nThis is the region {box}, enlarged. If the pictures show enough, give the answer in <answer></answer>. "
            "Otherwise name another region, which is shown next:\n"
            '```json\n{"function": "zoom_in", "bbox_2d": [x1, y1, x2, y2], "label": "object"}\n```'
        )

    def parse(self, call: str) -> tuple[str, dict[str, Any]]:
        return parse_flat_call(call, "zoom_in")

    @model_function
    def zoom_in(self, bbox_2d: list[float], label: str = "") -> Answer:
        """Zoom in on a region of the picture.

        bbox_2d: The region as [x1, y1, x2, y2] in pixels of the picture, from its top left corner.
        label: What is looked for.
        """
        return self.zoomed("zoom_in", bbox_2d)


COMPONENT = VisualToolboxV3
