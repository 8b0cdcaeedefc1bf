"""Every family of models/: a table without holes or doubles for any layout, and the parts that other stages ask for.

Not covered: that the built model computes the right thing (tests/distributed), the renderer (tests/unit/models).
"""

import inspect

import numpy as np
import pytest

from megatron_agent import registry
from megatron_agent.errors import DataError
from megatron_agent.models.base import ModelFamily
from megatron_agent.training.layout import Layout, holds, megatron_pieces, vllm_pieces
from megatron_agent.types import ImageRef

# A new family names the fixture of tests/conftest.py that has a small checkpoint of it, and the one of them.
CHECKPOINTS = {"qwen2_5_vl": ("tiny_models", "tied"), "qwen2": ("tiny_text_model", None)}
WITHOUT_PICTURES = {"qwen2"}
FAMILIES = registry.names("models")
LAYOUTS = [Layout(), Layout(2, 1, 1), Layout(1, 2, 1), Layout(2, 2, 2)]


@pytest.mark.parametrize("name", FAMILIES)
def test_shape(name):
    component = registry.resolve("models", name)
    assert issubclass(component, ModelFamily) and not inspect.isabstract(component)
    assert name in CHECKPOINTS, "add a tiny checkpoint of this family to the test"


@pytest.fixture(params=sorted(CHECKPOINTS))
def family_name(request):
    return request.param


@pytest.fixture
def family(family_name, request):
    fixture, which = CHECKPOINTS[family_name]
    found = request.getfixturevalue(fixture)
    return registry.resolve("models", family_name)(found[which] if which else found)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("transformer_engine", [False, True])
def test_table(family, layout, transformer_engine):
    family.check(layout)
    table = family.table(layout, transformer_engine)
    rows = [(e.hf_name, e.param, e.vllm_param, str(e.rule), str(e.vllm_rule)) for e in table]
    assert len(set(rows)) == len(rows)
    num_layers = family.num_layers
    assert {e.stage for e in table} == {"first", "last", *range(num_layers)}
    stages = [layout.stage(i, num_layers) for i in range(layout.pipeline_parallel)]
    assert all(sum(holds(e, stage) for stage in stages) == 1 for e in table)
    ranks = [megatron_pieces(table, layout, num_layers, rank) for rank in range(layout.world_size)]
    shapes = {e.hf_name: e.shape for e in table}
    for of_rank in [*ranks, vllm_pieces(table, layout.tensor_parallel, 0)]:
        for p in of_rank:
            assert [b - a for a, b in p.hf_slice] == [b - a for a, b in p.param_slice]
            assert all(0 <= a < b <= n for (a, b), n in zip(p.hf_slice, shapes[p.hf_name], strict=True))
            assert all(a >= 0 for a, _ in p.param_slice)


def test_every_tensor_of_the_checkpoint_has_a_row(family):
    from megatron_agent.training.checkpoint import weight_files

    table = family.table(Layout(), transformer_engine=False)
    assert {e.hf_name for e in table} == set(weight_files(family.path))


def test_pictures(family, family_name):
    ref, pixels = ImageRef("x", 84, 56), np.zeros((56, 84, 3), np.uint8)
    if family_name in WITHOUT_PICTURES:
        for refuse in (lambda: family.patches(pixels), lambda: family.grid(ref), lambda: family.positions([1, 2], [ref])):
            with pytest.raises(DataError, match="takes no pictures"):
                refuse()
        return
    patches = family.patches(pixels)
    time, rows, columns = family.grid(ref)
    assert patches.shape[0] == time * rows * columns and patches.dtype == np.float32


def test_positions_of_text_count_up(family):
    assert family.positions([1, 2, 3], []).tolist() == [[0, 1, 2]] * 3
