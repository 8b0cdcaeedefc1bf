"""tools/check_data.py: what it counts and names, its exit codes, its picture and its JSON."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_reading import encoded, json_row, noise, published_row, write_jsonl, write_parquet

TOOLS = Path(__file__).parents[3] / "tools"


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(TOOLS))
    try:
        import check_data
    finally:
        sys.path.remove(str(TOOLS))
    return check_data


@pytest.fixture(scope="module")
def tiny_model(tiny_models):
    return str(tiny_models["tied"])


@pytest.fixture
def files(tmp_path):
    rows = [published_row(i, encoded(noise(i, 40 + 30 * i))) for i in range(6)]
    rows.append(published_row(6, encoded(Image.new("RGB", (1, 1))), source="tiny"))
    rows.append(published_row(7, b"broken"))
    lines = [json_row(0, env_name=""), json_row(1, data_source="[maths]")]
    return [str(write_parquet(tmp_path / "a.parquet", rows)), str(write_jsonl(tmp_path / "b.jsonl", lines))]


def test_everything_is_counted_and_named(tool, files, tmp_path, capsys, tiny_model):
    outputs = ["--json", str(tmp_path / "out.json"), "--histogram", str(tmp_path / "out.png")]
    options = ["--model", tiny_model, "--set", "max_bad_rows=0.2", "max_prompt_tokens=45", "max_pixels=12544"]
    assert tool.main([*files, *options, *outputs]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    of_file = found["files"][files[0]]
    assert (of_file["num_rows"], of_file["num_bad"], of_file["num_upscaled"]) == (8, 1, 1)
    assert of_file["bad_rows"][0].startswith(f"{files[0]}: row 7: picture 0: unreadable")
    assert found["files"][files[1]]["by_source"] == {"vstar": 1, "[maths]": 1}
    assert found["spreads"]["picture's long side, px"] == {"min": 1, "median": 70, "p99": 187, "max": 190}
    assert found["spreads"]["tokens a picture"]["max"] == 16  # 112 x 112 px
    assert 0 < len(found["long_prompts"]) < 9 and found["spreads"]["tokens a prompt"]["max"] > 45
    printed = capsys.readouterr().out
    assert "visual_toolbox_v2" in printed and "[maths]" in printed and "1 bad rows" in printed and printed.endswith("fit\n")
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width > picture.height > 300


def test_exit_codes(tool, files, tmp_path, capsys, tiny_model):
    assert tool.main(files) == 1  # one bad row of eight, 0.01 are allowed
    assert "1 of 8 rows are bad" in capsys.readouterr().out.replace("\n", " ")
    assert tool.main([files[1]]) == 0
    assert tool.main([files[1], "--model", tiny_model, "--set", "max_prompt_tokens=5"]) == 1
    assert "no prompt has at most" in capsys.readouterr().out
    for wrong in ([str(tmp_path / "gone.parquet")], [files[1], "--set", "max_bad_row=1"], [files[1], "--env-key", "tool"]):
        assert tool.main(wrong) == (1 if "tool" in wrong else 2)
    assert "no such file" in capsys.readouterr().err


def test_pictures_are_kept_only_where_asked(tool, files, tmp_path):
    before = set(tmp_path.rglob("*"))
    assert tool.main([files[1]]) == 0 and set(tmp_path.rglob("*")) == before
    assert tool.main([files[1], "--store", str(tmp_path / "store")]) == 0
    assert sum(len(path.name) == 64 for path in (tmp_path / "store").rglob("*")) == 2
    assert len(json.loads((tmp_path / "store/sizes.json").read_text())) == 2
