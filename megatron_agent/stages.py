"""Builds the stages of a run from its configuration; train.py, sft.py and evaluate.py only connect them."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import yaml

from megatron_agent import cluster, registry
from megatron_agent.algorithms.base import Algorithm
from megatron_agent.checkpoints import Checkpoints
from megatron_agent.config import RunConfig, to_dict
from megatron_agent.data.dataset import DatasetReport, drop_long_prompts, read_tasks, training_stream
from megatron_agent.data.images import ImageStore
from megatron_agent.data.stream import TaskMix, TaskStream
from megatron_agent.errors import ConfigError, DataError, WeightSyncError
from megatron_agent.models.base import ModelFamily
from megatron_agent.rollout.pool import EnginePool
from megatron_agent.rollout.rollouts import Rollouts
from megatron_agent.training.actor import Actor
from megatron_agent.training.checkpoint import weight_files
from megatron_agent.types import Task
from megatron_agent.weights.plan import RolloutLayout, TransferPlan, plan_transfer, to_plain
from megatron_agent.weights.transport import ABORTED, shared_folder

log = logging.getLogger("megatron_agent")
T = TypeVar("T")
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
    family.check(config.training.layout, config.rollout.tensor_parallel)
    weight_files(family.path)  # missing or damaged ones are found here, not by a rank that has been started
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
    actor: Actor
    rollouts: Rollouts
    algorithm: Algorithm
    plan: TransferPlan
    weight_version: int = 0

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(self.config)

    async def sync_weights(self) -> None:
        """Trainer -> engines; every token sampled after it carries the next version."""
        await transfer(self.actor, self.rollouts.pool, self.plan, self.weight_version + 1)
        self.weight_version += 1
        await self.actor.to_host()


async def transfer(actor: Actor, pool: EnginePool, plan: TransferPlan, version: int) -> None:
    """One round of weights, trainer and engines at work at once.

    Raises WeightSyncError when a living engine did not get its bytes, TrainingError when a trainer rank failed.
    """
    folder = shared_folder()

    async def ended(work: Awaitable[T]) -> T:
        """Who waits for the other side learns that nobody will come any more."""
        try:
            return await work
        finally:
            (folder / ABORTED).touch()

    try:
        receiving = pool.sync_weights([{"folder": str(folder)}] * plan.replicas, version)
        sent, received = await asyncio.gather(ended(actor.send_weights(folder)), ended(receiving), return_exceptions=True)
        for outcome in (sent, received):
            if isinstance(outcome, BaseException):
                raise outcome
        assert isinstance(sent, dict)
        if lost := {rank: why for rank, why in sent.items() if rank // plan.tensor_parallel in pool.alive}:
            raise WeightSyncError(f"weights of version {version}: {next(iter(lost.values()))}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def start(config: RunConfig, family: ModelFamily, data: Data, store: ImageStore) -> tuple[Stages, list[asyncio.Task]]:
    """Start trainer ranks and engines -> the stages, and what is still under way: [trainer ready, engines ready].

    The engines take longer; a warm start may run meanwhile.
    """
    plan = transfer_plan(config, family)  # layouts that do not meet are refused before anything is started
    actor = Actor(cluster.start_workers(config, store), config.training)
    pool = EnginePool(cluster.start_engines(config, store))
    renderer = family.renderer(config.agent.vl_model_path or config.model.path)
    reward = registry.resolve("rewards", config.reward_name)(config.reward)
    algorithm = registry.resolve("algorithms", config.algorithm_name)(config.algorithm)
    rollouts = Rollouts(pool, renderer, store, reward, config.agent, config.rollout, config.env, config.seed)
    stages = Stages(config, data, actor, rollouts, algorithm, plan)
    trainer = asyncio.create_task(_set_up(actor, config, plan))
    engines = asyncio.create_task(pool.init_weight_transfer(receivers(plan, config.training.dtype)))
    return stages, [trainer, engines]


async def _set_up(actor: Actor, config: RunConfig, plan: TransferPlan) -> None:
    await actor.set_up(config.model.family, config.model.path, config.seed, config.vision)
    await actor.set_receivers([plan.sends(rank) for rank in range(config.training.layout.world_size)])


def receivers(plan: TransferPlan, dtype: str) -> list[dict]:
    """What the workers of every engine need to know of the plan (weights/receiver.py, InitInfo)."""
    ranks = range(plan.tensor_parallel)
    return [
        {"copies": [to_plain(plan.receives(engine, rank)) for rank in ranks], "dtype": dtype} for engine in range(plan.replicas)
    ]


def transfer_plan(config: RunConfig, family: ModelFamily) -> TransferPlan:
    """What goes from which trainer rank to which engine. Raises ConfigError for layouts that do not meet."""
    layout = config.training.layout
    table = family.table(layout, transformer_engine=cluster.num_gpus() > 0)
    rollout = RolloutLayout(config.rollout.tensor_parallel, config.rollout.num_engines)
    element_bytes = 2 if config.training.dtype == "bfloat16" else 4
    return plan_transfer(table, family.num_layers, layout, rollout, element_bytes=element_bytes, relay=False)


def record_config(config: RunConfig) -> None:
    """The configuration with all defaults, as `load` reads it back: what this run really did."""
    config.folder.mkdir(parents=True, exist_ok=True)
    (config.folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))


def image_store(config: RunConfig) -> ImageStore:
    """Shared by all runs of an output folder, or of `data.image_dir`: pictures are known by their content."""
    data = config.data
    root = Path(data.image_dir or Path(config.output_dir) / ".images").absolute()
    return ImageStore(root, data.pixel_limits(), cache_pictures=4096, cache_bytes=data.image_cache_mib << 20)
