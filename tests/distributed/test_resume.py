"""Training checkpoints of real ranks: exact resume, other layouts, damage, full disks, and SIGKILL at random moments.

Not covered: a power failure (files are synced, nobody pulls a plug), CUDA's random state, other file systems than the
local one (tools/kill_checkpoints.py --folder tries them).
"""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import rank_jobs_checkpoint as jobs

from megatron_agent.checkpoints import Checkpoints
from megatron_agent.config import CheckpointSection, ModelSection, RunConfig
from megatron_agent.training.actor import TrainingConfig
from megatron_agent.training.checkpoint import complete_checkpoints
from megatron_agent.training.checksums import read_checksums
from megatron_agent.training.dist_checkpoint import DistCheckpoint
from megatron_agent.training.layout import Layout

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

TP2, PP2, DP2, VPP2 = Layout(2), Layout(1, 2), Layout(1, 1, 2), Layout(pipeline_parallel=2, virtual_pipeline=2)
TP2DP2 = Layout(2, 1, 2)


def losses(results):
    return [sum(s for s, _, _ in step) / sum(n for _, n, _ in step) for step in zip(*(r["after"] for r in results))]


class Saved:
    """Whole runs, each made once."""

    def __init__(self, ranks, path, root):
        self.ranks, self.path, self.root, self.runs = ranks, path, root, {}

    def run(self, layout, dtype="float32"):
        root = self.root / f"{layout.tensor_parallel}{layout.pipeline_parallel}{layout.data_parallel}{dtype}"
        if root not in self.runs:
            self.runs[root] = self.ranks.run(layout.world_size, jobs.whole_run, self.path, layout, root, dtype)
        return root, self.runs[root]


@pytest.fixture(scope="module")
def saved(ranks, tiny_models, tmp_path_factory):
    return Saved(ranks, tiny_models["tied"], tmp_path_factory.mktemp("resume"))


@pytest.mark.parametrize(
    ("layout", "dtype"), [(TP2, "float32"), (PP2, "float32"), (TP2DP2, "bfloat16")], ids=["tp2", "pp2", "tp2dp2 bf16"]
)
def test_a_resume_is_exact(saved, ranks, layout, dtype):
    """Also that what is saved is the state of its moment: the files were written after the third and fourth step."""
    root, whole = saved.run(layout, dtype)
    again = ranks.run(layout.world_size, jobs.second_half, saved.path, layout, root, dtype)
    for one, other in zip(whole, again, strict=True):
        assert other["digest"] == one["digest"] != one["went_on"]
        assert other["after"] == one["after"]  # losses and gradient norms, bit for bit
        assert other["numbers"] == one["numbers"]
        assert other["went_on"] == one["went_on"]


@pytest.mark.parametrize(
    ("layout", "other"),
    [(TP2, PP2), (TP2, DP2), (PP2, VPP2), (DP2, TP2), (DP2, TP2DP2), (TP2DP2, Layout())],
    ids=["tp2 to pp2", "tp2 to dp2", "pp2 to vpp2", "dp2 to tp2", "dp2 to tp2dp2", "tp2dp2 to one"],
)
def test_a_resume_in_another_layout(saved, ranks, layout, other):
    root, whole = saved.run(layout)
    again = ranks.run(other.world_size, jobs.second_half, saved.path, other, root)
    assert losses(again) == pytest.approx(losses(whole), abs=1e-6)
    numbers = [result["numbers"] for result in again]
    assert numbers != [result["numbers"] for result in whole]  # seeded anew
    assert len({tuple(n[:2]) for n in numbers}) == len(numbers)


def test_a_shard_lies_in_one_file_once(saved):
    """The state of the optimizer is not copied by data-parallel ranks: all files together hold each number once."""
    root, _ = saved.run(DP2)
    folder = complete_checkpoints(root)[-1]
    sizes = [p.stat().st_size for p in sorted(folder.glob("*.distcp"))]
    tensors = DistCheckpoint(folder).tensors
    num_bytes = sum(t.size.numel() * t.properties.dtype.itemsize for t in tensors.values())
    assert len(sizes) == 2 and min(sizes) > 0.25 * num_bytes and sum(sizes) < 1.5 * num_bytes
    moments = {k.removeprefix("optimizer.state.exp_avg.") for k in tensors if k.startswith("optimizer.state.exp_avg.")}
    assert moments == {k for k in tensors if not k.startswith("optimizer.")}


def flip(file, at):
    with open(file, "r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 1 << at % 8]))


def test_damage_is_named_on_every_rank_and_changes_nothing(saved, ranks, tiny_models, tmp_path):
    root, _ = saved.run(TP2)
    folder = complete_checkpoints(root)[-1]
    rng, expected, copies = random.Random(0), [], []

    def copy(*words):
        copies.append(tmp_path / f"copy{len(copies)}" / folder.name)
        expected.append(words)
        return Path(shutil.copytree(folder, copies[-1]))

    for item in rng.sample([i for i in read_checksums(folder)[0] if i.tensor], 6):
        flip(copy(item.file, f"tensor {item.tensor}", "damaged") / item.file, item.offset + rng.randrange(item.length))
    for name in (".metadata", "common.pt", "metadata.json", "rng.pt", "state.json", "CHECKSUMS"):
        flip(copy(name, "damaged") / name, rng.randrange((folder / name).stat().st_size))
        (copy(name, "missing") / name).unlink()
    distcp = copy("__1_0.distcp", "truncated", "tensor") / "__1_0.distcp"
    distcp.write_bytes(distcp.read_bytes()[:-100])
    (copy("__0_0.distcp", "missing") / "__0_0.distcp").unlink()
    copy()  # as it was
    for texts in ranks.run(2, jobs.load_errors, saved.path, TP2, copies):
        assert texts[-1] == ""
        for text, words in zip(texts[:-1], expected[:-1], strict=True):
            assert all(word in text for word in words) and "move step_00000002 away" in text, (words, text)
    for texts in ranks.run(2, jobs.load_errors, tiny_models["untied"], TP2, [folder]):
        assert "a checkpoint of another model" in texts[0] and "has shape" in texts[0] and "model.path" in texts[0]


def test_a_full_disk_is_raised_with_its_reason(ranks, tiny_models, tmp_path):
    for rank, texts in enumerate(ranks.run(2, jobs.save_beyond_the_disk, tiny_models["tied"], TP2, tmp_path, 300_000)):
        assert len(texts) == 3
        for text in texts:
            assert f"rank {rank}" in text and f"__{rank}_0.distcp: the checkpoint could not be written" in text, text
            assert "File too large" in text


class RealRanks:
    """The saving half of Actor over the test's ranks, which write before they answer."""

    def __init__(self, ranks, path, layout):
        self.ranks, self.path, self.layout = ranks, path, layout

    async def save(self, folder):
        self.ranks.run(self.layout.world_size, jobs.save_part, self.path, self.layout, folder)

    async def finish_save(self):
        pass


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_the_hugging_face_export_beside_it(ranks, tiny_models, tmp_path, name):
    """It is what `megatron-to-hf` gives without --like, loads in transformers, and holds the trained weights."""
    import asyncio

    import convert

    path = tiny_models[name]
    config = RunConfig(
        "run",
        str(tmp_path),
        model=ModelSection(str(path)),
        training=TrainingConfig(2),
        checkpoint=CheckpointSection(export_hf=True),
    )
    asyncio.run(Checkpoints(config).save(RealRanks(ranks, path, TP2), {"step": 1}, wait=True))
    (folder,) = complete_checkpoints(tmp_path / "run" / "checkpoints")
    assert convert.main(["megatron-to-hf", "--in", str(folder), "--out", str(tmp_path / "converted"), "--quiet"]) == 0
    assert convert.verify(folder / "hf_model", tmp_path / "converted", None, quiet=True) is None
    assert convert.verify(folder, tmp_path / "converted", None, quiet=True) is None
    assert convert.verify(path, tmp_path / "converted", None, quiet=True) is not None  # a step was taken
    assert {p.name for p in path.iterdir()} == {p.name for p in (folder / "hf_model").iterdir()}


def test_a_converted_checkpoint_says_that_its_tensors_are_unchecked(ranks, tiny_models, tmp_path):
    import convert

    convert.hf_to_megatron(tiny_models["tied"], tmp_path / "good", TP2, quiet=True)
    items, unchecked = read_checksums(tmp_path / "good")
    assert "convert.py verify" in unchecked and not any(item.tensor for item in items)
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    flip(tmp_path / "bad" / ".metadata", 1000)
    for good, bad in ranks.run(2, jobs.load_errors, tiny_models["tied"], TP2, [tmp_path / "bad", tmp_path / "good"]):
        assert bad == "" and ".metadata: damaged" in good


def test_kill_9_while_saving(tmp_path):
    """Every resume is from the newest complete checkpoint and exact; half of the kills are aimed, the others random."""
    command = [sys.executable, "-W", "ignore", "tools/kill_checkpoints.py", "--kills", "10", "--quiet"]
    command += ["--layout", "tp2", "--seed", "1", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] == 10 and counts["resumes compared"] >= 9
    assert counts["in the middle of a save"] >= 2 and counts["of a deletion"] >= 1
