"""DeepEyes' parquet -> Tasks: what is read, what is refused and how it is named; a stream that resumes exactly."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from megatron_agent.data.dataset import DataConfig, drop_long_prompts, read_tasks
from megatron_agent.data.images import ImageStore, PixelLimits
from megatron_agent.errors import ConfigError, DataError
from megatron_agent.types import ImageRef, Task

ENV = "visual_toolbox_v2"


def png(seed=0, side=56):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def row(**changes):
    values = {
        "data_source": "vstar",
        "prompt": [{"role": "system", "content": "Zoom."}, {"role": "user", "content": "<image>\nWhat colour?"}],
        "images": [{"bytes": png(), "path": None}],
        "env_name": ENV,
        "reward_model": {"style": "rule", "ground_truth": "red"},
        "extra_info": {"question": "What colour?", "target_bbox": [1, 2, 3, 4]},
    }
    return {key: value for key, value in {**values, **changes}.items() if value != "ABSENT"}


def write(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path / "store", PixelLimits(3136, 12845056))


def read(store, path, max_bad_rows=0.5, **options):
    return read_tasks([path], DataConfig(max_bad_rows=max_bad_rows), store, **options)


def test_a_row_becomes_a_task(store, tmp_path):
    tasks, report = read(store, write(tmp_path / "train.parquet", [row(), row(env_name="", data_source="chart")]))
    task = tasks[0]
    assert task == Task(
        task_id="train:0", data_source="vstar", env_name=ENV, ground_truth="red", question="What colour?",
        messages=(
            {"role": "system", "content": "Zoom."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat colour?"}]},
        ),
        images=(ImageRef(task.images[0].source, 56, 56),),
        extra_info={"question": "What colour?", "target_bbox": [1, 2, 3, 4]},
    )  # fmt: skip
    assert store.bytes_of(task.images[0].source) == png()
    assert (tasks[1].task_id, tasks[1].env_name) == ("train:1", "")
    assert (report.num_rows, report.num_bad, report.bad_rows, report.num_upscaled) == (2, 0, [], 0)
    assert report.by_env == {ENV: 1, "": 1} and report.by_source == {"vstar": 1, "chart": 1}


def test_pictures_by_path_and_without_markers(store, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(png(1))
    (tmp_path / "b.png").write_bytes(png(2, side=20))
    pictures = [{"bytes": None, "path": "pictures/a.png"}, {"bytes": None, "path": str(tmp_path / "b.png")}]
    prompt = [{"role": "user", "content": "Compare."}]
    tasks, report = read(store, write(tmp_path / "x.parquet", [row(images=pictures, prompt=prompt, extra_info="ABSENT")]))
    items = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Compare."}]
    assert tasks[0].messages == ({"role": "user", "content": items},)
    assert [store.bytes_of(ref.source) for ref in tasks[0].images] == [png(1), png(2, side=20)]
    assert tasks[0].question == "Compare." and tasks[0].extra_info == {} and report.num_upscaled == 1


def test_text_only_rows_keep_their_text(store, tmp_path):
    path = write(tmp_path / "x.parquet", [row(images="ABSENT", prompt=[{"role": "user", "content": "2+2?"}])])
    tasks, _ = read_tasks([path], DataConfig(image_key=""), store)
    assert tasks[0].messages == ({"role": "user", "content": "2+2?"},) and tasks[0].images == ()


BAD = {
    "broken picture": (row(images=[{"bytes": b"no picture", "path": None}]), "picture 0: unreadable"),
    "missing file": (row(images=[{"bytes": None, "path": "gone.png"}]), "cannot read 'gone.png'"),
    "nothing": (row(images=[{"bytes": None, "path": None}]), "neither bytes nor a path"),
    "marker without picture": (row(images=[]), "1 <image> markers in the user's text, 0 pictures"),
    "too many pictures": (row(images=[{"bytes": png(), "path": None}] * 2), "1 <image> markers in the user's text, 2 pict"),
    "no truth": (row(reward_model={"style": "rule", "ground_truth": None}), "no ground truth"),
    "blank truth": (row(reward_model={"style": "rule", "ground_truth": " "}), "no ground truth"),
    "no prompt": (row(prompt=[]), "the prompt is empty"),
    "no question": (row(prompt=[{"role": "user", "content": "<image> "}]), "no text of the user"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_rows_are_named_and_skipped(store, tmp_path, kind):
    bad, why = BAD[kind]
    path = write(tmp_path / "x.parquet", [row(), bad, row()])
    tasks, report = read(store, path)
    assert [task.task_id for task in tasks] == ["x:0", "x:2"]
    assert report.num_bad == 1 and report.bad_rows[0].startswith(f"{path}: row 1: ") and why in report.bad_rows[0]


def test_too_many_bad_rows_stop_the_run(store, tmp_path):
    path = write(tmp_path / "x.parquet", [row(images=[])] * 7 + [row()] * 3)
    assert read(store, path, max_bad_rows=0.7)[1].num_bad == 7
    with pytest.raises(DataError) as caught:
        read(store, path, max_bad_rows=0.69)
    message = str(caught.value)
    assert "7 of 10 rows are bad" in message and "allows 6" in message
    assert "row 4: " in message and "row 5: " not in message
    with pytest.raises(DataError, match="1 of 1 rows are bad"):
        read(store, write(tmp_path / "y.parquet", [row(images=[])]), max_bad_rows=1.0)


def test_unknown_env_stops_at_once(store, tmp_path):
    path = write(tmp_path / "x.parquet", [row(), row(env_name="visual_toolbox_v22")])
    with pytest.raises(DataError, match=r"x\.parquet: row 1: column env_name: .*did you mean 'visual_toolbox_v2'"):
        read(store, path)


def test_env_key(store, tmp_path):
    path = write(tmp_path / "x.parquet", [{**row(env_name="ABSENT"), "tool": ENV}])
    assert read(store, path, env_key="tool")[0][0].env_name == ENV
    with pytest.raises(DataError, match=r"missing column env_name; its columns are data_source, prompt, .*tool"):
        read(store, path)


def test_meta_key(store, tmp_path):
    path = write(tmp_path / "x.parquet", [{**row(), "told": {"question": "Why?", "n": 1}}])
    (task,), _ = read(store, path, meta_key="told")
    assert (task.extra_info, task.question) == ({"question": "Why?", "n": 1}, "Why?")
    with pytest.raises(DataError, match="missing column tolt"):
        read(store, path, meta_key="tolt")
    assert read(store, write(tmp_path / "y.parquet", [row(extra_info="ABSENT")]))[0][0].extra_info == {}
    assert read(store, path, meta_key="")[0][0].extra_info == {}


def test_skipped_rows_are_logged_by_name(store, tmp_path, caplog):
    path = write(tmp_path / "x.parquet", [row(images=[])] * 23 + [row()])
    read(store, path, max_bad_rows=1.0)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 21 and lines[-1] == "... and 3 more"
    assert lines[19].startswith(f"skipped {path}: row 19: ")


@pytest.mark.parametrize("num_workers", [1, 3])
def test_long_prompts(num_workers):
    tasks = [Task(str(i), "", (), (), "", "", "") for i in range(5)]
    kept, dropped = drop_long_prompts(tasks, lambda task: 10 + int(task.task_id), 12, num_workers)
    assert (kept, dropped) == (tasks[:3], ["3 (13 tokens)", "4 (14 tokens)"])
    assert drop_long_prompts([], len, 12) == ([], [])


def test_scripts(store, tmp_path):
    path = write(tmp_path / "x.parquet", [row(script=["<think>", "b"]), row(script=None)])
    assert [task.script for task in read(store, path)[0]] == [("<think>", "b"), ()]
    assert [task.script for task in read(store, path, require_script=True)[0]] == [("<think>", "b")]
    with pytest.raises(DataError, match="missing column script"):
        read(store, write(tmp_path / "y.parquet", [row()]), require_script=True)


def test_files_that_are_no_dataset(store, tmp_path):
    with pytest.raises(DataError, match=r"gone\.parquet: no such file"):
        read(store, tmp_path / "gone.parquet")
    (tmp_path / "text.parquet").write_text("PAR1 not really")
    with pytest.raises(DataError, match=r"text\.parquet: not readable as parquet"):
        read(store, tmp_path / "text.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: missing column images; its columns are data_source"):
        read(store, write(tmp_path / "x.parquet", [row(images="ABSENT")]))
    empty = pa.Table.from_pylist([row()]).slice(0, 0)
    pq.write_table(empty, tmp_path / "empty.parquet")
    with pytest.raises(DataError, match=r"no rows in .*empty\.parquet"):
        read(store, tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="no rows in no files"):
        read_tasks([], DataConfig(), store)


def test_damage_in_the_middle_of_a_file(store, tmp_path):
    path = write(tmp_path / "x.parquet", [row(images=[{"bytes": png(i), "path": None}]) for i in range(8)])
    data = bytearray(path.read_bytes())
    data[4:40] = b"\xff" * 36
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"x\.parquet"):
        read(store, path)


def test_rows_of_files_with_one_name_have_ids_of_their_own(store, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.parquet", [row()] * 20)
    tasks, _ = read_tasks([tmp_path / "a/train.parquet", tmp_path / "b/train.parquet"], DataConfig(), store)
    assert len({task.task_id for task in tasks}) == 40 and tasks[39].task_id == f"{tmp_path}/b/train:19"


@pytest.mark.parametrize(("options", "why"), [
    ({"max_bad_rows": 1.5}, "0 to 1"), ({"min_pixels": 0}, "min_pixels=0"), ({"prompt_key": ""}, "prompt_key"),
    ({"max_prompt_tokens": -1}, "-1"),
])  # fmt: skip
def test_config_refuses(options, why):
    with pytest.raises(ConfigError, match=why):
        DataConfig(**options)
