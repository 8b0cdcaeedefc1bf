"""Builds the stages of a run from its configuration; train.py, sft.py and evaluate.py only connect them."""

from __future__ import annotations

import asyncio
import functools
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from megatron_agent import cluster, registry
from megatron_agent.checkpoints import Checkpoints
from megatron_agent.config import RunConfig, to_dict
from megatron_agent.data.dataset import DatasetReport, drop_long_prompts, read_tasks, training_stream
from megatron_agent.data.images import ImageStore
from megatron_agent.data.stream import TaskMix, TaskStream
from megatron_agent.errors import ConfigError, DataError
from megatron_agent.models.base import ModelFamily
from megatron_agent.models.vocabulary import check_same_tokens
from megatron_agent.observe.alarms import Alarms
from megatron_agent.rollout.pool import EnginePool
from megatron_agent.rollout.rollouts import Rollouts
from megatron_agent.sync import WeightSync, transfer_plan
from megatron_agent.training.actor import Actor
from megatron_agent.training.checkpoint import weight_files
from megatron_agent.training.critic import Critic
from megatron_agent.training.learner import Learner
from megatron_agent.training.samples import scored_samples
from megatron_agent.types import ALL_TOKENS, Support, Task, TrajectoryGroup

log = logging.getLogger("megatron_agent")
MIN_ANSWER_TOKENS = 16  # a prompt that leaves less room than this cannot be answered


@dataclass
class Data:
    """Every row that the run may use, read and checked before anything expensive starts."""

    train: TaskStream | TaskMix | None
    heldout: list[Task] = field(default_factory=list)
    without_tool: list[Task] = field(default_factory=list)
    warmup: list[Task] = field(default_factory=list)
    reports: dict[str, DatasetReport] = field(default_factory=dict)


def check(config: RunConfig) -> ModelFamily:
    """The model's folder against the layout. Raises CheckpointError, ConfigError."""
    if not config.model.path:
        raise ConfigError("model.path is empty; give the folder of a Hugging Face checkpoint")
    family: ModelFamily = registry.resolve("models", config.model.family)(config.model.path)
    config.training.layout = family.balanced(config.training.layout)
    rollout = config.rollout
    family.check(config.training.layout, rollout.tensor_parallel, rollout.mm_encoder_tp_mode == "data")
    transfer_plan(config, family)  # layouts that do not meet are refused before anything is started
    weight_files(family.path)  # missing or damaged ones are found here, not by a rank that has been started
    if (teacher := teacher_family(config)) is not None:
        teacher.check(replace(config.training, stage_layers=[]).layout)
        weight_files(teacher.path)
        check_same_tokens(family.path, teacher.path)
    return family


def read_data(
    config: RunConfig, family: ModelFamily, store: ImageStore, with_warmup: bool = True, with_training: bool = True
) -> Data:
    """All rows that the run may use; `with_warmup` False: one that goes on after its warm start. Raises DataError.

    Rows whose prompt leaves no room to answer are left out, named and counted.
    """
    reports: dict[str, DatasetReport] = {}
    wants_warmup = with_warmup and with_training and config.sft.num_steps > 0
    room_tokens = config.rollout.max_model_len - MIN_ANSWER_TOKENS
    limit_tokens = min(config.data.max_prompt_tokens or room_tokens, room_tokens)
    renderer = family.renderer(config.agent.vl_model_path or config.model.path)

    def num_prompt_tokens(task: Task) -> int:
        return len(renderer.prompt(task.messages, task.images))

    def read(name: str, files: list[str], script: bool = False) -> list[Task]:
        if not files:
            return []
        agent = config.agent
        tasks, reports[name] = read_tasks(
            files, config.data, store, agent.tool_name_key, require_script=script, meta_key=agent.tool_meta_key
        )
        report = reports[name]
        log.info("%s: %d rows, %d bad, %d small pictures enlarged", name, report.num_rows, report.num_bad, report.num_upscaled)
        tasks, dropped = drop_long_prompts(tasks, num_prompt_tokens, limit_tokens, config.data.num_workers)
        if dropped:
            shown = ", ".join(dropped[:5])
            log.warning("%s: %d prompts over %d tokens left out: %s ...", name, len(dropped), limit_tokens, shown)
        return tasks

    train = read("train", config.data.all_train_files()) if with_training else []
    limit = config.evaluation.max_rows or None
    data = Data(
        training_stream(train, config.data, config.seed, config.training.prompts_per_step) if train else None,
        read("heldout", config.evaluation.files)[:limit],
        read("without_tool", config.evaluation.without_tool_files)[:limit],
        read("warmup", config.sft.files, script=True) if wants_warmup else [],
        reports,
    )
    if with_training and config.training.num_steps and data.train is None:
        raise DataError("data.train_files is empty (and data.mix), and training.num_steps asks for updates")
    if wants_warmup and not data.warmup:
        raise DataError("sft.files is empty, and sft.num_steps asks for a warm start")
    return data


@dataclass
class Stages:
    """The running parts of one run."""

    config: RunConfig
    data: Data
    learner: Learner
    rollouts: Rollouts
    weights: WeightSync

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(self.config)
        self.alarms = Alarms(self.config.observe.alarms, self.config.training.logprob_gap_alarm)
        self.actor, self.algorithm = self.learner.actor, self.learner.algorithm

    @property
    def weight_version(self) -> int:
        return self.weights.version

    async def sync_weights(self) -> None:
        """Trainer -> engines; every token sampled after it carries the next version. The caller holds `weights.lock` from the
        update on."""
        await self.weights.push(self.weights.version + 1)
        await self.actor.to_host()

    async def sample_groups(self, step: int) -> tuple[list[TrajectoryGroup], list[TrajectoryGroup]]:
        """`training.prompts_per_step` groups to train on -> (those, what the algorithm refused).

        Tasks are drawn until the step is full, `max_sampling_rounds` times at most.
        """
        stream, algorithm = self.data.train, self.algorithm
        assert stream is not None
        kept: list[TrajectoryGroup] = []
        refused: list[TrajectoryGroup] = []
        for _ in range(algorithm.max_sampling_rounds):
            missing = self.config.training.prompts_per_step - len(kept)
            if not missing:
                break
            for group in await self._sample(stream.next(self.rollouts.num_wanted(missing)), step, missing):
                (kept if algorithm.keep_group(scored_samples([group])) else refused).append(group)
        return kept, refused

    async def _sample(self, tasks: list[Task], step: int, num_groups: int) -> list[TrajectoryGroup]:
        groups = await self.rollouts.sample(tasks, step, num_groups)
        return await self.with_greedy(groups) if self.algorithm.needs_greedy else groups

    async def with_greedy(self, groups: list[TrajectoryGroup]) -> list[TrajectoryGroup]:
        """Every group with a greedy trajectory of its task under the current weights."""
        greedy = await self.rollouts.greedy([group.task for group in groups])
        return [replace(group, greedy=one) for group, one in zip(groups, greedy, strict=True)]


def make_learner(config: RunConfig, store: ImageStore, support: Support = ALL_TOKENS, with_training: bool = True) -> Learner:
    """The policy's ranks and, where training needs them, a critic's and a teacher's; not set up yet."""
    training = config.training
    algorithm = registry.resolve("algorithms", config.algorithm_name)(config.algorithm)
    workers = cluster.start_workers(config, store)
    learner = Learner(Actor(workers, training, support=support), algorithm)
    if not with_training:
        return learner
    if algorithm.needs_critic:
        learner.critic = Critic(cluster.start_workers(config, store), training)
    if (family := teacher_family(config)) is not None:
        its_training = replace(training, stage_layers=[])
        its_training.layout = family.balanced(its_training.layout)
        workers = cluster.start_workers(config, store, its_training.layout)
        learner.teacher = Actor(workers, its_training, "all", support)
    return learner


def teacher_family(config: RunConfig) -> ModelFamily | None:
    path = registry.resolve("algorithms", config.algorithm_name)(config.algorithm).teacher_path
    return registry.resolve("models", config.model.family)(path) if path else None


async def set_up(config: RunConfig, learner: Learner) -> None:
    """All of its models, from their Hugging Face folders, one after another: the others leave the device to the policy."""
    models = [(learner.critic, config.model.path), (learner.teacher, learner.algorithm.teacher_path)]
    for model, path in models:
        if model is not None:
            await model.set_up(config.model.family, path, config.seed, config.vision)
            await model.to_host()
    await learner.actor.set_up(config.model.family, config.model.path, config.seed, config.vision)


def start(config: RunConfig, family: ModelFamily, data: Data, store: ImageStore) -> tuple[Stages, list[asyncio.Task]]:
    """Start trainer ranks and engines -> the stages, and what is still under way: [trainer ready, engines ready].

    The engines take longer; a warm start may run meanwhile.
    """
    renderer = family.renderer(config.agent.vl_model_path or config.model.path)
    banned = tuple(sorted(renderer.reserved_ids)) if config.rollout.ban_special_tokens else ()
    support = Support(banned, config.rollout.top_k, config.rollout.top_p)
    store = cluster.serve_pictures(store)
    learner = make_learner(config, store, support, with_training=data.train is not None)
    restart = functools.partial(cluster.start_engine, config, store)
    pool = EnginePool(cluster.start_engines(config, store), restart, config.rollout.max_restarts)
    reward = registry.resolve("rewards", config.reward_name)(config.reward)
    rollouts = Rollouts(pool, renderer, store, reward, config.agent, config.rollout, config.env, config.seed)
    stages = Stages(config, data, learner, rollouts, WeightSync(config, family, learner.actor, pool))
    return stages, [asyncio.create_task(set_up(config, learner)), asyncio.create_task(pool.started())]


def record_config(config: RunConfig) -> None:
    """The configuration with all defaults, as `load` reads it back: what this run really did."""
    config.folder.mkdir(parents=True, exist_ok=True)
    (config.folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))


def image_store(config: RunConfig) -> ImageStore:
    """Shared by all runs of an output folder, or of `data.image_dir`: pictures are known by their content."""
    data = config.data
    root = Path(data.image_dir or Path(config.output_dir) / ".images").absolute()
    return ImageStore(root, data.pixel_limits(), cache_pictures=4096, cache_bytes=data.image_cache_mib << 20)
