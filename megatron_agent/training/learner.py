"""One update of everything that learns: the policy, a critic, the algorithm's own state. Importing it loads nothing heavy."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_agent.training.critic import ValueObjective
from megatron_agent.training.samples import credited
from megatron_agent.types import TrainSample

if TYPE_CHECKING:
    from megatron_agent.algorithms.base import Algorithm
    from megatron_agent.training.actor import Actor
    from megatron_agent.training.critic import Critic

CRITIC_FOLDER = "critic"  # in a checkpoint


def model_folders(checkpoint: Path) -> list[Path]:
    """Where the models of a checkpoint lie, the policy first."""
    critic = checkpoint / CRITIC_FOLDER
    return [checkpoint, critic] if critic.is_dir() else [checkpoint]


@dataclass
class Learner:
    """consumes: scored samples. waits for: the ranks of the policy and of what the algorithm needs beside it.
    produces: new weights of the policy, metrics. Checkpoints hold the critic in a folder of its own."""

    actor: Actor
    algorithm: Algorithm
    critic: Critic | None = None
    teacher: Actor | None = None

    @property
    def needs_start(self) -> bool:
        """Whether the weights that RL began with are needed again: by a reference or a new critic."""
        return self.critic is not None or (self.algorithm.needs_reference and self.teacher is None)

    async def begin(self, start: Path | None) -> None:
        """Before the first step and before a checkpoint is loaded. `start`: weights that RL began with, if they are not those
        of model.path."""
        if self.algorithm.needs_reference and self.teacher is None:
            await self.actor.keep_reference(start)
        if self.critic is not None:
            if start is not None:
                await self.critic.load_weights(start)
            await self.critic.reset_optimizer(self.algorithm.config.critic.lr, self.critic.config.clip_grad)
            await self.critic.to_host()

    async def update(self, samples: list[TrainSample], step: int, num_minibatches: int, temperature: float) -> dict[str, float]:
        """Step `step`, from 1, on scored samples -> metrics. Nothing happens without action tokens."""
        algorithm, rows = self.algorithm, [sample for sample in samples if sample.num_action_tokens]
        if not rows:
            return {}
        metrics: dict[str, float] = {}
        if algorithm.needs_reference and not algorithm.needs_full_kl:
            asked = self.teacher or self.actor
            await asked.fill_reference_logprobs(rows, temperature, own=self.teacher is None)
        if algorithm.needs_old_logprobs:
            metrics |= (await self.actor.fill_old_logprobs(rows, temperature)).means()
        if self.critic is not None:
            await self.actor.to_host()
            await self.critic.fill_values(rows)
        rows = credited(samples, algorithm)
        is_warm = True
        if self.critic is not None:
            options = algorithm.config.critic
            metrics |= await self.critic.update_values(rows, ValueObjective(options.value_clip), options.lr, num_minibatches)
            await self.critic.to_host()
            is_warm = step > options.warmup_steps
        if is_warm:
            lr = self.actor.config.lr_at(step)
            metrics = await self.actor.update(rows, algorithm, lr, num_minibatches, temperature) | metrics
        algorithm.end_step(metrics, len(samples))
        return metrics

    async def save(self, folder: Path) -> None:
        if self.critic is not None:
            (folder / CRITIC_FOLDER).mkdir()
            await self.critic.save(folder / CRITIC_FOLDER)
        await self.actor.save(folder)

    async def check_save(self) -> None:
        await asyncio.gather(*(model.check_save() for model in self._saved()))

    async def finish_save(self) -> None:
        await asyncio.gather(*(model.finish_save() for model in self._saved()))

    async def load(self, folder: Path) -> None:
        """A critic's part may be missing, in a run that begins to use one: it then stays as it is."""
        await self.actor.load(folder)
        for model, of_model in zip(self._saved()[1:], model_folders(folder)[1:]):
            await model.load(of_model)

    def _saved(self) -> list[Actor]:
        return [self.actor] if self.critic is None else [self.actor, self.critic]
