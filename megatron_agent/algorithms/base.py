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

    @abstractmethod
    def advantages(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        """One list [T] per sample, zero wherever `action_mask_T` is False."""

    @abstractmethod
    def loss(self, inputs: LossInputs) -> LossOutputs:
        """A pure function of per-token tensors [R]; no masking, no averaging, no communication."""
