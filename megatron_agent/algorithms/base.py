"""The contract of an RL algorithm: where credit goes. One file per algorithm; masks and denominators live elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_agent.types import LossInputs, LossOutputs, TrainSample


class Algorithm(ABC):
    """`COMPONENT` of an algorithm's file. `advantages` runs on the driver, `loss` on every rank of the last stage."""

    needs_critic: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False

    @dataclass
    class Config:
        pass

    def __init__(self, config: Any = None) -> None:
        self.config: Any = config or self.Config()

    def state(self) -> dict[str, Any]:
        """What must survive a restart (a KL controller's coefficient, ...), as JSON. Taken after every step."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027 (most algorithms have none)
        """The inverse of `state`, called before the first step of a run that goes on."""

    @abstractmethod
    def advantages(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        """One list [T] per sample, zero wherever `action_mask_T` is False."""

    @abstractmethod
    def loss(self, inputs: LossInputs) -> LossOutputs:
        """A pure function of per-token tensors [R]; no masking, no averaging, no communication."""
