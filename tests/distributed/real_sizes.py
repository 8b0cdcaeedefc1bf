"""Builds every pipeline stage of real configurations on the meta device and holds it against the mapping table.

Standard input: a JSON list of [config.json, run.yaml, [section.key=value, ...]]; output: what was found, as JSON, in order.
A program of its own, for Megatron's process groups are global and this world is larger than the machine: the fake backend of
torch.distributed gives each stage's rank its groups, and no parameter has memory. The stand-ins of training/cpu.py are not
installed: they send what asks for a device to real memory.
"""

import json
import resource
import shutil
import sys
import tempfile
from itertools import combinations
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_agent import registry
from megatron_agent.config import load
from megatron_agent.models.mapping import overlap, volume
from megatron_agent.training.layout import is_tensor_parallel, megatron_pieces


def build(family, layout, rank, head):
    """The modules of one rank, named as in training/megatron.py."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    interleaved = layout.virtual_pipeline > 1
    parallel_state.initialize_model_parallel(
        layout.tensor_parallel,
        layout.pipeline_parallel,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if interleaved else None,
        context_parallel_size=layout.context_parallel,
        create_gloo_process_groups=False,
    )
    at = (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank())
    assert at == (layout.coordinates(rank).tensor, layout.coordinates(rank).pipeline)
    config = family.transformer_config(layout, torch.bfloat16)
    with torch.device("meta"):
        chunks = [
            family.build(config, layout.stage(at[1], family.num_layers, chunk), chunk if interleaved else None, head)
            for chunk in range(layout.virtual_pipeline)
        ]
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return torch.nn.ModuleList(chunks) if interleaved else chunks[0]


def padding_rows(family, layout, name, shape, tensor_rank):
    """Of this rank's shard: rows of the padded vocabulary that are no token's."""
    if not name.endswith(("word_embeddings.weight", "output_layer.weight")):
        return 0
    return max(0, (tensor_rank + 1) * shape[0] - max(family.text.vocab_size, tensor_rank * shape[0]))


def not_covered(shapes, pieces, padding):
    """What is wrong between the parameters of one rank and the boxes of the table, one line each."""
    boxes = {name: [p.param_slice for p in pieces if p.param == name] for name in shapes}
    wrong = [f"no parameter {name}" for name in {p.param for p in pieces} - set(shapes)]
    for name, shape in shapes.items():
        if any(stop > size for box in boxes[name] for (_, stop), size in zip(box, shape, strict=True)):
            wrong.append(f"{name}: a box outside {shape}")
        if any(overlap(a, b) for a, b in combinations(boxes[name], 2)):
            wrong.append(f"{name}: boxes overlap")
        if sum(map(volume, boxes[name])) != prod(shape) - padding[name] * prod(shape[1:]):
            wrong.append(f"{name}: boxes do not fill {shape} without {padding[name]} rows of padding")
    return wrong


def examine(family, layout, head):
    """-> (parameters of the whole model, of the largest rank, what is wrong)."""
    table = family.table(layout, transformer_engine=False, head=head)
    total, largest, wrong, covered = 0, 0, [], set()
    ranks = [r for r in range(layout.world_size) if layout.coordinates(r).data == layout.coordinates(r).context == 0]
    modules = {}
    for rank in ranks:
        at = layout.coordinates(rank)
        if at.pipeline not in modules:
            modules[at.pipeline] = build(family, layout, rank, head)
        parameters = dict(modules[at.pipeline].named_parameters())
        assert all(p.is_meta and p.dtype == torch.bfloat16 for p in parameters.values())
        shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        padding = {name: padding_rows(family, layout, name, shape, at.tensor) for name, shape in shapes.items()}
        pieces = megatron_pieces(table, layout, family.num_layers, rank)
        wrong += [f"rank {rank}: {line}" for line in not_covered(shapes, pieces, padding)]
        covered |= {(p.hf_name, p.hf_slice) for p in pieces}
        shards = {p.param for p in pieces if is_tensor_parallel(p, table)}
        copies = {name for name in shapes if family.text.tied and name.endswith("output_layer.weight")}
        own = [name for name in shapes if name not in copies and (name in shards or at.tensor == 0)]
        total += sum(prod(shapes[name]) - padding[name] * prod(shapes[name][1:]) for name in own)
        largest = max(largest, sum(map(prod, shapes.values())))
    for e in {e.hf_name: e for e in table}.values():
        if sum(volume(box) for name, box in covered if name == e.hf_name) != prod(e.shape):
            wrong.append(f"no rank holds all of {e.hf_name}")
    return total, largest, wrong


def check(config_json, run_yaml, overrides):
    config = load(run_yaml, overrides)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(config_json, Path(folder) / "config.json")
        family = registry.resolve("models", config.model.family)(folder)
    layout = family.balanced(config.training.layout)
    family.check(layout, config.rollout.tensor_parallel)
    found = {"world_size": layout.world_size, "stage_layers": layout.stage_layers, "costs": family.stage_costs(layout)}
    for head in ("policy", "value"):
        total, largest, wrong = examine(family, layout, head)
        found[head] = {"parameters": total, "of_largest_rank": largest, "wrong": wrong[:5]}
    return found


def main():
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # Megatron moves the copy of a tied head as soon as it is made
    cases = [check(*case) for case in json.load(sys.stdin)]
    print(json.dumps({"cases": cases, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}))


if __name__ == "__main__":
    main()
