"""tools/convert.py: both directions bit for bit, what real ranks make of a converted folder, and input that is refused.

Not covered: Transformer Engine's ranks (GPU), published checkpoints, a disk that is really full (a limit on the size of
files stands in for it), speed and memory (tools/bench_convert.py).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import rank_jobs
import torch
from safetensors.torch import load_file, save_file

from megatron_agent.models.qwen2_5_vl import Qwen2_5_VL
from megatron_agent.training.dist_checkpoint import DistCheckpoint, checkpoint_table, plan_chunks
from megatron_agent.training.layout import Layout
from megatron_agent.training.options import ModelOptions

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.append(str(TOOLS))
from convert import main  # noqa: E402

GATE = "model.layers.1.mlp.gate_proj.weight"
QKV = "visual.blocks.0.attn.qkv.weight"
LAYOUTS = [Layout(1, 1), Layout(2, 1), Layout(1, 2), Layout(2, 2)]


def write_hf(source, folder, dtype=None, num_files=1):
    """A copy of an HF folder in another dtype, cut into files with an index, tensors dealt out like cards."""
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    tensors = load_file(source / "model.safetensors")
    if dtype is not None:
        tensors = {name: t.to(dtype) for name, t in tensors.items()}
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    index = {}
    for number in range(num_files):
        file = f"model-{number + 1:05}-of-{num_files:05}.safetensors"
        part = dict(list(tensors.items())[number::num_files])
        save_file(part, folder / file, {"format": "pt", "made by": "test_convert"})
        index |= dict.fromkeys(part, file)
    total = sum(t.nbytes for t in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    return folder


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def to_megatron(source, out, layout=LAYOUTS[3]):
    degrees = ["--tp", str(layout.tensor_parallel), "--pp", str(layout.pipeline_parallel)]
    return main(["hf-to-megatron", "--in", str(source), "--out", str(out), "--quiet", *degrees])


def to_hf(source, out, *options):
    return main(["megatron-to-hf", "--in", str(source), "--out", str(out), "--quiet", *map(str, options)])


def verify(a, b, *options):
    return main(["verify", str(a), str(b), "--quiet", *map(str, options)])


@pytest.fixture(scope="module")
def hf(tiny_models, tmp_path_factory):
    """Per model: one file in float32, and three files in bfloat16."""
    root = tmp_path_factory.mktemp("hf")
    return {
        (name, kind): write_hf(path, root / f"{name} {kind}", *how)
        for name, path in tiny_models.items()
        for kind, how in {"float32": (), "bfloat16": (torch.bfloat16, 3)}.items()
    }


@pytest.fixture(scope="module")
def converted(hf, tmp_path_factory):
    """TP 2, PP 2."""
    root = tmp_path_factory.mktemp("megatron")
    for key, folder in hf.items():
        assert to_megatron(folder, root / " ".join(key)) == 0
    return {key: root / " ".join(key) for key in hf}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda at: f"tp{at.tensor_parallel}pp{at.pipeline_parallel}")
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_there_and_back_every_file_is_the_same(hf, tmp_path, name, kind, layout):
    source = hf[name, kind]
    assert to_megatron(source, tmp_path / "mg", layout) == 0
    shards = sorted(p.name for p in (tmp_path / "mg").glob("*.distcp"))
    assert shards == [f"__{rank}_0.distcp" for rank in range(layout.world_size)]
    assert to_hf(tmp_path / "mg", tmp_path / "back") == 0
    assert contents(tmp_path / "back") == contents(source)
    assert verify(source, tmp_path / "mg") == verify(tmp_path / "mg", tmp_path / "back") == 0


PUBLISHED_FILES = ("chat_template.json", "generation_config.json", "merges.txt", "preprocessor_config.json", "vocab.json")


def publish(source, folder):
    """`source` as the published Qwen2.5-VL folders are: bfloat16 in several files, the text's keys at the top level of
    config.json, rope as transformers 4 named it, the vision's `in_chans`."""
    write_hf(source, folder, torch.bfloat16, 3)
    nested = json.loads((folder / "config.json").read_text())
    text, vision = nested.pop("text_config"), nested.pop("vision_config")
    rope = text.pop("rope_parameters")
    vision["in_chans"] = vision.pop("in_channels")
    for key in ("dtype", "layer_types", "model_type"):
        text.pop(key, None)
    flat = {**text, **nested, "torch_dtype": "bfloat16", "rope_theta": rope["rope_theta"], "vision_config": vision}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(flat))
    for name in PUBLISHED_FILES:
        (folder / name).write_text(f"{name} of a model")
    return folder


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_a_published_folder(tiny_models, tmp_path, name):
    from transformers import Qwen2_5_VLForConditionalGeneration

    source = publish(tiny_models[name], tmp_path / "in")
    assert to_megatron(source, tmp_path / "mg") == to_hf(tmp_path / "mg", tmp_path / "back") == 0
    assert contents(tmp_path / "back") == contents(source) and set(PUBLISHED_FILES) < contents(source).keys()
    assert verify(source, tmp_path / "mg") == verify(tmp_path / "mg", tmp_path / "back") == 0
    flat, nested = Qwen2_5_VL(source), Qwen2_5_VL(tiny_models[name])
    assert (flat.text, flat.vision, flat.image_token_id) == (nested.text, nested.vision, nested.image_token_id)
    assert checkpoint_table(flat) == checkpoint_table(nested)
    _, loading = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(loading.values())  # transformers finds every weight, each of its shape, and no other


def test_what_a_kill_left_behind_is_no_part_of_the_next(hf, tmp_path):
    (tmp_path / ".mg.partial").mkdir()
    (tmp_path / ".mg.partial" / "__7_0.distcp").write_bytes(b"half")
    assert to_megatron(hf["tied", "float32"], tmp_path / "mg") == 0
    assert os.listdir(tmp_path) == ["mg"] and not (tmp_path / "mg" / "__7_0.distcp").exists()


def test_layouts_hold_the_same(hf, converted, tmp_path):
    assert to_megatron(hf["tied", "bfloat16"], tmp_path / "mg", LAYOUTS[0]) == 0
    assert verify(tmp_path / "mg", converted["tied", "bfloat16"]) == 0


def test_an_empty_folder_may_be_the_output(hf, tmp_path):
    (tmp_path / "mg").mkdir()
    assert to_megatron(hf["tied", "float32"], tmp_path / "mg") == 0


def load_converted(path, layout, dtype, folder):
    """-> the parameters that differ from those read from the HF folder."""
    from megatron_agent.training.checkpoint import load_weights
    from megatron_agent.training.megatron import MegatronModel

    model = MegatronModel(Qwen2_5_VL(path), layout, ModelOptions(dtype))
    expected = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.fill_(float("nan"))
    load_weights(model, Path(folder))
    return [name for name, p in model.module.named_parameters() if not torch.equal(p, expected[name])], len(expected)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [*LAYOUTS, Layout(1, 1, 2)], ids=["tp1", "tp2", "pp2", "tp2pp2", "dp2"])
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_ranks_of_any_layout_load_it(ranks, hf, converted, name, layout):
    for kind in ("float32", "bfloat16"):
        results = ranks.run(layout.world_size, load_converted, hf[name, kind], layout, kind, converted[name, kind])
        assert [differing for differing, _ in results] == [[]] * layout.world_size and all(n > 8 for _, n in results)


def save_untrained(path, layout, folder):
    from megatron_agent.training.checkpoint import save_megatron

    save_megatron(rank_jobs.make_model(path, layout), Path(folder))


@pytest.fixture(scope="module")
def training_checkpoint(ranks, hf, tmp_path_factory):
    """Of a run in float32 over weights that are exact in bfloat16, TP 2 PP 2, with the optimizer's state."""
    folder = tmp_path_factory.mktemp("training")
    ranks.run(4, save_untrained, hf["untied", "bfloat16"], Layout(2, 2), folder)
    return folder


@pytest.mark.distributed
def test_a_training_checkpoint_becomes_hf(training_checkpoint, hf, tmp_path):
    """In the dtype of --like: the float32 of the run is rounded to it."""
    like = hf["untied", "bfloat16"]
    assert to_hf(training_checkpoint, tmp_path / "out", "--like", like) == 0
    assert contents(tmp_path / "out") == contents(like)


@pytest.mark.distributed
def test_chunks_are_those_that_ranks_write(training_checkpoint, hf):
    """Except the vocabulary's padding."""
    table = checkpoint_table(Qwen2_5_VL(hf["untied", "bfloat16"]))
    ours = {(c.key, c.offsets, c.shape) for c in plan_chunks(table, Layout(2, 2)) if "word_emb" not in c.key}
    theirs = {
        (key, tuple(c.offsets), tuple(c.sizes[1:] if ".layers." in key else c.sizes))
        for key, tensor in DistCheckpoint(training_checkpoint).keys.items()
        for c in tensor.chunks
        if "word_emb" not in key
    }
    assert {c for c in ours if "output_layer" not in c[0]} == {c for c in theirs if "output_layer" not in c[0]}
    assert [c[1:] for c in sorted(ours ^ theirs)] == [((256, 0), (109, 128)), ((256, 0), (256, 128))]


@pytest.mark.distributed
def test_a_training_checkpoint_says_nothing_of_files(training_checkpoint, hf, tmp_path, capsys):
    assert to_hf(training_checkpoint, tmp_path / "out") == 2
    assert "say --like HF_DIR" in capsys.readouterr().err
    assert to_hf(training_checkpoint, tmp_path / "out", "--like", hf["tied", "bfloat16"]) == 2
    assert "language.output_layer.weight" in capsys.readouterr().err
    assert verify(training_checkpoint, hf["untied", "bfloat16"]) == 1
    assert "dtype torch.float32" in capsys.readouterr().out


def flip(file, position):
    with open(file, "r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("name", [GATE, QKV, "model.embed_tokens.weight", "model.norm.weight"])
def test_verify_names_the_tensor_of_a_flipped_bit(hf, converted, tmp_path, capsys, name):
    source, checkpoint = hf["untied", "bfloat16"], tmp_path / "mg"
    shutil.copytree(converted["untied", "bfloat16"], checkpoint)
    view = DistCheckpoint(checkpoint).views(checkpoint_table(Qwen2_5_VL(source)))[name]
    last = view.copies[-1]  # the last element that it holds
    index = [stop - 1 for _, stop in last.source_slice]
    strides = torch.empty(last.source.shape, device="meta").stride()
    flip(last.source.file, last.source.offset + 2 * sum(i * s for i, s in zip(index, strides)))
    assert verify(source, checkpoint) == 1
    at = [stop - 1 for _, stop in last.target_slice]
    assert capsys.readouterr().out.startswith(f"tensor {name!r}: ") and verify(checkpoint, source) == 1
    assert capsys.readouterr().out.rstrip().endswith(f"at {at}")


def test_verify_names_other_differences(hf, tmp_path, capsys):
    source = hf["untied", "float32"]
    for other, words in ((hf["tied", "float32"], "'lm_head.weight' is only in"), (hf["untied", "bfloat16"], "dtype")):
        assert verify(source, other) == 1
        assert words in capsys.readouterr().out
    cut = write_hf(source, tmp_path / "cut", None, 2)
    assert verify(source, cut) == 1 and "safetensors files: model.safetensors in" in capsys.readouterr().out
    shutil.copytree(source, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer_config.json").write_text("{}")
    assert verify(source, tmp_path / "copy") == 1 and "'tokenizer_config.json'" in capsys.readouterr().out
    assert verify(source, tmp_path / "nowhere") == 2


def edit_tensors(change):
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def edit_config(**values):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        for name, value in values.items():
            (config if name in config else config["text_config"])[name] = value
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def cut(folder, name="model.safetensors", count=10):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-count])


def write_index(names):
    def edit(folder):
        index = {name: names.get(name, "model.safetensors") for name in load_file(folder / "model.safetensors")}
        index = {name: file for name, file in index.items() if file}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))

    return edit


BAD_HF = {
    "missing tensor": (edit_tensors(lambda t: t.pop(GATE)), f"tensor '{GATE}' is missing"),
    "extra tensor": (edit_tensors(lambda t: t.update(more=torch.zeros(2))), "tensor 'more' is not of this model"),
    "wrong shape": (edit_tensors(lambda t: t.update({GATE: t[GATE][:-1]})), f"{GATE} has shape [167, 128], config.json"),
    "mixed dtypes": (edit_tensors(lambda t: t.update({GATE: t[GATE].half()})), "torch.float16"),
    "truncated": (cut, "model.safetensors: truncated"),
    "no header": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 30), "truncated or not a safetensors file"),
    "bad header": (lambda f: (f / "model.safetensors").write_bytes(b"\x02" + b"\0" * 7 + b"[}"), "damaged safetensors header"),
    "more layers": (edit_config(num_hidden_layers=4), "is missing"),
    "other width": (
        edit_config(intermediate_size=160),
        "down_proj.weight has shape [128, 168], config.json calls for [128, 160]",
    ),
    "other heads": (edit_config(num_key_value_heads=2), "k_proj.bias has shape [64], config.json calls for [32]"),
    "says tied": (edit_config(tie_word_embeddings=True), "tensor 'lm_head.weight' is not of this model"),
    "other family": (edit_config(model_type="llama"), "unknown name 'llama'"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "bad config": (lambda f: (f / "config.json").write_text("{"), "not a config of a known model"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no *.safetensors file"),
    "file not there": (write_index({GATE: "2.safetensors"}), "names files that are not there: ['2.safetensors']"),
    "not in the index": (write_index({GATE: None}), f"'{GATE}' of model.safetensors: model.safetensors.index.json does not"),
    "damaged index": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "index.json: damaged"),
}


def refused(root, capsys, status, message):
    assert status == 2 and message in capsys.readouterr().err
    assert [p.name for p in root.iterdir() if p.name.strip(".").startswith("out")] == []


@pytest.mark.parametrize("case", BAD_HF)
def test_bad_hf_is_refused(hf, tmp_path, capsys, case):
    damage, message = BAD_HF[case]
    source = write_hf(hf["untied", "float32"], tmp_path / "in")
    damage(source)
    refused(tmp_path, capsys, to_megatron(source, tmp_path / "out"), message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tp", "3"], "does not divide the model's attention heads (8)"),
        (["--pp", "3"], "is more than the model's 2 layers"),
        (["--tp", "0"], "1 or more"),
        (["--vpp", "2"], "set training.pipeline_parallel above 1"),
        (["--workers", "0"], "--workers 0"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(hf, tmp_path, capsys, options, message):
    arguments = ["hf-to-megatron", "--in", str(hf["untied", "float32"]), "--out", str(tmp_path / "out"), "--quiet"]
    refused(tmp_path, capsys, main([*arguments, *options]), message)


BAD_MEGATRON = {
    "shard cut": (lambda f: cut(f, "__3_0.distcp"), "__3_0.distcp: truncated"),
    "shard gone": (lambda f: (f / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
    "metadata cut": (lambda f: cut(f, ".metadata", 5000), "damaged metadata.json or .metadata"),
    "metadata gone": (lambda f: (f / ".metadata").unlink(), "not a distributed checkpoint"),
    "other format": (lambda f: (f / "metadata.json").write_text('{"sharded_backend": "zarr"}'), "format 'zarr'"),
    "damaged shard": (lambda f: (f / "__1_0.distcp").write_bytes(bytes((f / "__1_0.distcp").stat().st_size)), "damaged at"),
    "other config": (lambda f: shutil.rmtree(f / "hf"), "say --like"),
    "damaged layout": (lambda f: (f / "hf" / "hf_layout.json").write_text("{}"), "hf_layout.json: damaged"),
}


@pytest.mark.parametrize("case", BAD_MEGATRON)
def test_a_bad_checkpoint_is_refused(converted, tmp_path, capsys, case):
    damage, message = BAD_MEGATRON[case]
    shutil.copytree(converted["untied", "float32"], tmp_path / "in")
    damage(tmp_path / "in")
    refused(tmp_path, capsys, to_hf(tmp_path / "in", tmp_path / "out"), message)


def test_a_folder_in_use_is_left_alone(hf, converted, tmp_path, capsys):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_text("x")
    assert to_megatron(hf["tied", "float32"], tmp_path / "used") == to_hf(converted["tied", "float32"], tmp_path / "used") == 2
    assert capsys.readouterr().err.count("the output folder is not empty") == 2
    assert contents(tmp_path) == {"used/mine": b"x"}


def test_no_room_is_seen_before_the_start(hf, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(tmp_path, capsys, to_megatron(hf["tied", "float32"], tmp_path / "out"), "no room")


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_a_disk_that_fills_while_writing(hf, converted, tmp_path, direction):
    source = (hf if direction == "hf-to-megatron" else converted)["untied", "float32"]
    command = [sys.executable, TOOLS / "convert.py", direction, "--in", source, "--out", tmp_path / "out", "--quiet"]
    limited = subprocess.run(["bash", "-c", 'ulimit -f 400; exec "$@"', "bash", *command], capture_output=True, text=True)
    assert limited.returncode == 2 and "out: could not be written: " in limited.stderr
    assert os.listdir(tmp_path) == []
