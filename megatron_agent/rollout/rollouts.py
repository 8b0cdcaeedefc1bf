"""Episodes against the engines: what turns a list of tasks into groups of scored trajectories."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_agent.rollout.agent_loop import AgentConfig, run_episode
from megatron_agent.rollout.collect import collect, trajectory_seed
from megatron_agent.rollout.engine import RolloutConfig, Sampling
from megatron_agent.rollout.scripted import check_scripted, scripted_generate
from megatron_agent.rollout.tool_calls import ToolRunner
from megatron_agent.types import Task, Trajectory, TrajectoryGroup

if TYPE_CHECKING:
    from megatron_agent.data.images import ImageStore
    from megatron_agent.envs.base import EnvSession
    from megatron_agent.models.renderer import ChatRenderer
    from megatron_agent.rewards.base import RewardBase
    from megatron_agent.rollout.agent_loop import Generate
    from megatron_agent.rollout.pool import EnginePool

IN_FLIGHT_PER_ENGINE = 2  # times max_num_seqs: enough that no engine waits for an episode to start


class Rollouts:
    """consumes: tasks. waits for: engines, tools, the judge. produces: TrajectoryGroups, in the order of the tasks."""

    def __init__(
        self,
        pool: EnginePool,
        renderer: ChatRenderer,
        store: ImageStore,
        reward: RewardBase,
        agent: AgentConfig,
        config: RolloutConfig,
        env_configs: dict[str, Any],
        seed: int,
    ) -> None:
        self.pool, self.renderer, self.store, self.reward = pool, renderer, store, reward
        self.agent, self.config, self.env_configs, self.seed = agent, config, env_configs, seed
        self.tools = ToolRunner(agent.concurrent_workers, agent.tool_timeout_s)

    async def sample(self, tasks: Sequence[Task], step: int) -> list[TrajectoryGroup]:
        """`rollout.group_size` episodes of each task at the run's temperature; reproducible from (seed, step, task)."""
        return await self._collect(tasks, self.config.group_size, self.config.temperature, step)

    async def greedy(self, tasks: Sequence[Task]) -> list[Trajectory]:
        """One episode of each task at temperature 0."""
        return [group.trajectories[0] for group in await self._collect(tasks, 1, 0.0, 0)]

    async def scripted(self, tasks: Sequence[Task]) -> list[Trajectory]:
        """Episodes whose turns are the tasks' scripts; tools run for real, nothing is scored.

        Raises DataError, naming the task, for a script that does not go through: a failed tool call, turns left over, no
        answer.
        """
        trajectories = []
        for task in tasks:
            generate = scripted_generate(task, self.renderer)
            trajectory = await self._episode(task, 0, generate, Sampling())
            check_scripted(trajectory)
            trajectories.append(trajectory)
        return trajectories

    async def _episode(self, task: Task, index: int, generate: Generate, sampling: Sampling) -> Trajectory:
        return await run_episode(
            task, index, generate, self.renderer, self._session, self.agent, sampling, self.config.max_model_len, self.tools
        )

    async def _collect(self, tasks: Sequence[Task], num_samples: int, temperature: float, step: int) -> list[TrajectoryGroup]:
        in_flight = IN_FLIGHT_PER_ENGINE * self.config.max_num_seqs * self.config.num_engines

        async def run_one(task: Task, index: int) -> Trajectory:
            sampling = Sampling(
                temperature=temperature,
                top_p=self.config.top_p if temperature else 1.0,
                top_k=self.config.top_k if temperature else 0,
                seed=trajectory_seed(self.seed, step, task.task_id, index),
                banned_token_ids=tuple(sorted(self.renderer.forbidden_ids)) if self.config.ban_special_tokens else (),
            )
            generate = functools.partial(self.pool.generate, f"{step}/{task.task_id}/{index}")
            return await self._episode(task, index, generate, sampling)

        if not self.agent.show_tqdm:
            return await collect(tasks, num_samples, run_one, self.reward, in_flight)
        from tqdm import tqdm

        with tqdm(total=len(tasks) * num_samples, desc=f"rollouts of step {step}", unit="trajectory") as bar:
            return await collect(tasks, num_samples, run_one, self.reward, in_flight, on_scored=lambda _: bar.update())

    def _session(self, task: Task) -> EnvSession | None:
        from megatron_agent.envs.base import make_session

        return make_session(task.env_name, self.env_configs, self.store, self.store.limits)
