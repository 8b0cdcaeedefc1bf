"""Zooming by a tool call without nested arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from megatron_agent.envs.visual_toolbox_v3 import VisualToolboxV3
from megatron_agent.envs.zoom import Answer, ZoomTool


class VisualToolboxV4(VisualToolboxV3):
    """The object of `visual_toolbox_v3` between <tool_call> tags; the first of a turn counts and is rewarded.

    A turn without call and answer is told so and goes on. Left out of DeepEyes' `visual_toolbox_v4`: it asked for the key
    `function` and read the key `name`, and its pictures lay under a misspelt key and never reached the model.
    """

    name = "visual_toolbox_v4"
    answer_role: ClassVar[str] = "tool"
    call_tags: ClassVar[tuple[str, str]] = ("<tool_call>", "</tool_call>")
    ends_without_call: ClassVar[bool] = False

    @dataclass
    class Config(ZoomTool.Config):
        user_prompt: str = (
            "\nIf the pictures do not show enough, name another region, which is shown next:\n"
            '<tool_call>\n{"function": "zoom_in", "bbox_2d": [x1, y1, x2, y2], "label": "object"}\n</tool_call>\n'
            "Otherwise give the answer in <answer></answer>."
        )
        call_reward: float = 0.5

    def carry_out(self, calls: Sequence[str]) -> list[Answer]:
        return [self.call(calls[0])]


COMPONENT = VisualToolboxV4
