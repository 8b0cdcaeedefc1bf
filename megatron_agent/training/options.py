"""What the driver tells every rank about its model and optimizer; importing it loads nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_agent.types import ALL_TOKENS, Support


@dataclass(frozen=True)
class ModelOptions:
    """`recompute`: "none", "selective", "full". `head`: "policy", or "value" for a critic. `frozen`: "", "vision" or
    "language" (embedding, layers and vocabulary head), which then gets no gradient; "all" for a model that is only asked.
    `replicate_vision`: every tensor and context rank encodes all pictures. Log-probs are those of
    sampling from `support`; an algorithm that learns from no samples (Algorithm.on_samples) gets them of all tokens.
    """

    dtype: str
    seed: int = 0
    recompute: str = "none"
    head: str = "policy"
    frozen: str = ""
    replicate_vision: bool = False
    support: Support = ALL_TOKENS


@dataclass(frozen=True)
class OptimizerOptions:
    """Adam's. `clip_grad`: norm, 0: off. The vision tower's rate is `lr` times `vision_lr_scale`."""

    lr: float
    weight_decay: float
    betas: tuple[float, float]
    clip_grad: float
    vision_lr_scale: float = 1.0
