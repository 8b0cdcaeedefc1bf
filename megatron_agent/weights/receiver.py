"""The vLLM side: a weight-transfer engine that vLLM loads as a plugin and that writes shards into the live model.

Registered under BACKEND through the `vllm.general_plugins` entry point (setup.py), so that every worker process of
vLLM finds it; vLLM itself is not changed. Contract: vllm/distributed/weight_transfer/base.py.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from megatron_agent.errors import WeightSyncError
from megatron_agent.models.mapping import as_index
from megatron_agent.types import ShardCopy
from megatron_agent.weights.plan import from_plain
from megatron_agent.weights.transport import read_shards

BACKEND = "megatron_agent"


@dataclass
class InitInfo(WeightTransferInitInfo):
    """The whole plan, as `weights.plan.to_plain` writes it (vLLM's messages carry no classes); every vLLM rank takes the
    copies that are meant for it."""

    plan: list[list]
    dtype: str


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One round: where the bytes lie, and `checksums[i]` of `plan[i]`."""

    folder: str
    checksums: list[int]


class ShardReceiver(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Receives this rank's shards and writes them where vLLM computes from them."""

    init_info_cls, update_info_cls = InitInfo, UpdateInfo
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        rank = self.parallel_config.rank % self.parallel_config.tensor_parallel_size
        plan = from_plain(init_info.plan)
        self._mine = [(i, c) for i, c in enumerate(plan) if c.dst_rank == rank]
        self._dtype = getattr(torch, init_info.dtype)
        self._modules = dict(self.model.named_modules())
        named = dict(self.model.named_parameters())
        wanted = {c.dst_param for _, c in self._mine}
        if wanted - set(named):
            raise WeightSyncError(f"this vLLM model has no parameters {sorted(wanted - set(named))[:3]}: another model family?")
        # What only other ranks are sent is, on this one, nothing but padding of the vocabulary: make_plan has seen to it.
        unfilled = set(named) - {c.dst_param for c in plan}
        if unfilled:
            raise WeightSyncError(f"the plan does not fill vLLM's parameters {sorted(unfilled)[:3]}")

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: Any) -> None:
        info = update_info if isinstance(update_info, UpdateInfo) else self.parse_update_info(update_info)
        self.receive_weights(info)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """All bytes are verified before the first parameter changes."""
        copies = [c for _, c in self._mine]
        sums = [update_info.checksums[i] for i, _ in self._mine]
        by_param: dict[str, list[tuple[ShardCopy, torch.Tensor]]] = defaultdict(list)
        for copy, shard in read_shards(Path(update_info.folder), copies, sums, self._dtype):
            by_param[copy.dst_param].append((copy, shard))
        with torch.no_grad():
            for name, shards in by_param.items():
                self._write(name, shards)

    def _write(self, name: str, shards: list[tuple[ShardCopy, torch.Tensor]]) -> None:
        module_name, _, leaf = name.rpartition(".")
        module = self._modules[module_name]
        parameter = getattr(module, leaf)
        emptied = parameter.numel() == 0  # the CPU backend packs linear weights and empties the original
        if emptied:
            shape = [max(c.dst_slice[d][1] for c, _ in shards) for d in range(len(shards[0][0].dst_slice))]
            target = torch.empty(shape, dtype=self._dtype)
        else:
            target = parameter.data
        for copy, shard in shards:
            target[as_index(copy.dst_slice)].copy_(shard)
        if emptied:
            module.weight = torch.nn.Parameter(target, requires_grad=False)
        if leaf == "weight":
            for user in self._users_of(module.weight):
                if emptied or hasattr(user, "cpu_linear"):
                    user.quant_method.process_weights_after_loading(user)  # packs it again

    def _users_of(self, weight: torch.nn.Parameter) -> list[Any]:
        """Every module that computes from `weight`: a tied head has its own packed copy of the embedding."""
        return [m for m in self._modules.values() if m._parameters.get("weight") is weight]

    def finish_weight_update(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


def register() -> None:
    """Make the backend known to vLLM; vLLM calls it in every process it starts."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, ShardReceiver)
