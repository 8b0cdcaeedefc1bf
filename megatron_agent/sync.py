"""Weights from the trainer to the engines, as the driver sees it: the plan, the rounds, engines that die and come back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from dataclasses import asdict
from typing import Any, TypeVar

from megatron_agent import cluster
from megatron_agent.config import RunConfig
from megatron_agent.errors import WeightSyncError
from megatron_agent.models.base import ModelFamily
from megatron_agent.rollout.pool import EnginePool
from megatron_agent.training.actor import Actor
from megatron_agent.weights.meeting import MeetingPoint
from megatron_agent.weights.plan import RolloutLayout, TransferPlan, plan_transfer, to_plain
from megatron_agent.weights.topology import Topology, place_ranks

log = logging.getLogger("megatron_agent")
T = TypeVar("T")


class WeightSync:
    """consumes: the trainer's weights. waits for: ranks and engines, both at work at once in a round.
    unblocked by: the last shard verified on every living engine. produces: engines that serve `version`.

    `lock` is held from the first change of the trainer's weights until the engines have them: an engine that comes back
    must get the weights of `version`, not some between two versions.
    """

    def __init__(self, config: RunConfig, family: ModelFamily, actor: Actor, pool: EnginePool) -> None:
        self.config, self.family, self.actor, self.pool = config, family, actor, pool
        self.version, self.lock = 0, asyncio.Lock()
        self._point: MeetingPoint | None = None
        pool.on_restart = self._rejoin

    async def connect(self) -> None:
        """Once both sides are up: where every rank sits, whether the engines hold what the plan fills, who sends what.

        Raises WeightSyncError, naming both sides, for an engine of another model.
        """
        await self.pool.settled()
        training, rollout = await asyncio.gather(self.actor.places(), self.pool.places())
        on_gpus = cluster.num_gpus() > 0
        is_whole = len(rollout) == self.config.rollout.num_engines  # else: one died and was given up before the first round
        topology = place_ranks(training, [place for engine in rollout for place in engine]) if is_whole else None
        self._fan_out = self._relaying = transfer_plan(self.config, self.family, topology, on_gpus)
        wish = self.config.rollout.weight_relay
        if wish == "always" or (wish == "auto" and on_gpus):  # on the same CPUs as the trainer relays only copy more
            self._relaying = transfer_plan(self.config, self.family, topology, on_gpus, relay=True)
        for engine in await self.pool.describe():
            for rank, shapes in enumerate(engine):
                self._fan_out.check_engine(rank, shapes)
        await self._use(self._relaying)
        self._point = MeetingPoint(cluster.node_address(), self.config.rollout.weight_transport)
        self.pool.watch()
        log.info("weight sync: %s", self.plan.describe())

    async def _use(self, plan: TransferPlan) -> None:
        """Every rank and engine learns its part of the plan."""
        self.plan = plan
        world = range(self.config.training.layout.world_size)
        await self.actor.set_receivers([plan.sends(rank) for rank in world])
        await self.pool.init_weight_transfer(receivers(plan, self.config.training.dtype))

    async def push(self, version: int) -> None:
        """One round: every living engine serves `version` afterwards. The caller holds `lock`.

        Raises WeightSyncError when a living engine did not get its bytes, TrainingError when a trainer rank failed.
        """
        if self._point is None:
            await self.connect()
        if not self.pool.alive and self.pool.is_waiting:
            self.version = version  # who comes back gets it, once the lock is free
            return
        while (best := self._relaying if self._all_alive() else self._fan_out) is not self.plan:
            await self._use(best)  # an engine may die in it
        try:
            await self._round(version)
        except WeightSyncError:
            if self.plan is self._fan_out or self._all_alive():
                raise
            log.warning("an engine that relayed weights died: every engine gets them from the trainer now")
            await self._use(self._fan_out)
            await self._round(version)
        self.version = version

    def _all_alive(self) -> bool:
        return len(self.pool.alive) == self.plan.replicas

    async def _round(self, version: int, joining: tuple[int, Any] | None = None) -> None:
        """`joining`: only this engine (index, handle), which is not in the pool yet."""
        assert self._point is not None
        sync_round, size = self._point.open(), self.plan.tensor_parallel
        engines = self.pool.alive if joining is None else {joining[0]}
        ranks = frozenset(engine * size + rank for engine in engines for rank in range(size))

        async def ended(work: Awaitable[T]) -> T:
            """Who waits for the other side learns that nobody will come any more."""
            try:
                return await work
            finally:
                self._point.over(sync_round)  # type: ignore[union-attr]

        receiving = self.pool.sync_weights({"sync_round": asdict(sync_round)}, version, joining)
        try:
            sent, received = await asyncio.gather(
                ended(self.actor.send_weights(sync_round, ranks)), ended(receiving), return_exceptions=True
            )
        finally:
            self._point.forget(sync_round, ranks)
        for outcome in (sent, received):
            if isinstance(outcome, BaseException):
                raise outcome
        assert isinstance(sent, dict)
        living = self.pool.alive if joining is None else engines
        if lost := {rank: why for rank, why in sent.items() if rank // size in living}:
            raise WeightSyncError(f"weights of version {version}: {next(iter(lost.values()))}")

    async def _rejoin(self, index: int, handle: Any) -> None:
        """An engine that was started again gets the current weights before it serves."""
        if self._point is None:
            return  # the first round waits for it
        async with self.lock:
            if self.plan is not self._fan_out:
                await self._use(self._fan_out)
            await handle.init_weight_transfer.remote(receivers(self.plan, self.config.training.dtype)[index])
            await self._round(self.version, (index, handle))


def transfer_plan(
    config: RunConfig,
    family: ModelFamily,
    topology: Topology | None = None,
    transformer_engine: bool = False,
    relay: bool = False,
) -> TransferPlan:
    """What goes from which trainer rank to which engine. Raises ConfigError for layouts that do not meet."""
    layout, rollout = config.training.layout, config.rollout
    return plan_transfer(
        family.table(layout, transformer_engine),
        family.num_layers,
        layout,
        RolloutLayout(rollout.tensor_parallel, rollout.num_engines, rollout.mm_encoder_tp_mode),
        topology,
        element_bytes=2 if config.training.dtype == "bfloat16" else 4,
        relay=relay,
    )


def receivers(plan: TransferPlan, dtype: str) -> list[dict[str, Any]]:
    """What the workers of every engine need to know of the plan (weights/receiver.py, InitInfo)."""
    size, infos = plan.tensor_parallel, []
    for engine in range(plan.replicas):
        behind = plan.relays_to(engine)
        copies = [to_plain(plan.receives(engine, rank)) for rank in range(size)]
        infos.append({"copies": copies, "dtype": dtype, "first_rank": engine * size,
                      "relay_to": None if behind is None else behind * size})  # fmt: skip
    return infos
