"""The vLLM side: a weight-transfer engine that vLLM loads as a plugin and that writes shards into the live model.

Registered under BACKEND through the `vllm.general_plugins` entry point (setup.py), so that every worker process of
vLLM finds it; vLLM itself is not changed. Contract: vllm/distributed/weight_transfer/base.py.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from megatron_agent.errors import WeightSyncError
from megatron_agent.models.mapping import as_index
from megatron_agent.types import ShardCopy, SyncRound
from megatron_agent.weights.meeting import Meeting, place
from megatron_agent.weights.plan import from_plain, is_added
from megatron_agent.weights.reload import LayerwiseReload, loading_parameters
from megatron_agent.weights.transport import receive_all

BACKEND = "megatron_agent"
ROW_GAP = 32  # elements; oneDNN packs rows that lie a round number of bytes apart at half the speed, or a third
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt
__all__ = ["BACKEND", "InitInfo", "ShardReceiver", "UpdateInfo", "place", "register"]


@dataclass
class InitInfo(WeightTransferInitInfo):
    """`copies[rank]`: what each tensor-parallel rank of this engine gets, as `weights.plan.to_plain` writes it (vLLM's
    messages carry no classes). Rank `first_rank` of all rollout ranks is this engine's first. The engine whose first rank
    is `relay_to` gets the same from this one."""

    copies: list[list[list]]
    dtype: str
    first_rank: int
    relay_to: int | None = None


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One round: the fields of a SyncRound."""

    sync_round: dict[str, Any]


class ShardReceiver(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Receives this rank's shards and writes them where vLLM computes from them.

    Where the backend keeps its weights they are written in place. Where it packs them (CPU) a parameter is put together
    beside, packed when its last shard is there, and forgotten. Where it quantises them they take vLLM's reload (reload.py).
    """

    init_info_cls, update_info_cls = InitInfo, UpdateInfo
    supports_draft_weight_update = False
    _always_reloads = False  # for tests: quantised or not

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        rank = self.parallel_config.rank % self.parallel_config.tensor_parallel_size
        everyones = [from_plain(rows) for rows in init_info.copies]
        self._mine = everyones[rank]
        self._rank = init_info.first_rank + rank
        self._relay_to = None if init_info.relay_to is None else init_info.relay_to + rank
        self._dtype = getattr(torch, init_info.dtype)
        self._modules = dict(self.model.named_modules())
        is_reloading = self._always_reloads or self.vllm_config.quant_config is not None
        named = loading_parameters(self.model) if is_reloading else dict(self.model.named_parameters())
        self._shapes: dict[str, list[int]] = {}
        self._sizes: dict[str, int] = defaultdict(int)
        for copy in self._mine:
            old = self._shapes.get(copy.dst_param, [0] * len(copy.dst_slice))
            self._shapes[copy.dst_param] = [max(n, stop) for n, (_, stop) in zip(old, copy.dst_slice)]
            self._sizes[copy.dst_param] += prod(copy.shape)
        if self._shapes.keys() - set(named):
            missing = sorted(self._shapes.keys() - set(named))[:3]
            raise WeightSyncError(f"this vLLM model has no parameters {missing}: another model family?")
        # What only other ranks are sent is, on this one, nothing but padding of the vocabulary: the plan has seen to it.
        filled = {copy.dst_param for copies in everyones for copy in copies}
        unfilled = {name for name in named if name not in filled and not (is_reloading and is_added(name))}
        if unfilled:
            raise WeightSyncError(f"the plan does not fill vLLM's parameters {sorted(unfilled)[:3]}")
        size = self.parallel_config.tensor_parallel_size
        self._reload = LayerwiseReload(self.model, self._shapes, self._dtype, size) if is_reloading else None

    def start_weight_update(self) -> None:
        self._missing = dict(self._sizes)  # elements of each parameter that have not come yet
        self._beside: dict[str, torch.Tensor] = {}
        if self._reload is not None:
            self._reload.start()

    def update_weights(self, update_info: Any) -> None:
        info = update_info if isinstance(update_info, UpdateInfo) else self.parse_update_info(update_info)
        self.receive_weights(info)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """A shard is verified where it was written; WeightSyncError names the first that is wrong, and the engine must not
        serve then: some of its parameters are new."""
        with reused_memory():
            receive_all(Meeting(SyncRound(**update_info.sync_round)), self._rank, self._mine, self, self._relay_to)

    def write(self, copy: ShardCopy, values: torch.Tensor) -> torch.Tensor:
        place = self._target(copy.dst_param)[as_index(copy.dst_slice)]
        place.copy_(values)
        return place

    def written(self, copy: ShardCopy) -> None:
        self._missing[copy.dst_param] -= prod(copy.shape)
        if not self._missing[copy.dst_param]:
            self._finish(copy.dst_param)

    def _target(self, name: str) -> torch.Tensor:
        if self._reload is not None:
            return self._reload.target(name)
        if name in self._beside:
            return self._beside[name]
        module, leaf = self._owner(name)
        parameter = getattr(module, leaf)
        if parameter.numel():
            return parameter.data
        *rows, columns = self._shapes[name]  # packed and emptied by the CPU backend
        wants_contiguous = self._dtype != torch.float32 and torch.cpu._is_amx_tile_supported()  # vLLM's kernels for AMX
        gap = 0 if wants_contiguous else ROW_GAP
        self._beside[name] = torch.empty(*rows, columns + gap, dtype=self._dtype)[..., :columns]
        return self._beside[name]

    def _finish(self, name: str) -> None:
        """All of a parameter is there: pack it again where the backend computes from packed weights."""
        if self._reload is not None:
            self._reload.whole(name)
            return
        module, leaf = self._owner(name)
        beside = self._beside.pop(name, None)
        if beside is not None:
            module.weight = torch.nn.Parameter(beside, requires_grad=False)
        if leaf == "weight":
            for user in self._users_of(module.weight):
                if beside is not None or hasattr(user, "cpu_linear"):
                    user.cpu_linear = None  # the old packed weights make room for the new ones
                    user.quant_method.process_weights_after_loading(user)

    def _owner(self, name: str) -> tuple[Any, str]:
        module_name, _, leaf = name.rpartition(".")
        return self._modules[module_name], leaf

    def _users_of(self, weight: torch.nn.Parameter) -> list[Any]:
        """Every module that computes from `weight`: a tied head has its own packed copy of the embedding."""
        return [m for m in self._modules.values() if m._parameters.get("weight") is weight]

    def finish_weight_update(self) -> None:
        left = [name for name, missing in self._missing.items() if missing]
        if left:
            raise WeightSyncError(f"parameters {left[:3]} of rollout rank {self._rank} did not arrive whole")
        if self._reload is not None:
            self._reload.finish(self.model_config)

    def shutdown(self) -> None:
        pass


@contextlib.contextmanager
def reused_memory() -> Iterator[None]:
    """Within it a block that was freed serves the next one, however big. glibc gives big ones back to the system, and to touch
    new pages takes longer than to pack the weights that go into them."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        mallopt(M_MMAP_MAX, 65536)  # glibc's own
        mallopt(M_TRIM_THRESHOLD, 128 << 10)


def register() -> None:
    """Make the backend known to vLLM; vLLM calls it in every process it starts."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, ShardReceiver)
