"""Reading files: the published schema, JSON lines, odd and broken pictures as rows, workers, memory, a second start.

Not covered: the published files themselves (4.85 GB); their schema, one row group a file, is written here.
"""

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from megatron_agent.data import images
from megatron_agent.data.dataset import DataConfig, in_order, read_tasks
from megatron_agent.data.images import ImageStore, PixelLimits
from megatron_agent.errors import DataError

ROOT = Path(__file__).parents[3]
ENV = "visual_toolbox_v2"
PUBLISHED = pa.schema({
    "data_source": pa.string(),
    "prompt": pa.list_(pa.struct({"content": pa.string(), "role": pa.string()})),
    "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
    "ability": pa.string(),
    "env_name": pa.string(),
    "reward_model": pa.struct({"ground_truth": pa.string(), "style": pa.string()}),
    "extra_info": pa.struct({
        "answer": pa.string(), "index": pa.int64(), "question": pa.string(), "split": pa.string(),
    }),
    "agent_name": pa.string(),
})  # fmt: skip


def encoded(picture, format="PNG", **options):
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def noise(seed=0, side=56):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))


def published_row(index=0, pictures=None, env_name=ENV, source="vstar"):
    data = encoded(noise(index)) if pictures is None else pictures
    shown = [{"bytes": data, "path": f"{index}.png"}] if isinstance(data, bytes) else data
    return {
        "data_source": source,
        "prompt": [
            {"content": "You are a helpful assistant.", "role": "system"},
            {"content": "<image>" * len(shown) + f"\nQuestion {index}?", "role": "user"},
        ],
        "images": shown,
        "ability": "vl_chart",
        "env_name": env_name,
        "reward_model": {"ground_truth": f"answer {index}", "style": "model"},
        "extra_info": {"answer": f"answer {index}", "index": index, "question": f"Question {index}?", "split": "train"},
        "agent_name": "visual_agent",
    }


def json_row(index=0, **changes):
    """As published, with the picture's bytes as base64."""
    row = published_row(index)
    row["images"] = [{"bytes": base64.b64encode(encoded(noise(index))).decode()}]
    return {**row, **changes}


def write_parquet(path, rows, **options):
    pq.write_table(pa.Table.from_pylist(rows, schema=PUBLISHED), path, row_group_size=1 << 20, **options)
    return path


def write_jsonl(path, rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path / "store", PixelLimits(3136, 12845056))


def read(store, *files, max_bad_rows=0.9, **options):
    return read_tasks(files, DataConfig(max_bad_rows=max_bad_rows, **options), store)


# ---------------------------------------------------------------- kinds of files
def test_the_published_schema(store, tmp_path):
    two = [{"bytes": encoded(noise(seed)), "path": None} for seed in (7, 8)]
    rows = [published_row(0), published_row(1, pictures=two), published_row(2, env_name="", source="thinklite_eureka")]
    tasks, report = read(store, write_parquet(tmp_path / "data_0.1.2_visual_toolbox_v2.parquet", rows))
    assert [task.task_id for task in tasks] == [f"data_0.1.2_visual_toolbox_v2:{i}" for i in range(3)]
    assert [len(task.images) for task in tasks] == [1, 2, 1] and [task.env_name for task in tasks] == [ENV, ENV, ""]
    assert store.bytes_of(tasks[1].images[1].source) == two[1]["bytes"]
    assert tasks[1].messages[1]["content"] == [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "\nQuestion 1?"}]
    assert tasks[0].extra_info == {"answer": "answer 0", "index": 0, "question": "Question 0?", "split": "train"}
    assert tasks[2].ground_truth == "answer 2" and tasks[2].question == "Question 2?"
    assert report.by_source == {"vstar": 2, "thinklite_eureka": 1} and report.by_env == {ENV: 2, "": 1}


def test_json_lines_give_the_same_tasks(store, tmp_path):
    from_parquet, _ = read(store, write_parquet(tmp_path / "x.parquet", [published_row(i) for i in range(3)]))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/1.png").write_bytes(encoded(noise(1)))
    url = "data:image/png;base64," + base64.b64encode(encoded(noise(2))).decode()
    rows = [json_row(0), json_row(1, images=["pictures/1.png"]), "", json_row(2, images=[url])]
    from_json, report = read(store, write_jsonl(tmp_path / "x.jsonl", rows))
    assert from_json == from_parquet and (report.num_rows, report.num_bad) == (3, 0)
    by_mapping = [json_row(1, images=[{"path": str(tmp_path / "pictures/1.png")}])]
    assert read(store, write_jsonl(tmp_path / "y.jsonl", by_mapping))[0][0].images == from_parquet[1].images


BAD_LINES = {
    '{"data_source": "x", ': "not valid JSON: ",
    "[1, 2]": "a list, not a JSON object",
    json.dumps({"data_source": "x", "images": []}): "missing key prompt, env_name, reward_model; its keys are data_source",
    json.dumps(json_row(images=["gone.png"])): "picture 0: cannot read 'gone.png'",
    json.dumps(json_row(images=[{"bytes": "AAA?"}])): "picture 0: its bytes are not base64",
    json.dumps(json_row(images=[{"bytes": "AAAA"}])): "picture 0: unreadable picture",
    json.dumps(json_row(images="a.png")): "must hold a list of pictures, not a str",
    json.dumps(json_row(images=[3])): "neither bytes nor a path",
    json.dumps(json_row(script={"a": 1})): "must be a list of texts",
    "[" * 100_000: "not valid JSON",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: BAD_LINES[line][:30])
def test_bad_lines_are_named(store, tmp_path, line):
    path = write_jsonl(tmp_path / "x.jsonl", [json_row(0), "", line, json_row(1)])
    tasks, report = read(store, path)
    assert [task.task_id for task in tasks] == ["x:0", "x:2"]
    assert report.bad_rows[0].startswith(f"{path}: line 3: ") and BAD_LINES[line] in report.bad_rows[0]


def test_files_that_cannot_be(store, tmp_path):
    with pytest.raises(DataError, match=r"x\.json: unknown kind of file; names must end in \.parquet or \.jsonl"):
        read(store, tmp_path / "x.json")
    (tmp_path / "binary.jsonl").write_bytes(bytes(range(256)))
    with pytest.raises(DataError, match="2 of 2 rows are bad"):
        read(store, tmp_path / "binary.jsonl")
    good = write_jsonl(tmp_path / "x.jsonl", [json_row(0, env_name="no_such_tool")])
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):  # before the first one is read
        read(store, good, tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match=r"x\.jsonl: line 1: column env_name: .*no_such_tool"):
        read(store, good)


# ---------------------------------------------------------------- pictures
def exif_turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(noise().resize((80, 40)), "JPEG", exif=exif)


def bomb():
    """A PNG of a few bytes whose header says 20,000 x 20,000 px."""
    import zlib

    header = encoded(Image.new("1", (1, 1)))
    body = (20000).to_bytes(4, "big") * 2 + header[24:29]
    return header[:16] + body + zlib.crc32(b"IHDR" + body).to_bytes(4, "big") + header[33:]


ODD = {  # shown width and height, or why there is none
    "gif": (encoded(noise(), "GIF"), (56, 56)),
    "cmyk": (encoded(noise().convert("CMYK"), "JPEG"), (56, 56)),
    "16 bit": (encoded(Image.fromarray(np.full((56, 84), 0x80FF, np.uint16))), (84, 56)),
    "alpha": (encoded(Image.new("RGBA", (84, 56), (0, 0, 0, 0))), (84, 56)),
    "exif": (exif_turned(), (56, 84)),
    "1x1": (encoded(Image.new("RGB", (1, 1))), (56, 56)),
    "bomb": (bomb(), "picture over 89478485 px"),
    "truncated png": (encoded(noise(0, 200))[:-3000], "unreadable picture"),
    "truncated jpeg": (encoded(noise(0, 200), "JPEG")[:-800], "unreadable picture"),
    "half a progressive jpeg": (encoded(noise(0, 200), "JPEG", progressive=True)[:9000], "unreadable picture"),
}


def test_odd_and_broken_pictures(store, tmp_path):
    rows = [published_row(index, pictures=data) for index, (data, _) in enumerate(ODD.values())]
    tasks, report = read(store, write_parquet(tmp_path / "x.parquet", rows))
    shown = {task.task_id: (task.images[0].width_px, task.images[0].height_px) for task in tasks}
    for index, (kind, (_, expected)) in enumerate(ODD.items()):
        if isinstance(expected, str):
            assert any(f"row {index}: picture 0: " in why and expected in why for why in report.bad_rows), kind
        else:
            assert shown[f"x:{index}"] == expected, kind
    for task in tasks:
        assert store.pixels(task.images[0]).shape[:2] == shown[task.task_id][::-1]
    assert (len(tasks), report.num_bad, report.num_upscaled) == (6, 4, 1)


def test_a_checked_jpeg_is_as_large_as_a_decoded_one():
    from megatron_agent.data.decode import check_picture, decode_picture, picture_size_px

    for data in (exif_turned(), encoded(noise(0, 57), "JPEG"), encoded(noise(0, 90), "JPEG", progressive=True)):
        assert check_picture(data) == picture_size_px(data) == decode_picture(data).size


# ---------------------------------------------------------------- workers, memory, a second start
def test_the_number_of_workers_changes_nothing(store, tmp_path):
    rows = [published_row(i, pictures=b"broken" if i % 7 == 3 else None) for i in range(60)]
    path = write_parquet(tmp_path / "x.parquet", rows)
    alone = read(store, path, num_workers=1)
    fresh = ImageStore(tmp_path / "other", store.limits)
    assert read(fresh, path, num_workers=5) == alone and len(alone[0]) == 51


def test_few_items_are_under_way_at_a_time():
    asked = []
    results = in_order(lambda item: item, (asked.append(i) or i for i in range(1000)), num_workers=2)
    assert next(results) == 0 and len(asked) < 20
    results.close()
    assert list(in_order(str, [3, 1, 2], 2)) == ["3", "1", "2"]


MEASURE = """
import re, sys
from pathlib import Path
import pyarrow.parquet
from megatron_agent.data.rows import read_rows
peak_kib = lambda: int(re.search("VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before_kib, num_bytes = peak_kib(), 0
for row in read_rows(Path(sys.argv[1]), ["images", "prompt"], []):
    num_bytes += len(row.values["images"][0]["bytes"])
print(num_bytes, (peak_kib() - before_kib) * 1024)
"""


def test_a_row_group_is_not_held_in_memory(tmp_path):
    data = np.random.default_rng(0).bytes(96 << 20)
    each = 1 << 17
    rows = [published_row(i, pictures=data[i * each : (i + 1) * each]) for i in range(len(data) // each)]
    path = write_parquet(tmp_path / "x.parquet", rows, write_batch_size=8)  # pages of 1 MiB
    assert pq.ParquetFile(path).metadata.num_row_groups == 1
    done = subprocess.run([sys.executable, "-c", MEASURE, path], cwd=ROOT, capture_output=True, text=True, timeout=60)
    num_bytes, grown_bytes = map(int, done.stdout.split())
    assert num_bytes == len(data) and grown_bytes < 64 << 20  # 32 MB; a row group in memory takes 132


def test_a_second_start_decodes_nothing(store, tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "x.parquet", [published_row(i) for i in range(5)])
    first = read(store, path)
    decoded = []
    monkeypatch.setattr(images, "check_picture", lambda data: decoded.append(data))
    monkeypatch.setattr(images, "picture_size_px", lambda data: decoded.append(data) or (56, 56))
    again = ImageStore(store.root, store.limits)
    assert read(again, path) == first and decoded == []
    (store.root / images.SIZES_FILE).write_text('["damaged"]')
    assert read(ImageStore(store.root, store.limits), path) == first and len(decoded) == 5
    monkeypatch.undo()
    store._path(first[0][0].images[0].source).unlink()
    assert read(ImageStore(store.root, store.limits), path) == first  # what is missing is put again
    assert store.bytes_of(first[0][0].images[0].source) == encoded(noise(0))
