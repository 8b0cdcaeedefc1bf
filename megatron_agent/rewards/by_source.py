"""One run, several rewards: which one scores a trajectory is said by the sample itself or by its `data_source`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from megatron_agent import registry
from megatron_agent.errors import ConfigError
from megatron_agent.options import component_config, require
from megatron_agent.rewards.base import RewardBase
from megatron_agent.rewards.judge import Judge, JudgeConfig, make_judge
from megatron_agent.rewards.judge_check import require_accuracy
from megatron_agent.rewards.judged import JudgedReward
from megatron_agent.types import RewardParts, Task, Trajectory, Unscored


class BySourceReward(RewardBase):
    """The parts of the reward that the task is routed to. Equal judges are one object."""

    @dataclass
    class Config:
        """`routes`: pattern of `data_source` (`rag*`; the first that fits) -> a reward's name, or its name and options.

        `default` scores the others; empty: they are unscored. A sample whose `extra_info[sample_key]` names a reward gets
        that one: a route's with its options, otherwise one of the package's with its defaults. `judge` is that of every
        reward that is given none of its own.
        """

        routes: dict[str, Any] = field(default_factory=dict)
        default: Any = "vl_agent"
        sample_key: str = "reward"
        judge: JudgeConfig = field(default_factory=JudgeConfig)

        def __post_init__(self) -> None:
            routes = {name: self.filled(route, f"reward.routes.{name}") for name, route in self.routes.items()}
            self.routes = routes  # with all defaults, as a run records them
            self.default = self.filled(self.default, "reward.default") if self.default else ""

        def filled(self, route: object, where: str) -> dict[str, Any]:
            """Name and all options of a route. Raises ConfigError with the nearest known name or option."""
            options = {"name": route} if isinstance(route, str) else route
            require(isinstance(options, dict) and "name" in options, f"{where}: give a reward's name, or its name and options")
            assert isinstance(options, dict)
            name, options = options["name"], {key: value for key, value in options.items() if key != "name"}
            config = component_config("rewards", name, options, where)
            component = registry.resolve("rewards", name)
            require(not issubclass(component, BySourceReward), f"{where}: {name} routes to rewards, not to itself")
            if issubclass(component, JudgedReward) and "judge" not in options:
                config.judge = self.judge
            return {"name": name, **dataclasses.asdict(config)}

    config: Config

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._judges: list[tuple[JudgeConfig, Judge]] = []
        self._rewards: list[RewardBase] = []
        self._routes = {pattern: self._make(route) for pattern, route in self.config.routes.items()}
        self._default = self._make(self.config.default) if self.config.default else None
        routed = [(route["name"], self._routes[pattern]) for pattern, route in self.config.routes.items()]
        if self._default is not None:
            routed.append((self.config.default["name"], self._default))
        self._by_name = dict(reversed(routed))  # of several routes to a reward, the first

    def _make(self, route: dict[str, Any]) -> RewardBase:
        options = {key: value for key, value in route.items() if key != "name"}
        config = component_config("rewards", route["name"], options, "reward")
        component = registry.resolve("rewards", route["name"])
        judge = (self._judge(config.judge),) if issubclass(component, JudgedReward) else ()
        self._rewards.append(component(config, *judge))
        return self._rewards[-1]

    def _judge(self, config: JudgeConfig) -> Judge:
        for known, judge in self._judges:
            if known == config:
                return judge
        self._judges.append((config, make_judge(config)))
        return self._judges[-1][1]

    async def start(self) -> None:
        for config, judge in self._judges:
            await require_accuracy(judge, config.min_accuracy)
        for reward in self._rewards:
            await reward.start()

    async def score(self, trajectory: Trajectory, task: Task) -> RewardParts | Unscored:
        try:
            reward = self.reward_of(task)
        except ConfigError as error:
            return Unscored(f'extra_info["{self.config.sample_key}"]: {error}')
        if reward is None:
            return Unscored(f"no route for data_source {task.data_source!r}; routes: {', '.join(self._routes)}")
        return await reward.score(trajectory, task)

    def reward_of(self, task: Task) -> RewardBase | None:
        """None: no route fits. Raises ConfigError: the sample names a reward that does not exist."""
        name = task.extra_info.get(self.config.sample_key)
        if isinstance(name, str) and name:
            if name not in self._by_name:
                require(":" not in name, f"{name!r} is code that no route names; data cannot load it")
                self._by_name[name] = self._make(self.config.filled(name, name))
            return self._by_name[name]
        fitting = (reward for pattern, reward in self._routes.items() if fnmatchcase(task.data_source, pattern))
        return next(fitting, self._default)

    async def close(self) -> None:
        for reward in self._rewards:
            await reward.close()
        for _, judge in self._judges:
            await judge.close()


COMPONENT = BySourceReward
