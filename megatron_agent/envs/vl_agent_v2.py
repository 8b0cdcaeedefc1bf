"""Zooming by a tool call that names a region."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_agent.envs.base import model_function
from megatron_agent.envs.functional import json_value, parse_call
from megatron_agent.envs.zoom import Answer, ZoomTool


class VLAgentV2(ZoomTool):
    """`zoom_in` takes a `region`: [x1, y1, x2, y2], {"bbox_2d": [...]}, or either of them as a text of JSON.

    The first call of a turn that works counts; the picture comes back as a message of the user. Left out of DeepEyes'
    `vl_agent_v2`: it never returned the box that it had read, so that no call could ever work.
    """

    name = "vl_agent_v2"
    answer_role: ClassVar[str] = "user"
    argument_aliases: ClassVar[dict[str, str]] = {"bbox_2d": "region"}

    @dataclass
    class Config(ZoomTool.Config):
        user_prompt: str = (
            "\nThis is the region {box}, enlarged. Go on with the next thought. If you know the answer, give it in "
            "<answer></answer>; otherwise call the function again."
        )

    def carry_out(self, calls: Sequence[str]) -> list[Answer]:
        return self.first_that_works(calls)

    def parse(self, call: str) -> tuple[str, dict[str, Any]]:
        name, arguments = parse_call(call)
        return name, {key: _unwrapped(value) if key in ("region", "bbox_2d") else value for key, value in arguments.items()}

    @model_function
    def zoom_in(self, region: list[float], label: str = "") -> Answer:
        """Zoom in on a region of the picture.

        region: The region as [x1, y1, x2, y2] in pixels of the picture, from its top left corner.
        label: What is looked for.
        """
        return self.zoomed("zoom_in", region)


def _unwrapped(region: Any) -> Any:
    """The list of numbers in a text of JSON, an object with `bbox_2d`, or an object in a text. Raises EnvError."""
    for _ in range(2):
        region = json_value(region, "the region") if isinstance(region, str) else region
        region = region.get("bbox_2d") if isinstance(region, dict) else region
    return region


COMPONENT = VLAgentV2
