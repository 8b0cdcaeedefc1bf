"""Positions, patches and the vision tower against transformers; what a folder or a layout is refused for.

Not covered: video, the language model (tests/distributed/test_parity.py), pictures whose sides transformers would resize.
"""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch

from megatron_agent.errors import CheckpointError, ConfigError
from megatron_agent.models.qwen2_5_vl import Qwen2_5_VL
from megatron_agent.models.qwen2_5_vl.positions import mrope_positions
from megatron_agent.models.qwen2_5_vl.vision import VisionConfig, VisionTower, patchify
from megatron_agent.training.layout import Layout
from megatron_agent.types import ImageRef


@pytest.fixture(scope="module")
def family(tiny_models):
    return Qwen2_5_VL(tiny_models["tied"])


@pytest.fixture(scope="module")
def reference(tiny_models):
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_models["tied"], dtype=torch.float32).eval()


def test_sizes_are_read_from_both_kinds_of_config(tiny_models, tmp_path):
    """Published checkpoints keep the text's keys at the top level and name rope's `rope_scaling`."""
    nested = json.loads((tiny_models["untied"] / "config.json").read_text())
    text = nested.pop("text_config")
    rope = text.pop("rope_parameters")
    flat = {**text, **nested, "rope_theta": rope["rope_theta"]}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat["vision_config"]["in_chans"] = flat["vision_config"].pop("in_channels")
    (tmp_path / "config.json").write_text(json.dumps(flat))
    (tmp_path / "model.safetensors").touch()
    ours, other = Qwen2_5_VL(tiny_models["untied"]), Qwen2_5_VL(tmp_path)
    assert ours.text == other.text and ours.vision == other.vision
    assert (ours.text.num_heads, ours.text.num_kv_heads, ours.text.head_dim) == (8, 4, 16)
    assert (ours.text.vocab_size, ours.text.tied, ours.text.rope_theta, ours.text.mrope_section) == (365, False, 1e5, (2, 3, 3))
    assert Qwen2_5_VL(tiny_models["tied"]).text.tied
    assert [ours.padded_vocab_size(tp) for tp in (1, 2, 4)] == [384, 512, 512]


def test_keys_that_transformers_4_left_out_are_its_defaults(tmp_path):
    """Many published fine-tunes have such a config.json: of the vision part, what differs from the defaults only."""
    from transformers import AutoConfig

    vision = {"hidden_size": 1280, "in_chans": 3, "model_type": "qwen2_5_vl", "out_hidden_size": 2048, "spatial_patch_size": 14}
    text = dict(
        hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
        vocab_size=151936, rms_norm_eps=1e-6, max_position_embeddings=128000, rope_theta=1e6, tie_word_embeddings=True,
        rope_scaling={"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
    )  # fmt: skip
    ids = {"image_token_id": 151655, "vision_start_token_id": 151652, "vision_end_token_id": 151653}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", **text, **ids, "vision_config": vision}))
    ours, theirs = Qwen2_5_VL(tmp_path).vision, AutoConfig.from_pretrained(tmp_path).vision_config
    assert ours == VisionConfig(**{f.name: getattr(theirs, f.name) for f in dataclasses.fields(VisionConfig)})
    assert (ours.depth, ours.intermediate_size, ours.hidden_size, ours.out_hidden_size) == (32, 3420, 1280, 2048)


def test_folders_that_are_refused(tiny_models, tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Qwen2_5_VL(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        Qwen2_5_VL(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(CheckpointError, match="model_type is 'qwen3'"):
        Qwen2_5_VL(tmp_path)
    config = json.loads((tiny_models["tied"] / "config.json").read_text())
    for key in ("vision_config", "image_token_id"):
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != key}))
        with pytest.raises(CheckpointError, match=f"no {key}"):
            Qwen2_5_VL(tmp_path)
    for key, value, message in (
        ("rope_parameters", {"rope_type": "yarn", "factor": 4}, "rope of type 'yarn'"),
        ("use_sliding_window", True, "use_sliding_window is true"),
    ):
        text = {**config["text_config"], key: value}
        (tmp_path / "config.json").write_text(json.dumps({**config, "text_config": text}))
        with pytest.raises(CheckpointError, match=message):
            Qwen2_5_VL(tmp_path)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(tensor_parallel=3), r"tensor_parallel=3 does not divide the model's attention heads \(4\).*\[1, 2, 4\]"),
        (Layout(pipeline_parallel=5), "more than the model's 4 layers"),
        (Layout(pipeline_parallel=2, stage_layers=(1, 2)), r"stage_layers=\[1, 2\]: give 2 numbers .* the model's 4 layers"),
        (Layout(pipeline_parallel=2, stage_layers=(0, 4)), "of at least 1"),
        (Layout(pipeline_parallel=2, virtual_pipeline=2, stage_layers=(2, 2)), "give 4 numbers"),
    ],
)
def test_layouts_that_are_refused(family, layout, message):
    with pytest.raises(ConfigError, match=message):
        family.check(layout)


@pytest.mark.parametrize("layout", [Layout(), Layout(2), Layout(2, 4), Layout(1, 2, 5)])
def test_layouts_that_fit(family, layout):
    family.check(layout)


def random_row(rng, image_token_id):
    """Text and up to eight pictures anywhere (a token at least between two), with their grids in merged patches."""
    ids, grids = [rng.randrange(200) for _ in range(rng.choice([0, 1, 5]))], []
    for _ in range(rng.randint(0, 8)):
        grid = (1, 1, rng.randint(21, 30)) if rng.random() < 0.05 else (1, rng.randint(1, 5), rng.randint(1, 5))
        ids += [image_token_id] * (grid[1] * grid[2])
        grids.append(grid)
        ids += [rng.randrange(200) for _ in range(rng.choice([1, 2, 7]))]
    if grids and rng.random() < 0.3:
        while ids[-1] != image_token_id:
            ids.pop()  # a picture at the very end
    return ids or [1], grids


def test_positions_equal_transformers(reference, family):
    rng, rows_with_pictures = random.Random(0), 0
    for _ in range(1000):
        ids, grids = random_row(rng, family.image_token_id)
        rows_with_pictures += bool(grids)
        row = torch.tensor([ids])
        theirs, _ = reference.model.get_rope_index(
            row,
            mm_token_type_ids=(row == family.image_token_id).int(),
            image_grid_thw=torch.tensor([[1, 2 * rows, 2 * columns] for _, rows, columns in grids]) if grids else None,
            video_grid_thw=None,
        )
        ours = mrope_positions(np.array(ids), family.image_token_id, grids)
        assert ours.dtype == np.int64
        np.testing.assert_array_equal(ours, theirs[:, 0].numpy(), err_msg=f"{ids} {grids}")
        images = [ImageRef(str(i), columns * 28, rows * 28) for i, (_, rows, columns) in enumerate(grids)]
        np.testing.assert_array_equal(family.positions(ids, images), ours)
    assert rows_with_pictures > 700


def test_positions_drawn_by_hand():
    """One text token, a picture of 2 x 3 merged patches, two text tokens."""
    found = mrope_positions(np.array([5, 9, 9, 9, 9, 9, 9, 5, 5]), 9, [(1, 2, 3)])
    assert found.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5],
        [0, 1, 1, 1, 2, 2, 2, 4, 5],
        [0, 1, 2, 3, 1, 2, 3, 4, 5],
    ]


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([1, 9, 9], [], "more image tokens than its 0 grids"),
        ([1, 9, 9, 1], [(1, 1, 1)], "more image tokens"),
        ([1, 9, 1], [(1, 1, 2)], "picture at token 1: expected 2 image tokens"),
        ([1, 9], [(1, 1, 2)], "picture at token 1: expected 2"),
        ([1, 9, 9], [(1, 1, 2), (1, 1, 1)], "fewer pictures than the 2 grids"),
    ],
)
def test_tokens_and_grids_that_do_not_match(ids, grids, message):
    with pytest.raises(ValueError, match=message):
        mrope_positions(np.array(ids), 9, grids)


@pytest.mark.parametrize(("width", "height"), [(28, 28), (56, 28), (84, 140), (252, 56), (112, 112)])
def test_patches_equal_transformers(family, width, height):
    from PIL import Image
    from transformers import Qwen2VLImageProcessor

    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    processor = Qwen2VLImageProcessor(do_resize=False, patch_size=14, temporal_patch_size=2, merge_size=2)
    theirs = processor(images=[Image.fromarray(pixels)], return_tensors="np")
    ours = family.patches(pixels)
    assert ours.dtype == np.float32 and ours.shape == (width * height // 14**2, 3 * 2 * 14**2)
    assert family.grid(ImageRef("x", width, height)) == tuple(theirs["image_grid_thw"][0])
    np.testing.assert_allclose(ours, theirs["pixel_values"], rtol=0, atol=1e-6)


def test_patches_of_a_picture_with_odd_sides_are_refused():
    with pytest.raises(ValueError, match="30x28 px: both sides must be multiples of 28"):
        patchify(np.zeros((28, 30, 3), np.uint8), VisionConfig(1, 8, 8, 2, 8))


# One window, several windows, ragged last windows in both directions, two frames; and pictures back to back.
GRIDS = [
    ((1, 2, 2),),
    ((1, 8, 8),),
    ((1, 20, 14),),
    ((1, 10, 18),),
    ((2, 6, 6),),
    ((1, 6, 4), (1, 20, 14), (2, 6, 10), (1, 4, 4)),
]


@pytest.fixture(scope="module")
def tower(family, reference):
    tower = VisionTower(family.vision)
    tower.load_state_dict(reference.model.visual.state_dict())
    return tower


@pytest.mark.parametrize("grids", GRIDS, ids=str)
def test_vision_tower_equals_transformers(tower, reference, grids):
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(sum(t * h * w for t, h, w in grids), 1176, generator=generator)
    with torch.no_grad():
        ours = tower(patches, grids)
        theirs = reference.model.visual(patches, torch.tensor(grids)).pooler_output
    assert ours.shape == (len(patches) // 4, 128)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert theirs.std() > 0.05  # else everything is close to everything


def test_windows_and_full_attention_differ(tower, family):
    """That the parity above can see which blocks are windowed."""
    grid = ((1, 20, 14),)
    patches = torch.randn(280, 1176, generator=torch.Generator().manual_seed(0))
    other = VisionTower(dataclasses.replace(family.vision, fullatt_block_indexes=()))
    other.load_state_dict(tower.state_dict())
    with torch.no_grad():
        assert (tower(patches, grid) - other(patches, grid)).abs().max() > 1e-3
