"""Norms of gradients and weights, block by block: which part of the model learns, stands still or runs away."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_agent.training.optimizer_state import distributed_optimizers

if TYPE_CHECKING:
    from megatron_agent.training.megatron import MegatronModel

_LAYER = re.compile(r"language\.decoder\.layers\.(\d+)\.")
_OTHERS = {"visual.merger.": "merger", "visual.": "vision", "language.embedding.": "embedding"}  # the first that fits


def block_of(name: str, first_layer: int) -> str:
    """Of a parameter of a chunk that begins with decoder layer `first_layer`: "vision", "merger", "embedding", "layer_00"
    (decoder layers, counted over all stages) or "head" (last norm, output or value layer)."""
    layer = _LAYER.match(name)
    if layer:
        return f"layer_{first_layer + int(layer.group(1)):02d}"
    return next((block for prefix, block in _OTHERS.items() if name.startswith(prefix)), "head")


def block_norms(model: MegatronModel) -> dict[str, float]:
    """{"grad_norm/<block>": ..., "weight_norm/<block>": ...} over all ranks. Collective; after the optimizer's
    `prepare_grads` and before its step: gradients before clipping, weights that they were taken at.

    Every element counts once, as in Megatron's own norm: data ranks hold ranges of each parameter, tensor rank 0 speaks for
    what all have whole, the first stage for a tied embedding. Frozen parameters do not count; blocks that are not there or
    frozen are absent.
    """
    from megatron.core.transformer.module import param_is_not_shared

    blocks = [*_OTHERS.values(), *(f"layer_{i:02d}" for i in range(model.family.num_layers)), "head"]
    names = {
        parameter: block_of(name, stage.first_layer)
        for chunk, stage in zip(model.chunks, model.stages)
        for name, parameter in chunk.named_parameters()
    }
    found: dict[str, list[torch.Tensor]] = {}
    for optimizer in distributed_optimizers(model):
        for maps in optimizer.gbuf_ranges:
            for bucket in (bucket for buckets in maps.values() for bucket in buckets):
                for parameter, ranges in bucket["param_map"].items():
                    is_mine = parameter.tensor_model_parallel or model.at.tensor == 0
                    if is_mine and param_is_not_shared(parameter):
                        held = slice(ranges["param"].start, ranges["param"].end)
                        for kind, values in (("grad", parameter.main_grad), ("weight", parameter.detach())):
                            found.setdefault(f"{kind}_norm/{names[parameter]}", []).append(values.view(-1)[held])
    keys = [f"{kind}_norm/{block}" for kind in ("grad", "weight") for block in blocks]
    device = next(model.module.parameters()).device
    squares = []
    for key in keys:  # in fp32, whatever the parameters are in
        of_parts = torch._foreach_norm(found[key], dtype=torch.float32) if key in found else [torch.zeros((), device=device)]
        squares.append(torch.stack(of_parts).double().square().sum())
    total = torch.stack(squares)
    dist.all_reduce(total)
    norms = dict(zip(keys, total.sqrt().tolist()))
    there = [block for block in blocks if norms[f"weight_norm/{block}"] > 0]
    return {f"{kind}_norm/{block}": norms[f"{kind}_norm/{block}"] for kind in ("grad", "weight") for block in there}
