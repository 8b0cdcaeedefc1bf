"""Episodes against the engines: what turns a list of tasks into groups of scored trajectories."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_agent.rollout.agent_loop import AgentConfig, run_episode
from megatron_agent.rollout.collect import Collection, Unfinished, collect, in_order, trajectory_seed, weigh_end
from megatron_agent.rollout.engine import EnvSampling, RolloutConfig, Sampling
from megatron_agent.rollout.scripted import check_scripted, scripted_generate
from megatron_agent.rollout.tool_calls import ToolRunner
from megatron_agent.types import Task, Trajectory, TrajectoryGroup

if TYPE_CHECKING:
    from tqdm import tqdm

    from megatron_agent.data.images import ImageStore
    from megatron_agent.envs.base import EnvSession
    from megatron_agent.models.renderer import ChatRenderer
    from megatron_agent.rewards.base import RewardBase
    from megatron_agent.rollout.agent_loop import Generate
    from megatron_agent.rollout.pool import EnginePool

IN_FLIGHT_PER_ENGINE = 2  # times max_num_seqs: enough that no engine waits for an episode to start


class Rollouts:
    """consumes: tasks. waits for: engines, tools, the judge. produces: scored TrajectoryGroups."""

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
        self.banned_token_ids = tuple(sorted(renderer.reserved_ids)) if config.ban_special_tokens else ()
        self._agents = {name: of_env(agent, env) for name, env in config.per_env.items()}
        self._in_flight = IN_FLIGHT_PER_ENGINE * config.max_num_seqs * config.num_engines
        self._under_way = Collection(reward, self._in_flight)

    def num_wanted(self, num_groups: int) -> int:
        """How many tasks to start for a step of `num_groups`: over-sampled, less what an earlier step left under way."""
        return math.ceil(num_groups * (1 + self.config.oversample)) - len(self._under_way)

    async def sample(self, tasks: Sequence[Task], step: int, num_groups: int = 0) -> list[TrajectoryGroup]:
        """`rollout.group_size` episodes of each task at the run's temperature: the first `num_groups` groups that finish,
        in the order of their start (0: all; then reproducible from seed, step and task).

        The rest, the long tail, is cancelled and its tasks wait for the next epoch; with `rollout.carry_over` it goes on,
        over weight updates too, and is part of a later step.
        """
        self.start(tasks, step)
        count = num_groups or len(self._under_way)
        try:
            with self._progress(count * self.config.group_size, f"rollouts of step {step}") as bar:
                groups = []
                for _ in range(count):
                    groups.append(await self.next_group())
                    bar.update(self.config.group_size)
        except BaseException:
            await self.close()
            raise
        if not self.config.carry_over:
            await self.close()
        return in_order(groups)

    def start(self, tasks: Sequence[Task], step: int) -> list[int]:
        """Start the episodes of a step, for whoever takes groups one by one (`next_group`) -> the groups' numbers."""
        return self._under_way.start(tasks, self.config.group_size, functools.partial(self._sampled, step))

    def go_on(self, group: Unfinished, step: int) -> int:
        """As `start`, of a group that an earlier run had begun in its step `step`."""
        return self._under_way.go_on(group, self.config.group_size, functools.partial(self._sampled, step))

    def unfinished(self) -> dict[int, Unfinished]:
        """What `start` began and `next_group` has not given out, by number."""
        return self._under_way.unfinished()

    async def next_group(self) -> tuple[int, TrajectoryGroup]:
        """The next group that finishes, scored, and its number in the order of their start."""
        number, group = await self._under_way.next()
        for trajectory in group.trajectories:
            weigh_end(trajectory, self.agent.loss_use(trajectory.status), self.agent.status_penalty)
        return number, group

    async def close(self) -> None:
        """Cancel what is under way; the engines drop its requests."""
        await self._under_way.cancel()

    async def validate(self, tasks: Sequence[Task]) -> list[Trajectory]:
        """`rollout.validation.num_samples` episodes of each task, sampled as it says."""
        own, in_flight = self.config.validation, self._in_flight
        with self._progress(len(tasks) * own.num_samples, "validation") as bar:

            async def run_one(task: Task, index: int) -> Trajectory:
                trajectory = await self._run(task, index, 0, own.temperature, own.top_p, own.top_k)
                bar.update()
                return trajectory

            groups = await collect(tasks, own.num_samples, run_one, self.reward, in_flight)
        return [trajectory for group in groups for trajectory in group.trajectories]

    async def greedy(self, tasks: Sequence[Task]) -> list[Trajectory]:
        """One episode of each task at temperature 0, scored: a baseline of its group."""

        async def run_one(task: Task, index: int) -> Trajectory:
            return await self._run(task, index, 0, 0.0, 1.0, 0)

        groups = await collect(tasks, 1, run_one, self.reward, self._in_flight)
        return [group.trajectories[0] for group in groups]

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

    async def _sampled(self, step: int, task: Task, index: int) -> Trajectory:
        run, env = self.config, self.config.per_env.get(task.env_name, EnvSampling())
        temperature = run.temperature if env.temperature is None else env.temperature
        top_p, top_k = run.top_p if env.top_p is None else env.top_p, run.top_k if env.top_k is None else env.top_k
        return await self._run(task, index, step, temperature, top_p, top_k)

    async def _run(self, task: Task, index: int, step: int, temperature: float, top_p: float, top_k: int) -> Trajectory:
        sampling = Sampling(
            temperature=temperature,
            top_p=top_p if temperature else 1.0,
            top_k=top_k if temperature else 0,
            seed=trajectory_seed(self.seed, step, task.task_id, index),
            banned_token_ids=self.banned_token_ids,
        )
        generate = functools.partial(self.pool.generate, f"{step}/{task.task_id}/{index}")
        return await self._episode(task, index, generate, sampling)

    async def _episode(self, task: Task, index: int, generate: Generate, sampling: Sampling) -> Trajectory:
        agent, max_model_len = self._agents.get(task.env_name, self.agent), self.config.max_model_len
        return await run_episode(
            task, index, generate, self.renderer, self._session, agent, sampling, max_model_len, self.tools
        )

    def _progress(self, total: int, what: str) -> tqdm:
        from tqdm import tqdm

        return tqdm(total=total, desc=what, unit="trajectory", disable=not self.agent.show_tqdm)

    def _session(self, task: Task) -> EnvSession | None:
        from megatron_agent.envs.base import make_session

        return make_session(task.env_name, self.env_configs, self.store, self.store.limits)


def of_env(agent: AgentConfig, env: EnvSampling) -> AgentConfig:
    """`agent` as the episodes of one env have it."""
    own = {name: getattr(env, name) for name in ("single_response_max_tokens", "max_turns")}
    changes: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
    return replace(agent, custom_stop=[*agent.custom_stop, *env.stop], **changes)
