"""The critic: the actor's backbone with a value head, over the same ranks' machinery (megatron.py, actor.py).

A value is the estimate at the token before an action: what the policy knew when it chose it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megatron_agent.errors import ConfigError
from megatron_agent.training.actor import Actor

if TYPE_CHECKING:
    import torch

    from megatron_agent.training.loss import LossStats
    from megatron_agent.types import BatchSize, MicroBatch, TrainSample


@dataclass(frozen=True)
class ValueObjective:
    """Half the squared error of values against returns; estimates move by at most `clip` from those before the update
    (0: no clipping), as in the PPO of OpenAI baselines (ppo2/model.py)."""

    clip: float = 0.2
    on_samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.clip < 0:
            raise ConfigError(f"critic's value clip={self.clip} must be 0 (off) or more")

    def loss(self, values_R: torch.Tensor, batch: MicroBatch, size: BatchSize, stats: LossStats) -> torch.Tensor:
        """The micro-batch's share of the token-mean over the mini-batch's action tokens."""
        returns = batch.returns_R
        if returns is None:
            raise ValueError("the samples have no returns: fill returns_T before the critic's update")
        error = (values_R - returns).square()
        moved = values_R.new_zeros(values_R.shape)
        if self.clip and batch.old_values_R is not None:
            old = batch.old_values_R
            clipped = (old + (values_R - old).clamp(-self.clip, self.clip) - returns).square()
            moved = (clipped > error).float()
            error = error.maximum(clipped)
        stats.num_tokens += values_R.numel()
        for name, found in (
            ("loss", error.detach() / 2),
            ("value_clip_fraction", moved),
            ("value", values_R.detach()),
            ("return", returns),
            ("return_squared", returns.square()),
            ("residual", returns - values_R.detach()),
            ("residual_squared", (returns - values_R.detach()).square()),
        ):
            stats.add(name, found)
        return error.sum() / (2 * size.num_tokens)


def explained_variance(means: dict[str, float]) -> float:
    """1 - Var(return - value) / Var(return), from ValueObjective's statistics; 0 where returns do not vary."""
    variance = means["return_squared"] - means["return"] ** 2
    residual = means["residual_squared"] - means["residual"] ** 2
    return 1 - residual / variance if variance > 1e-12 else 0.0


class Critic(Actor):
    """All ranks of a critic behind one object; `save`, `load` and the rest as the actor's.

    It starts from a policy: a Hugging Face folder, and by `load_weights` a training checkpoint. The value head starts at
    zero.
    """

    head = "value"

    async def fill_values(self, samples: list[TrainSample]) -> None:
        """`values_T` of every sample: estimates at its action tokens, 0 elsewhere."""
        for index, values_T in (await self._per_token(samples, 1.0))[0].items():
            samples[index].values_T = values_T

    async def update_values(
        self, samples: list[TrainSample], objective: ValueObjective, lr: float, num_minibatches: int = 1
    ) -> dict[str, float]:
        """Optimizer steps towards `returns_T` -> metrics, "value_explained_variance" among them. No samples: nothing."""
        if not samples:
            return {}
        await self.to_device()
        total, norms, _ = await self._take_steps(samples, objective, lr, num_minibatches, temperature=1.0)
        means = total.means()
        return {
            "value_loss": means["loss"],
            "value_mean": means["value"],
            "value_clip_fraction": means["value_clip_fraction"],
            "value_explained_variance": explained_variance(means),
            "value_grad_norm": norms["grad_norm"],
            "value_lr": lr,
        }
