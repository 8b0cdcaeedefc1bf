"""The contract of a model family: everything that training, rollouts and weight transfer need to know about a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_agent.models.mapping import Entry
from megatron_agent.types import ImageRef

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer import TransformerConfig

    from megatron_agent.models.renderer import ChatRenderer
    from megatron_agent.training.layout import Layout


@dataclass(frozen=True)
class StageSpec:
    """The part of the model that one pipeline stage builds: decoder layers [first, last), embedding, head."""

    first_layer: int
    last_layer: int
    is_first: bool
    is_last: bool


class ModelFamily(ABC):
    """One model family, made from a Hugging Face checkpoint folder. `COMPONENT` of models/<family>/__init__.py."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    @abstractmethod
    def num_layers(self) -> int:
        """Decoder layers of the whole model."""

    def balanced(self, layout: Layout) -> Layout:
        """The layout with its decoder layers dealt to the pipeline's stages by cost, unless it says how itself."""
        if layout.num_chunks == 1 or layout.stage_layers:
            return layout
        return layout.with_costs(self.num_layers, *self.stage_costs(layout))

    @abstractmethod
    def check(self, layout: Layout, rollout_tensor_parallel: int = 1, whole_tower: bool = False) -> None:
        """Raise ConfigError when the model cannot be laid out so on either side (heads, layers against degrees).

        `whole_tower`: every rollout rank holds the whole vision tower."""

    @abstractmethod
    def transformer_config(self, layout: Layout, dtype: torch.dtype) -> TransformerConfig:
        """Hugging Face config -> Megatron's."""

    @abstractmethod
    def stage_costs(self, layout: Layout) -> tuple[float, float]:
        """What the first and the last stage carry besides decoder layers, in layers (time of a typical row)."""

    @abstractmethod
    def build(
        self, config: TransformerConfig, stage: StageSpec, chunk: int | None = None, head: str = "policy"
    ) -> torch.nn.Module:
        """The model of one stage, or of `chunk` of a virtual pipeline. `head`: "policy", or "value" for a critic.

        forward(MicroBatch) -> hidden states or, on the last stage, log-probs and entropy [2, R] of the targets (values
        [R] of a critic). Its tower for pictures, if any, is called `visual`.
        """

    @abstractmethod
    def table(self, layout: Layout, transformer_engine: bool, head: str = "policy") -> list[Entry]:
        """The mapping table. `transformer_engine`: Megatron's layers are TE's (fused norms), not the local ones."""

    @abstractmethod
    def renderer(self, path: str) -> ChatRenderer:
        """Messages <-> tokens, from the tokenizer in `path`."""

    @abstractmethod
    def positions(self, token_ids: Sequence[int], images: Sequence[ImageRef]) -> np.ndarray:
        """Rotary positions int64 [3, T] of one row (time, height, width)."""

    @abstractmethod
    def patches(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels uint8 [H, W, 3] of a picture -> float32 [patches, features] in the order the vision tower takes them."""

    @abstractmethod
    def grid(self, image: ImageRef) -> tuple[int, int, int]:
        """(time, rows, columns) of a picture in patches."""
