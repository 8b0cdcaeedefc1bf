"""Options that algorithms share; an algorithm's Config inherits or holds them."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_agent.errors import ConfigError

AGGREGATIONS = ("token-mean", "sequence-mean", "sequence-sum", "fixed-length")
KL_ESTIMATORS = ("k1", "k2", "k3", "low_variance", "abs", "full")
CORRECTIONS = ("none", "truncate", "mask", "clip")
LEVELS = ("token", "sequence", "geometric")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"algorithm.{name}={value!r}; allowed: {', '.join(allowed)}")


def within(name: str, value: float, low: float, high: float = float("inf")) -> None:
    if not low <= value <= high:
        upper = "or more" if high == float("inf") else f"to {high:g}"
        raise ConfigError(f"algorithm.{name}={value}: must be {low:g} {upper}")


@dataclass
class KLOptions:
    """Divergence from the reference policy (that of the first step). `coefficient` 0: none, and no reference is kept.

    `target` above 0 adapts the coefficient so that the mean KL of a token comes near it (arXiv 1909.08593, section 2.2),
    the slower the larger `horizon_trajectories`.
    """

    coefficient: float = 0.0
    where: str = "loss"  # or "reward": off the reward of every token, before advantages
    estimator: str = "k3"  # algorithms/divergence.py; "full" sums over the vocabulary
    target: float = 0.0
    horizon_trajectories: int = 10_000

    def __post_init__(self) -> None:
        one_of("kl.where", self.where, ("loss", "reward"))
        one_of("kl.estimator", self.estimator, KL_ESTIMATORS)
        within("kl.coefficient", self.coefficient, 0)
        within("kl.target", self.target, 0)
        within("kl.horizon_trajectories", self.horizon_trajectories, 1)
        if self.where == "reward" and self.estimator == "full":
            raise ConfigError("algorithm.kl.estimator='full' is for kl.where='loss'; a reward takes k1, k2, k3, ...")
        if self.target and not self.coefficient:
            raise ConfigError(f"algorithm.kl.target={self.target} needs a kl.coefficient above 0 to start from")


@dataclass
class ImportanceOptions:
    """Weights for tokens that were not sampled from the policy as the trainer computes it: w = exp(log-prob(trainer, before
    the update) - log-prob(engine)). The engine's rounding and its older weights are both in it.

    `truncate`: min(w, high) (truncated importance sampling: Ionides, 2008); `mask`: w, but 0 outside [low, high]. `level`: w
    of a token, of its whole sequence (the product), or the geometric mean of its sequence. The trust region stays around the
    weights before the update, as in the decoupled objective of arXiv 2505.24298, equation 5.
    `clip`: no weight; the ratio that the algorithm clips is exp(log-prob(new) - log-prob(engine)), as in arXiv 1707.06347,
    equation 7: what the updates since a token was sampled moved past the clip range gets no further push. A bad
    token that became likelier keeps all of its ratio: `dual_clip` bounds that. GSPO's range is far narrower than the gap of
    bfloat16 engines: give `stale_only` there.
    """

    correction: str = "none"
    level: str = "token"
    low: float = 0.5
    high: float = 2.0
    stale_only: bool = False  # w = 1 for tokens of the newest weight version
    max_lag: int = -1  # tokens that are more weight versions old get no gradient; -1: any age

    def __post_init__(self) -> None:
        one_of("importance.correction", self.correction, CORRECTIONS)
        one_of("importance.level", self.level, LEVELS)
        if self.correction == "clip" and self.level != "token":
            raise ConfigError(
                f"algorithm.importance.level={self.level!r} is of truncate and mask; correction='clip' has no weight"
            )
        within("importance.max_lag", self.max_lag, -1)
        if self.correction == "clip" and (self.low, self.high) != (type(self).low, type(self).high):
            raise ConfigError(
                f"algorithm.importance.low={self.low}, high={self.high} are of truncate and mask; with correction='clip' give "
                f"algorithm.clip_low, clip_high and dual_clip"
            )
        if not 0 <= self.low <= 1 <= self.high:
            raise ConfigError(f"algorithm.importance.low={self.low}, high={self.high}: 0 <= low <= 1 <= high")


@dataclass
class CriticOptions:
    """How a critic is trained: `warmup_steps` updates before the policy's first."""

    lr: float = 1e-5
    value_clip: float = 0.2  # a value moves by at most this from its old one; 0: freely
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        within("critic.value_clip", self.value_clip, 0)
        within("critic.warmup_steps", self.warmup_steps, 0)
        if not 0 < self.lr < float("inf"):
            raise ConfigError(f"algorithm.critic.lr={self.lr} must be above 0 and finite")


@dataclass
class Options:
    """What every policy gradient takes. `aggregation` of the tokens' losses, over the whole mini-batch:

    token-mean: mean over tokens; sequence-mean: mean over sequences of their token-mean; sequence-sum: mean over sequences
    of their sum; fixed-length: the same divided by `fixed_length_tokens` (no length bias, arXiv 2503.20783, section 3.2).
    """

    aggregation: str = "token-mean"
    fixed_length_tokens: int = 0
    entropy_coefficient: float = 0.0
    kl: KLOptions = field(default_factory=KLOptions)
    importance: ImportanceOptions = field(default_factory=ImportanceOptions)

    def __post_init__(self) -> None:
        one_of("aggregation", self.aggregation, AGGREGATIONS)
        if (self.aggregation == "fixed-length") != (self.fixed_length_tokens > 0):
            raise ConfigError(
                f"algorithm.fixed_length_tokens={self.fixed_length_tokens} with aggregation={self.aggregation!r}: fixed-length "
                f"needs a number above 0 (rollout.max_model_len, say), the others 0"
            )


@dataclass
class ClipOptions(Options):
    """The ratio of new to old probability counts within [1 - clip_low, 1 + clip_high]."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0  # above 1: a bad token's loss is at most this times |advantage| (arXiv 1912.09729, equation 5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.clip_low <= 1:
            raise ConfigError(f"algorithm.clip_low={self.clip_low}: must lie above 0 and be at most 1 (no lower end)")
        if not 0 < self.clip_high < float("inf"):
            raise ConfigError(f"algorithm.clip_high={self.clip_high}: must be above 0 and finite")
        if self.dual_clip and not 1 < self.dual_clip < float("inf"):
            raise ConfigError(f"algorithm.dual_clip={self.dual_clip}: must be 0 (off) or above 1")
