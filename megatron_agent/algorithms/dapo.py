"""DAPO (arXiv 2503.14476): clip-higher (equation 10), dynamic sampling (11), token-level loss (12), overlong shaping (13)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_agent.algorithms.advantages import group_centred, is_flat, spread
from megatron_agent.algorithms.options import ClipOptions, within
from megatron_agent.algorithms.policy_gradient import PolicyGradient
from megatron_agent.errors import ConfigError
from megatron_agent.types import TrainSample


class DAPO(PolicyGradient):
    """GRPO's advantage; groups of equal rewards are replaced by new ones, long answers lose up to 1 of their reward."""

    @dataclass
    class Config(ClipOptions):
        clip_high: float = 0.28
        dynamic_sampling: bool = True
        max_sampling_rounds: int = 10  # then the step goes on with the groups that it has
        overlong_max_tokens: int = 0  # action tokens at which the reward is less by 1; 0: no shaping
        overlong_cache_tokens: int = 0  # the last tokens before, over which the loss of reward grows

        def __post_init__(self) -> None:
            super().__post_init__()
            within("max_sampling_rounds", self.max_sampling_rounds, 1)
            if self.overlong_max_tokens and not 0 < self.overlong_cache_tokens <= self.overlong_max_tokens:
                raise ConfigError(
                    f"algorithm.overlong_cache_tokens={self.overlong_cache_tokens} must be above 0 and at most "
                    f"overlong_max_tokens={self.overlong_max_tokens}"
                )

    def __init__(self, config: Config | None = None) -> None:
        super().__init__(config)
        self.max_sampling_rounds = self.config.max_sampling_rounds if self.config.dynamic_sampling else 1

    def keep_group(self, samples: Sequence[TrainSample]) -> bool:
        return not self.config.dynamic_sampling or not is_flat([sample.reward for sample in samples])

    def overlong_penalty(self, num_tokens: int) -> float:
        """0 up to max - cache tokens, then falling to -1 at max (in the paper rewards are -1 and 1)."""
        longest, cache = self.config.overlong_max_tokens, self.config.overlong_cache_tokens
        return -min(1.0, max(0.0, (num_tokens - (longest - cache)) / cache)) if longest else 0.0

    def advantages(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        rewards = self.total_rewards(samples)
        shaped = [r + self.overlong_penalty(s.num_action_tokens) for s, r in zip(samples, rewards)]
        return spread(samples, group_centred(samples, shaped, normalise_std=True))


COMPONENT = DAPO
