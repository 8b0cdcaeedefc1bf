"""Optimizer, gradients and parameters out of the device's memory while something else (a vLLM engine) needs it.

Storages are emptied in place (`resize_(0)`, as verl and Megatron's grad buffers do): every tensor, view, bucket and hook
stays the object it is, only the bytes go. They come back at other addresses, so nothing may keep one (CUDA graphs,
CUDA IPC handles, nccl_ub buffers).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from megatron_agent.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from megatron_agent.training.megatron import MegatronModel

CHUNK_BYTES = 256 * 2**20  # torch's pinned allocator rounds up to a power of two: one flat buffer would waste up to half
OFFLOADS = ("none", "optimizer", "all")  # what may leave the device; each includes the one before it


def storages_of(model: MegatronModel) -> dict[str, list[torch.UntypedStorage]]:
    """The storages of "parameters" (module buffers too), "gradients" and "optimizer" (fp32 masters, Adam's moments).

    Each is listed once, under the first kind that has it: the masters of an fp32 model are views of its parameters. To be
    called anew each time: Adam's moments appear with the first step, a reset or a load replaces them.
    """
    buffers = [buffer for chunk in model.ddp for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    chained = getattr(model.optimizer, "chained_optimizers", [model.optimizer])
    adams = [optimizer.optimizer for optimizer in chained if optimizer.optimizer is not None]  # None: all is frozen
    kinds = {
        "parameters": [*model.module.parameters(), *model.module.buffers(), *(buffer.param_data for buffer in buffers)],
        "gradients": [buffer.grad_data for buffer in buffers],
        "optimizer": [
            *(parameter for adam in adams for group in adam.param_groups for parameter in group["params"]),
            *(value for adam in adams for state in adam.state.values() for value in state.values()),
        ],
    }
    device = next(model.module.parameters()).device
    seen: set[int] = set()
    found: dict[str, list[torch.UntypedStorage]] = {kind: [] for kind in kinds}
    for kind, values in kinds.items():
        for value in values:
            if isinstance(value, torch.Tensor) and value.device == device and value.numel():
                storage = value.untyped_storage()
                if storage._cdata not in seen:
                    seen.add(storage._cdata)
                    found[kind].append(storage)
    return found


def check_on_device(model: MegatronModel, needs: str) -> None:
    """Raises TrainingError if something of `needs` ("parameters", "all") is in host memory: torch reads address 0 there."""
    kinds = storages_of(model)
    absent = [kind for kind in (kinds if needs == "all" else [needs]) if any(not s.nbytes() for s in kinds[kind])]
    if absent:
        raise TrainingError(
            f"rank {model.rank}: {' and '.join(absent)} of the model are offloaded to host memory; bring them back first: "
            f"offload.to_device({needs!r}), or work inside `with offload.on_device({needs!r})`"
        )


class Emptied:
    """Storages without their bytes, which stand one after another in host memory (pinned for CUDA).

    The host memory is taken at the first round and kept for the next ones. Without `keep_bytes` the contents are dropped
    and come back as zeros.
    """

    def __init__(self, keep_bytes: bool = True, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.keep_bytes, self.chunk_bytes = keep_bytes, chunk_bytes
        self.chunks: list[torch.Tensor] = []
        self.storages: list[tuple[torch.UntypedStorage, int]] = []  # in the order of their bytes; with their sizes

    def empty(self, storages: Iterable[torch.UntypedStorage]) -> int:
        """Also of these; those that are empty already are left alone -> bytes freed."""
        full = [(storage, storage.nbytes()) for storage in storages if storage.nbytes()]
        if self.keep_bytes:
            offset = sum(size for _, size in self.storages)
            for storage, size in full:
                for on_device, on_host in self._pieces(storage, offset):
                    on_host.copy_(on_device, non_blocking=True)
                offset += size
        _synchronize()  # also with what other streams still do to the storages
        for storage, _ in full:
            storage.resize_(0)
        self.storages += full
        return sum(size for _, size in full)

    def refill(self) -> None:
        """All storages get their bytes back. Raises TrainingError if the device has no room; then all stay empty."""
        try:
            for storage, size in self.storages:
                storage.resize_(size)
        except RuntimeError as error:  # torch.OutOfMemoryError on CUDA
            for storage, _ in self.storages:
                storage.resize_(0)
            total = sum(size for _, size in self.storages)
            raise TrainingError(
                f"no room on the device for {total} bytes that were offloaded; free it first (do the engines sleep?): {error}"
            ) from error
        offset = 0
        for storage, size in self.storages:
            if self.keep_bytes:
                for on_device, on_host in self._pieces(storage, offset):
                    on_device.copy_(on_host, non_blocking=True)
            else:
                _bytes(storage).zero_()
            offset += size
        _synchronize()  # the next round overwrites the host's side
        self.storages = []

    def _pieces(self, storage: torch.UntypedStorage, offset: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of equal numbers of bytes (uint8): of the storage, and of the host memory from `offset` on."""
        rest = _bytes(storage)
        while len(rest):
            index, start = divmod(offset, self.chunk_bytes)
            if index == len(self.chunks):
                pinned = torch.cuda.is_available()
                self.chunks.append(torch.empty(self.chunk_bytes, dtype=torch.uint8, device="cpu", pin_memory=pinned))
            on_host = self.chunks[index][start : start + len(rest)]
            yield rest[: len(on_host)], on_host
            rest, offset = rest[len(on_host) :], offset + len(on_host)


class Offload:
    """Moves a model's `what` (one of OFFLOADS) to host memory and back. Each rank moves its own; no collective.

    `on_host` says what is there now. Calls may be repeated, and with `what="none"` none of them does anything.
    """

    def __init__(self, model: MegatronModel, what: str) -> None:
        if what not in OFFLOADS:
            raise ConfigError(f"training.offload={what!r}; allowed: {', '.join(OFFLOADS)}")
        self.model, self.what, self.on_host = model, what, "none"
        self.emptied = {"parameters": Emptied(), "gradients": Emptied(keep_bytes=False), "optimizer": Emptied()}

    def to_host(self, what: str = "all") -> int:
        """Gradients and optimizer ("optimizer"), or parameters too ("all"), as far as `self.what` allows -> bytes freed."""
        what = min(what, self.what, key=OFFLOADS.index)
        if what == "none":
            return 0
        storages = storages_of(self.model)
        kinds = ["gradients", "optimizer", "parameters"][: 3 if what == "all" else 2]
        freed = sum(self.emptied[kind].empty(storages[kind]) for kind in kinds)
        torch.cuda.empty_cache()  # another process is to have it
        self.on_host = max(what, self.on_host, key=OFFLOADS.index)
        return freed

    def to_device(self, needs: str = "all") -> None:
        """The "parameters" alone (log-probs, weight transfer), or "all" (updates, checkpoints, a new optimizer).

        Raises TrainingError if there is no room for them.
        """
        self.emptied["parameters"].refill()
        self.on_host = min("optimizer", self.on_host, key=OFFLOADS.index)
        if needs == "all":
            self.emptied["optimizer"].refill()
            self.emptied["gradients"].refill()
            self.on_host = "none"

    @contextmanager
    def on_device(self, needs: str) -> Iterator[None]:
        """What `to_device` brings is there inside; afterwards the host has again what it had before."""
        before = self.on_host
        self.to_device(needs)
        try:
            yield
        finally:
            self.to_host(before)


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
