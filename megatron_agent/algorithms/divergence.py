"""How far a policy is from its reference: estimators per token, and the controller of their coefficient."""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import torch

from megatron_agent.algorithms.options import KLOptions

LIMIT_LOG_RATIO = 20.0  # exp(20) is finite with room to multiply
LIMIT_LOW_VARIANCE = 10.0
Array = TypeVar("Array", torch.Tensor, np.ndarray)


def kl_estimate(log_ratio: Array, estimator: str) -> Array:
    """KL(policy || reference) of a token sampled from the policy, from log policy - log reference
    (http://joschu.net/blog/kl-approx.html). As a loss, k2 has the gradient of the true KL in expectation, k1 has none.

    >>> kl_estimate(np.log(np.array([2.0])), "k3").round(4)
    array([0.1931])
    """
    xp = torch if isinstance(log_ratio, torch.Tensor) else np
    if estimator == "k1":
        return log_ratio
    if estimator == "abs":
        return abs(log_ratio)
    if estimator == "k2":
        return log_ratio**2 / 2
    inverse = xp.clip(-log_ratio, -LIMIT_LOG_RATIO, LIMIT_LOG_RATIO)
    k3 = xp.expm1(inverse) - inverse
    return k3 if estimator == "k3" else xp.clip(k3, -LIMIT_LOW_VARIANCE, LIMIT_LOW_VARIANCE)


def next_coefficient(options: KLOptions, coefficient: float, kl: float, num_trajectories: int) -> float:
    """beta (1 + e n / horizon), e = clip(kl / target - 1, -0.2, 0.2): arXiv 1909.08593, section 2.2, with n / horizon for its
    K = 0.1, as in its published code."""
    if not options.target or not math.isfinite(kl):
        return coefficient
    error = min(max(kl / options.target - 1, -0.2), 0.2)
    return coefficient * (1 + error * min(1.0, num_trajectories / options.horizon_trajectories))
