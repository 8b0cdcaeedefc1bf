"""Zoom and rotate, several calls a turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_agent.envs.visual_toolbox_v2 import VisualToolboxV2
from megatron_agent.envs.zoom import Answer
from megatron_agent.errors import ConfigError, EnvError


class VisualToolboxV5(VisualToolboxV2):
    """The functions of `visual_toolbox_v2`; a turn's calls are carried out in order, each with an answer of its own.

    All of them see the pictures that were there when the turn began. Left out of DeepEyes' `visual_toolbox_v5`: one call
    that failed threw the others' pictures away, and calls beyond the bound were dropped without a word.
    """

    name = "visual_toolbox_v5"

    @dataclass
    class Config(VisualToolboxV2.Config):
        user_prompt: str = (
            "\nThink first. Then call tools, once or several times, each in <tool_call></tool_call>, "
            "or give the answer in <answer></answer>."
        )
        max_calls_per_turn: int = 3

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.max_calls_per_turn < 1:
                raise ConfigError(f"max_calls_per_turn is {self.max_calls_per_turn}; it must be 1 or more")

    config: Config

    def carry_out(self, calls: Sequence[str]) -> list[Answer]:
        bound = self.config.max_calls_per_turn
        answers = [self.call(text) for text in calls[:bound]]
        if len(calls) > bound:
            error = EnvError(f"a turn may hold {bound} calls; the last {len(calls) - bound} of {len(calls)} were left out")
            answers.append(self.failed(self.name, error))
        return answers


COMPONENT = VisualToolboxV5
