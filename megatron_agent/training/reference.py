"""The policy as it was at one moment: weights in host memory that the model computes with for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_agent.errors import TrainingError


class Reference:
    """Of the parameters that this rank holds. No collective."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.weights: list[torch.Tensor] = []

    def keep(self) -> None:
        """The weights as they are now."""
        pinned = torch.cuda.is_available()
        self.weights = [
            torch.empty_like(p, device="cpu", pin_memory=pinned).copy_(p.detach()) for p in self.module.parameters()
        ]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has these weights; its own come back bit for bit. Raises TrainingError when none are kept."""
        if not self.weights:
            raise TrainingError("no reference is kept: Learner.begin keeps the one that the algorithm asks for")
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, other in zip(self.module.parameters(), self.weights, strict=True):
            mine = parameter.detach().clone()
            parameter.copy_(other)
            other.copy_(mine)
