"""Reading Hugging Face shards and the life of checkpoint folders.

Not covered: Megatron's distributed checkpoint itself and kills of real processes (tests/distributed), reading only a
rank's bytes (that it reads the right ones is).
"""

import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_agent.errors import CheckpointError
from megatron_agent.models.mapping import Entry, Piece, Replicated, Split, pieces
from megatron_agent.training.checkpoint import (
    begin_checkpoint,
    complete_checkpoints,
    drop_old,
    finish_checkpoint,
    load_hf_shards,
    read_state,
    weight_files,
)


def entry(name, shape, rule):
    return Entry(name, shape, "weight", rule, "first", None, rule)


def of_rank(entry, rank, size):
    return pieces([(entry.hf_name, entry.shape, entry.param, entry.rule)], rank, size)


ROW = torch.arange(12.0).reshape(4, 3)
WHOLE = Piece("a", ((0, 4), (0, 3)), "weight", ((0, 4), (0, 3)))
TABLE = [entry("a", (4, 3), Replicated())]


def linear(rows=4):
    return torch.nn.Linear(3, rows, bias=False)


def shard(folder, tensors_of_files):
    """A folder with an index, as checkpoints of several files have."""
    index = {}
    for file, tensors in tensors_of_files.items():
        save_file(tensors, folder / file)
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_one_rank_reads_its_rows_and_padding_is_zero(tmp_path):
    save_file({"a": ROW[:3].contiguous()}, tmp_path / "model.safetensors")
    module = linear(rows=2)
    vocabulary = entry("a", (3, 3), Split(0, 2))
    load_hf_shards(module, of_rank(vocabulary, 1, 2), tmp_path, [vocabulary])
    assert module.weight.tolist() == [[6, 7, 8], [0, 0, 0]]


def test_shards_of_several_files(tmp_path):
    shard(tmp_path, {"1.safetensors": {"a": ROW[:2].contiguous()}, "2.safetensors": {"b": ROW[2:].contiguous()}})
    module = linear()
    both = [Piece("a", ((0, 2), (0, 3)), "weight", ((2, 4), (0, 3))), Piece("b", ((0, 2), (0, 3)), "weight", ((0, 2), (0, 3)))]
    load_hf_shards(module, both, tmp_path, [entry(name, (2, 3), Replicated()) for name in "ab"])
    assert torch.equal(module.weight, torch.cat([ROW[2:], ROW[:2]]))
    assert {name: file.name for name, file in weight_files(tmp_path).items()} == {"a": "1.safetensors", "b": "2.safetensors"}


def test_a_missing_tensor_is_named(tmp_path):
    save_file({"b": ROW}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="tensor 'a' is missing"):
        load_hf_shards(linear(), [WHOLE], tmp_path, TABLE)


def test_a_missing_file_is_named(tmp_path):
    shard(tmp_path, {"1.safetensors": {"a": ROW}, "2.safetensors": {"b": ROW}})
    (tmp_path / "2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"files that are not there: .*2\.safetensors"):
        load_hf_shards(linear(), [WHOLE], tmp_path, TABLE)


@pytest.mark.parametrize("tensor", [ROW[:3].contiguous(), ROW[:, :2].contiguous(), ROW[0].contiguous()])
def test_a_tensor_of_the_wrong_shape_is_named(tmp_path, tensor):
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"a has shape \[.*\[4, 3\]"):
        load_hf_shards(linear(), [WHOLE], tmp_path, TABLE)


def test_a_tensor_that_is_too_large_is_named(tmp_path):
    save_file({"a": torch.zeros(5, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"a has shape \[5, 3\], the config calls for \[4, 3\]"):
        load_hf_shards(linear(), [WHOLE], tmp_path, TABLE)


def test_a_parameter_that_nothing_fills_is_named(tmp_path):
    save_file({"a": ROW}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no weight rule fills parameters \['bias'\]"):
        load_hf_shards(torch.nn.Linear(3, 4), [WHOLE], tmp_path, TABLE)


def test_a_rank_that_holds_only_padding_of_the_vocabulary(tmp_path):
    save_file({"a": ROW}, tmp_path / "model.safetensors")
    module = linear()
    vocabulary = entry("a", (4, 3), Split(0, 4))
    load_hf_shards(module, of_rank(vocabulary, 1, 2), tmp_path, [vocabulary])
    assert module.weight.abs().sum() == 0


def cut(file):
    data = file.read_bytes()
    file.write_bytes(data[: len(data) - 10])


def test_a_truncated_file_is_named(tmp_path):
    save_file({"a": ROW}, tmp_path / "model.safetensors")
    cut(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged or truncated"):
        load_hf_shards(linear(), [WHOLE], tmp_path, TABLE)


def test_a_truncated_file_of_several_is_named(tmp_path):
    shard(tmp_path, {"1.safetensors": {"a": ROW}})
    cut(tmp_path / "1.safetensors")
    with pytest.raises(CheckpointError, match=r"1\.safetensors: damaged or truncated"):
        load_hf_shards(linear(), [WHOLE], tmp_path, TABLE)


def test_an_index_that_is_wrong(tmp_path):
    shard(tmp_path, {"1.safetensors": {"b": ROW}})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "1.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"1\.safetensors: tensor 'a' is not in the file"):
        load_hf_shards(linear(), [WHOLE], tmp_path, TABLE)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_damaged(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json: damaged index"):
        load_hf_shards(linear(), [WHOLE], tmp_path, TABLE)


@pytest.mark.parametrize("size", [0, 4])
def test_a_file_that_is_nearly_empty(tmp_path, size):
    shard(tmp_path, {"1.safetensors": {"a": ROW}})
    (tmp_path / "1.safetensors").write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match=r"1\.safetensors: damaged or truncated"):
        load_hf_shards(linear(), [WHOLE], tmp_path, TABLE)


def write(root, step, keep=0, **state):
    (begin_checkpoint(root, step) / "weights").write_text(f"{step}")
    final = finish_checkpoint(root, step, {"step": step, **state})
    drop_old(root, keep)
    return final


def test_a_finished_checkpoint(tmp_path):
    final = write(tmp_path, 10, order=[3, 1])
    assert final == tmp_path / "step_00000010"
    assert sorted(p.name for p in final.iterdir()) == ["CHECKSUMS", "state.json", "weights"]
    assert read_state(final) == {"step": 10, "order": [3, 1]}
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000010"]


def test_the_newest_are_kept(tmp_path):
    for step in (2, 10, 9, 100):  # numbers, not names, are in order
        write(tmp_path, step, keep=2)
    assert [read_state(p)["step"] for p in complete_checkpoints(tmp_path)] == [10, 100]
    write(tmp_path, 101, keep=0)
    assert [read_state(p)["step"] for p in complete_checkpoints(tmp_path)] == [10, 100, 101]
    write(tmp_path, 102)
    drop_old(tmp_path, 1, best="step_00000010")
    assert [read_state(p)["step"] for p in complete_checkpoints(tmp_path)] == [10, 102]


@pytest.mark.parametrize("change", ["flip", "cut", "delete"])
@pytest.mark.parametrize("name", ["state.json", "CHECKSUMS"])
def test_a_damaged_state_is_named(tmp_path, name, change):
    file = write(tmp_path, 10) / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data if change == "flip" else data[:-3])
    if change == "delete":
        file.unlink()
    with pytest.raises(CheckpointError, match=rf"{name}.*(damaged|truncated|missing).*move step_00000010 away"):
        read_state(tmp_path / "step_00000010")


def test_every_flipped_bit_of_the_small_files_is_found(tmp_path):
    folder = write(tmp_path, 10)
    for name in ("state.json", "CHECKSUMS"):
        data = (folder / name).read_bytes()
        for at in range(len(data) * 8):
            changed = bytearray(data)
            changed[at // 8] ^= 1 << at % 8
            (folder / name).write_bytes(changed)
            with pytest.raises(CheckpointError, match=name):
                read_state(folder)
        (folder / name).write_bytes(data)
    assert read_state(folder)["step"] == 10


def test_a_partial_folder_does_not_count_and_is_started_afresh(tmp_path):
    write(tmp_path, 1)
    aside = begin_checkpoint(tmp_path, 2)
    (aside / "half").write_text("x")
    (tmp_path / "step_00000003").mkdir()  # bears the name, has no state
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step_00000001"]
    assert list(begin_checkpoint(tmp_path, 2).iterdir()) == []


def test_a_checkpoint_written_again_replaces_the_old_one(tmp_path):
    write(tmp_path, 5, order=[1])
    write(tmp_path, 5, order=[2])
    assert read_state(complete_checkpoints(tmp_path)[-1])["order"] == [2]


def test_what_killed_runs_left_is_removed(tmp_path):
    write(tmp_path, 1)
    for name in (".step_00000002.partial", ".step_00000003.partial", ".step_00000000.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step_00000001"]
    begin_checkpoint(tmp_path, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".step_00000004.partial", "notes", "step_00000001"]


def test_a_kill_while_an_old_checkpoint_is_deleted(tmp_path, monkeypatch):
    """It is either whole or not listed."""
    write(tmp_path, 1)
    aside = begin_checkpoint(tmp_path, 2)
    (aside / "weights").write_text("2")

    def killed(folder, ignore_errors=False):
        if folder.is_dir():
            raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        finish_checkpoint(tmp_path, 2, {"step": 2})
        drop_old(tmp_path, keep=1)
    monkeypatch.undo()
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step_00000002"]
    write(tmp_path, 3, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003"]


def test_no_folder_no_checkpoints(tmp_path):
    assert complete_checkpoints(tmp_path / "nowhere") == []
