"""Which engine serves which trajectory: the one with the least work in flight, and from then on always that one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from megatron_agent.errors import EngineError, MegatronAgentError, RequestLostError, WeightSyncError, cause_of
from megatron_agent.rollout.generation import Generation, Sampling
from megatron_agent.types import ImageRef

logger = logging.getLogger(__name__)

MAX_LOSSES = 3  # of engines under one request, which may itself be what kills them
MAX_REMEMBERED = 1 << 16  # trajectories; an evicted one only loses its prefix cache


class EnginePool:
    """Ray handles of `Engine` actors. Turns of a trajectory go to one engine, whose prefix cache knows its row.

    consumes: requests of all episodes. waits for: the engine asked, or, when none is alive, one that is coming back.
    unblocked by: its answer, or its death (the request then goes to another engine, with the whole row).
    produces: Generations.

    `restart(index)` starts a dead engine again, at most `max_restarts` times each; `on_restart(index, handle)` gives it the
    current weights before it serves.
    """

    def __init__(self, handles: Sequence[Any], restart: Callable[[int], Any] | None = None, max_restarts: int = 3) -> None:
        if not handles:
            raise EngineError("an engine pool needs at least one engine")
        self._handles = dict(enumerate(handles))
        self._restart, self._restarts_left = restart, dict.fromkeys(self._handles, max_restarts)
        self._coming_back: dict[int, asyncio.Task[None]] = {}
        self._watchers: set[asyncio.Task[None]] = set()
        self.on_restart: Callable[[int, Any], Awaitable[None]] | None = None
        self.num_restarts = 0
        self._tokens_in_flight = dict.fromkeys(self._handles, 0)
        self._engine_of: OrderedDict[str, int] = OrderedDict()

    @property
    def handles(self) -> list[Any]:
        """Those that are alive, as far as the pool has seen."""
        return list(self._handles.values())

    @property
    def alive(self) -> set[int]:
        """Their indices."""
        return set(self._handles)

    @property
    def is_waiting(self) -> bool:
        """Whether an engine is being started again."""
        return bool(self._coming_back)

    def engine_for(self, trajectory_id: str) -> int:
        """Index of the engine that serves this trajectory. Raises EngineError when none is left."""
        index = self._engine_of.get(trajectory_id)
        if index is None or index not in self._handles:
            if not self._handles:
                raise EngineError("every rollout engine has died")
            index = min(self._handles, key=lambda i: (self._tokens_in_flight[i], i))
            self._engine_of[trajectory_id] = index
            if len(self._engine_of) > MAX_REMEMBERED:
                self._engine_of.popitem(last=False)
        return index

    async def generate(self, trajectory_id: str, row: list[int], images: list[ImageRef], sampling: Sampling) -> Generation:
        """One turn, on the trajectory's engine or, when that dies, on another one.

        Raises RequestLostError when MAX_LOSSES engines have died under it, EngineError when none is left.
        """
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        for _ in range(MAX_LOSSES):
            while not self._handles and self._coming_back:
                await asyncio.wait(self._coming_back.values(), return_when=asyncio.FIRST_COMPLETED)
            index = self.engine_for(trajectory_id)
            cost_tokens = len(row) + sampling.max_tokens
            self._tokens_in_flight[index] += cost_tokens
            try:
                call = self._handles[index].generate.remote(row, images, sampling)
                try:
                    return await call
                except asyncio.CancelledError:  # of the episode: nobody reads on, so the engine need not write on
                    ray.cancel(call)
                    raise
            except RayActorError as error:
                self._drop(index, error)
            except RayTaskError as error:
                cause = cause_of(error, EngineError)
                if not isinstance(cause, EngineError) or await self._is_alive(index):
                    raise cause from None
                self._drop(index, error)
            finally:
                self._tokens_in_flight[index] -= cost_tokens
        if not self._handles and not self._coming_back:
            raise EngineError("every rollout engine has died")
        raise RequestLostError(f"{MAX_LOSSES} engines died under one request of {len(row)} tokens and {len(images)} pictures")

    async def _is_alive(self, index: int) -> bool:
        from ray.exceptions import RayError

        try:
            return index in self._handles and await self._handles[index].is_alive.remote()
        except RayError:
            return False

    def _drop(self, index: int, error: Exception) -> None:
        handle = self._handles.pop(index, None)
        if handle is None:
            return
        logger.error("rollout engine %d died, %d left: %s", index, len(self._handles), _reason(error))
        if self._restart is not None and self._restarts_left[index]:
            self._coming_back[index] = asyncio.create_task(self._bring_back(index, handle))

    def watch(self) -> None:
        """Notice the death of an engine that nobody asks anything, too."""
        for index, handle in self._handles.items():
            self._watch(index, handle)

    def _watch(self, index: int, handle: Any) -> None:
        async def until_dead() -> None:
            answer = await _ask(index, handle.until_dead, ())
            if self._handles.get(index) is handle:
                self._drop(index, answer or EngineError("vLLM's processes do not serve any more"))

        watcher = asyncio.create_task(until_dead())
        self._watchers.add(watcher)  # the event loop holds tasks weakly
        watcher.add_done_callback(self._watchers.discard)

    async def _bring_back(self, index: int, dead: Any) -> None:
        """Start an engine again until it serves or may not be started any more."""
        import ray
        from ray.exceptions import RayError

        assert self._restart is not None
        try:
            while self._restarts_left[index]:
                self._restarts_left[index] -= 1
                with contextlib.suppress(RayError, ValueError):  # what is left of it, such as vLLM's child processes
                    ray.kill(dead)
                handle = self._restart(index)
                try:
                    await handle.is_alive.remote()  # until it has started
                    if self.on_restart is not None:
                        await self.on_restart(index, handle)
                except (RayError, MegatronAgentError) as error:
                    logger.error("rollout engine %d could not be started again: %s", index, _reason(error))
                    dead = handle
                else:
                    self._handles[index] = handle
                    self._watch(index, handle)
                    self.num_restarts += 1
                    logger.warning("rollout engine %d serves again", index)
                    return
        finally:
            del self._coming_back[index]

    async def sync_weights(self, update: dict[str, Any], version: int, joining: tuple[int, Any] | None = None) -> None:
        """Give every living engine the update. One that has died is left out from then on. `joining`: only this engine
        (index, handle), which is not of the pool yet; what it raises is raised.

        waits for: all engines, also after one has failed, so that none is left in the middle of an update.
        Raises WeightSyncError when a living engine fails, EngineError when no engine is left.
        """
        if joining is not None:
            answer = await _ask(joining[0], joining[1].sync_weights, (update, version))
            if isinstance(answer, MegatronAgentError):
                raise answer
            return
        _, failures = await self._all("sync_weights", lambda _: (update, version))
        await self._part_with_the_dead(failures, f"the sync of weights {version}")

    async def init_weight_transfer(self, infos: Sequence[dict[str, Any]]) -> None:
        """`infos[i]` is what the receivers of engine i need. One that has died is left out.

        Raises WeightSyncError when a living engine fails, EngineError when no engine is left.
        """
        _, failures = await self._all("init_weight_transfer", lambda index: (infos[index],))
        await self._part_with_the_dead(failures, "the start of weight transfer")

    async def _part_with_the_dead(self, failures: dict[int, MegatronAgentError], when: str) -> None:
        for index, error in failures.items():
            if not await self._is_alive(index):
                self._drop(index, error)
            elif isinstance(error, WeightSyncError):
                raise error
            else:
                raise WeightSyncError(f"rollout engine {index}, in {when}: {error}")
        if not self._handles:
            reasons = "; ".join(str(error) for error in failures.values())
            raise EngineError(f"every rollout engine has died, in {when}: {reasons}")

    async def settled(self) -> None:
        """Until no engine is being started again."""
        while self._coming_back:
            await asyncio.wait(self._coming_back.values())

    async def started(self) -> None:
        """Until every engine has started. Raises EngineError, saying why, when one has not."""
        await self._all_well("is_alive", lambda _: ())

    async def places(self) -> list[list[tuple[str, str]]]:
        """(host, device) of every worker of every engine. Raises EngineError when one has not started."""
        return await self._all_well("places", lambda _: ())

    async def describe(self) -> list[list[dict[str, tuple[int, ...] | None]]]:
        """`Engine.describe` of every engine."""
        return await self._all_well("describe", lambda _: ())

    async def stats(self) -> dict[str, float]:
        """Sums over the engines; rates are their means. Raises EngineError when one has died."""
        stats = await self._all_well("stats", lambda _: ())
        rates = {name for name in stats[0] if name.endswith("_rate")}
        return {name: sum(s[name] for s in stats) / (len(stats) if name in rates else 1) for name in stats[0]}

    async def _all_well(self, method: str, arguments: Callable[[int], tuple[Any, ...]]) -> list[Any]:
        results, failures = await self._all(method, arguments)
        if failures:
            raise next(iter(failures.values()))
        return results

    async def _all(
        self, method: str, arguments: Callable[[int], tuple[Any, ...]]
    ) -> tuple[list[Any], dict[int, MegatronAgentError]]:
        """`method` of every engine: the results of those that gave one, and why the others (by index) did not."""
        handles = dict(self._handles)
        if not handles:
            raise EngineError("every rollout engine has died")
        answers = await asyncio.gather(*(_ask(i, getattr(handle, method), arguments(i)) for i, handle in handles.items()))
        failures = {i: answer for i, answer in zip(handles, answers, strict=True) if isinstance(answer, MegatronAgentError)}
        return [answer for answer in answers if not isinstance(answer, MegatronAgentError)], failures


async def _ask(index: int, method: Any, arguments: tuple[Any, ...]) -> Any:
    """What the engine answers; an error of ours when it fails, returned so that the others are waited for."""
    from ray.exceptions import RayError, RayTaskError

    try:
        return await method.remote(*arguments)
    except RayTaskError as error:
        return cause_of(error, EngineError)
    except RayError as error:  # the actor, or Ray itself
        return EngineError(f"rollout engine {index} died: {_reason(error)}")


def _reason(error: Exception) -> str:
    """Ray's report on one line, from the error itself on, without its guesses: the actor's traceback stays in its log."""
    lines = str(error).partition(" Some common causes")[0].splitlines()
    starts = [number for number, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return " ".join(" ".join(lines[starts[-1] if starts else 0 :]).split())
