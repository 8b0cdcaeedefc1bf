"""The distributed optimizer's state as boxes of tensors that are shaped as the model's parameters.

Every data-parallel rank holds a flat range of each parameter's moments (and fp32 masters). Cut into boxes, each rank
writes and reads its own range and nothing else, and any other layout finds its ranges among them. Megatron's own
`fully_reshardable` format has the same keys and shapes, but gathers the whole state on every data-parallel rank first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from megatron_agent.models.mapping import Shape
from megatron_agent.types import Slices

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megatron_agent.training.megatron import MegatronModel

PREFIX = "optimizer.state."
MASTERS = f"{PREFIX}param."


def flat_boxes(start: int, stop: int, shape: Shape) -> list[Slices]:
    """Elements [start, stop) of a tensor in row order, as boxes in that order: parts of a first and last row, whole rows
    between them."""
    if start == stop:
        return []
    if len(shape) == 1:
        return [((start, stop),)]
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # within one row
        return [((last, first), *box) for box in flat_boxes(start - last * row, stop - last * row, shape[1:])]
    boxes: list[Slices] = []
    if start < first * row:
        boxes += [((first - 1, first), *box) for box in flat_boxes(start - (first - 1) * row, row, shape[1:])]
    if first < last:
        boxes.append(((first, last), *((0, n) for n in shape[1:])))
    return boxes + [((last, last + 1), *box) for box in flat_boxes(0, stop - last * row, shape[1:])]


def distributed_optimizers(model: MegatronModel) -> list[Any]:
    """Megatron's; empty on a rank where everything is frozen."""
    chained = getattr(model.optimizer, "chained_optimizers", [model.optimizer])
    return [optimizer for optimizer in chained if optimizer.optimizer is not None]


def optimizer_boxes(model: MegatronModel, weights: dict, with_masters: bool = True) -> list[ShardedTensor]:
    """This rank's share of moments and masters; the data are views of the optimizer's tensors. No collective.

    `weights`: the model's sharded state. Masters that are the parameters themselves (fp32) are left out.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    placed = {entry.data: entry for entry in nested_values(weights) if isinstance(entry.data, torch.nn.Parameter)}
    boxes: list[ShardedTensor] = []
    for optimizer in distributed_optimizers(model):
        optimizer.init_state_fn(optimizer.optimizer, optimizer.config)  # zeros where no step was taken yet
        for maps in optimizer.gbuf_ranges:
            for bucket in (bucket for buckets in maps.values() for bucket in buckets):
                for parameter, ranges in bucket["param_map"].items():
                    group, index = optimizer.model_param_group_index_map[parameter]
                    master = optimizer.optimizer.param_groups[group]["params"][index]
                    tensors = {name: optimizer.optimizer.state[master][name] for name in ("exp_avg", "exp_avg_sq")}
                    if with_masters and master.untyped_storage()._cdata != parameter.untyped_storage()._cdata:
                        tensors["param"] = master
                    start, stop = ranges["param"].start, ranges["param"].end
                    for name, tensor in tensors.items():
                        boxes += _boxes_of(placed[parameter], f"{PREFIX}{name}.", tensor.detach().view(-1), start, stop)
    return boxes


def _boxes_of(entry: Any, prefix: str, flat: torch.Tensor, start: int, stop: int) -> Iterator[ShardedTensor]:
    """`flat` holds elements [start, stop) of the parameter that `entry` describes."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    for leaf in _leaves(entry):
        begins = leaf.data.storage_offset()  # within the parameter
        first, last = max(start, begins), min(stop, begins + leaf.data.numel())
        axes = leaf.prepend_axis_num
        at = first - start
        for box in flat_boxes(first - begins, last - begins, leaf.local_shape) if first < last else []:
            shape = (*(1,) * axes, *(b - a for a, b in box))
            origin = (*(0,) * axes, *(a for a, _ in box))
            yield ShardedTensor(
                key=prefix + leaf.key,
                data=flat[at : at + prod(shape)].view(shape),
                dtype=flat.dtype,
                local_shape=shape,
                global_shape=leaf.global_shape,
                global_offset=tuple(a + b for a, b in zip(leaf.global_offset, origin, strict=True)),
                axis_fragmentations=None,
                replica_id=(*leaf.replica_id[:2], 0),  # (pipeline, tensor, data): data ranks hold different ranges
                allow_shape_mismatch=leaf.allow_shape_mismatch,
            )
            at += prod(shape)


def _leaves(entry: Any) -> list[ShardedTensor]:
    """What Megatron stores a parameter as (gate and up are two), with data on the meta device."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    meta = replace(entry, data=torch.empty(entry.data.shape, dtype=entry.data.dtype, device="meta"))
    leaves = [meta] if isinstance(meta, ShardedTensor) else list(nested_values(meta.build()))
    assert all(leaf.data.is_contiguous() for leaf in leaves), f"{entry.key}: not stored as ranges of rows"
    return leaves


def wanted_shapes(state: dict[str, Any]) -> dict[str, Shape | None]:
    """Key -> global shape of every tensor that a sharded state asks for (None: any, it is padded)."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    found: dict[str, Shape | None] = {}
    for entry in nested_values(state):
        leaves = _leaves(entry) if isinstance(entry, (ShardedTensor, ShardedTensorFactory)) else []
        found |= {leaf.key: None if leaf.allow_shape_mismatch else tuple(leaf.global_shape) for leaf in leaves}
    return found


def optimizer_step(model: MegatronModel) -> int:
    """Adam's count of updates; 0 where nothing is trained."""
    groups = [group for optimizer in distributed_optimizers(model) for group in optimizer.optimizer.param_groups]
    return max((int(group.get("step", 0)) for group in groups), default=0)


def set_optimizer_step(model: MegatronModel, step: int) -> None:
    for optimizer in distributed_optimizers(model):
        for group in optimizer.optimizer.param_groups:
            group["step"] = step
