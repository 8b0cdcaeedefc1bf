"""The contract of an RL algorithm: where credit goes. One file per algorithm; masks and denominators live elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_agent.types import LossInputs, LossOutputs, TrainSample


@dataclass
class NoOptions:
    pass


class Algorithm(ABC):
    """`COMPONENT` of an algorithm's file. `advantages` runs on the driver, `loss` on every rank of the last stage.

    What an algorithm needs is declared, and filled in before `advantages`: see the first attributes.
    """

    needs_critic: ClassVar[bool] = False  # `values_T` of every sample; config.critic holds CriticOptions
    needs_greedy: ClassVar[bool] = False  # `baseline_reward`: one more trajectory of every task, at temperature 0
    on_samples: ClassVar[bool] = True  # log-probs are of what sampling chooses among (types.Support), not of all tokens
    max_sampling_rounds: int = 1  # how often new tasks replace groups that `keep_group` refused
    aggregation: str = "token-mean"  # options.AGGREGATIONS
    fixed_length_tokens: int = 0

    Config: ClassVar[type[Any]] = NoOptions

    def __init__(self, config: Any = None) -> None:
        self.config: Any = config or self.Config()

    @property
    def needs_reference(self) -> bool:
        """`reference_logprobs_T` (unless `needs_full_kl`): of the policy at the first step, or of `teacher_path`."""
        return False

    @property
    def needs_full_kl(self) -> bool:
        """`LossInputs.full_kl_R`, from the reference over the whole vocabulary."""
        return False

    @property
    def needs_old_logprobs(self) -> bool:
        """`old_logprobs_T` before `advantages`: one more pass of the trainer."""
        return False

    @property
    def teacher_path(self) -> str:
        """Hugging Face folder of the model that is the reference; empty: the policy itself, as RL began."""
        return ""

    def state(self) -> dict[str, Any]:
        """What must survive a restart (a KL controller's coefficient, ...), as JSON. Taken after every step."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027 (most algorithms have none)
        """The inverse of `state`, called before the first step of a run that goes on."""

    def end_step(self, metrics: Mapping[str, float], num_trajectories: int) -> None:  # noqa: B027
        """After the update, with its metrics."""

    def keep_group(self, samples: Sequence[TrainSample]) -> bool:
        """Whether the scored trajectories of a task are worth training on."""
        return True

    @abstractmethod
    def advantages(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        """One list [T] per sample, zero wherever `action_mask_T` is False."""

    def returns(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        """What a critic's values should have been: one list [T] per sample. Only with `needs_critic`."""
        raise NotImplementedError(f"{type(self).__name__} has no critic")

    @abstractmethod
    def loss(self, inputs: LossInputs) -> LossOutputs:
        """A pure function of per-token tensors [R]; no masking, no averaging, no communication."""
