"""Zooming by any JSON block in a code fence that holds a box."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_agent.envs.visual_toolbox_v3 import VisualToolboxV3
from megatron_agent.envs.zoom import Answer


class VLAgentV3(VisualToolboxV3):
    """As `visual_toolbox_v3`, but the first block of a turn that works counts, not the last.

    Left out of DeepEyes' `vl_agent_v3`: boxes with fractions and boxes without a label were refused without a reason.
    """

    name = "vl_agent_v3"

    def carry_out(self, calls: Sequence[str]) -> list[Answer]:
        return self.first_that_works(calls)


COMPONENT = VLAgentV3
