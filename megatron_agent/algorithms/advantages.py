"""From rewards to advantages: baselines within a group, returns and GAE over action tokens, whitening. Pure functions.

`[A]` arrays hold a row's action tokens alone, in order: prompts and observations are not there, credit passes over them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from megatron_agent.types import TrainSample

EPS = 1e-6  # rewards, or advantages, that differ by less are equal


def spread(samples: Sequence[TrainSample], values: Sequence[float]) -> list[list[float]]:
    """One value per sample -> one list [T] per sample: the value on action tokens, 0 elsewhere."""
    return [[value if own else 0.0 for own in sample.action_mask_T] for sample, value in zip(samples, values, strict=True)]


def to_rows(samples: Sequence[TrainSample], values_A: Sequence[np.ndarray]) -> list[list[float]]:
    """[A] per sample -> [T] per sample, 0 where the token is not an action."""
    rows = []
    for sample, values in zip(samples, values_A, strict=True):
        of_actions = iter(values.tolist())
        rows.append([next(of_actions) if own else 0.0 for own in sample.action_mask_T])
    return rows


def actions(sample: TrainSample, values_T: Sequence[float]) -> np.ndarray:
    """[T] -> float64 [A]."""
    return np.asarray(values_T, dtype=np.float64)[np.asarray(sample.action_mask_T, dtype=bool)]


def members(samples: Sequence[TrainSample]) -> list[list[int]]:
    """Indices of the samples of each group, in order of appearance."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        groups[sample.group_id].append(index)
    return list(groups.values())


def is_flat(rewards: Sequence[float]) -> bool:
    """Nothing can be compared: one reward, or equal ones."""
    return len(rewards) < 2 or max(rewards) - min(rewards) <= EPS


def group_centred(samples: Sequence[TrainSample], rewards: Sequence[float], normalise_std: bool = False) -> list[float]:
    """r - mean of the group, over its unbiased std if asked; 0 in groups of one or of equal rewards."""
    values = [0.0] * len(samples)
    for group in members(samples):
        found = [rewards[i] for i in group]
        if is_flat(found):
            continue
        mean = sum(found) / len(found)
        std = (sum((r - mean) ** 2 for r in found) / (len(found) - 1)) ** 0.5
        for i in group:
            values[i] = (rewards[i] - mean) / (std if normalise_std else 1.0)
    return values


def leave_one_out(samples: Sequence[TrainSample], rewards: Sequence[float]) -> list[float]:
    """r - mean of the others of its group: n / (n - 1) times r - mean; 0 in groups of one."""
    values = group_centred(samples, rewards)
    for group in members(samples):
        for i in group:
            values[i] *= len(group) / max(1, len(group) - 1)
    return values


def token_rewards(sample: TrainSample) -> np.ndarray:
    """[A]: process rewards at the last tokens of their turns, what else the reward holds at the last token of all."""
    if not sample.num_action_tokens:
        return np.zeros(0)
    rewards = actions(sample, sample.process_rewards_T or [0.0] * sample.num_tokens)
    rewards[-1] += sample.reward - rewards.sum()
    return rewards


def returns_to_go(rewards_A: np.ndarray, discount: float) -> np.ndarray:
    """G_t = r_t + discount G_{t+1}."""
    found, after = np.zeros_like(rewards_A), 0.0
    for t in reversed(range(len(rewards_A))):
        found[t] = after = rewards_A[t] + discount * after
    return found


def gae(rewards_A: np.ndarray, values_A: np.ndarray, discount: float, trace: float) -> np.ndarray:
    """Generalised advantage estimates (arXiv 1506.02438, equation 16); the value after the last action is 0."""
    after = np.append(values_A[1:], 0.0)[: len(values_A)]
    return returns_to_go(rewards_A + discount * after - values_A, discount * trace)


def whitened(values_A: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Mean 0 and (biased) std 1 over all action tokens of the batch; all 0 when they are equal."""
    everything = np.concatenate([*values_A, np.zeros(0)])
    if not len(everything):
        return list(values_A)
    mean, std = everything.mean(), everything.std()
    return [(values - mean) / std if std > EPS else np.zeros_like(values) for values in values_A]
