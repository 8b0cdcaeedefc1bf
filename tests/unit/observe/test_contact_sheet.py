"""The contact sheet: pictures, boxes and escaping, by parsing the page. Its looks are for people."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from megatron_agent.data.images import ImageStore
from megatron_agent.observe.viewer.contact_sheet import iou, segments, shown_region, target_region, write_contact_sheet
from megatron_agent.types import ImageRef, ToolCall, Trajectory

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Collects tags with their attributes and checks that every tag that opens is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str, with_class: str = "") -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag and with_class in (attrs.get("class") or "").split() + [""]]


def test_sheet_embeds_every_picture_and_escapes_the_model(
    tmp_path: Path, store: ImageStore, make_episode: Callable[..., Trajectory]
) -> None:
    out_html = tmp_path / "sheets" / "episodes.html"
    sections = [("before", [make_episode("t0", unscored=True)]), ("after <b>", [make_episode("t1"), make_episode("t2")])]
    write_contact_sheet(out_html, sections, store, "Episodes & more", {"model": "tiny <1B>"})
    html = out_html.read_text(encoding="utf-8")
    page = Page(html)

    images = page.named("img")
    assert len(images) == 3 * 2  # a picture and a crop in each episode
    for attrs in images:
        source = attrs["src"] or ""
        assert source.startswith("data:image/png;base64,")
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
            assert picture.size in {(84, 56), (56, 56)}
    assert "<script" not in html and '<script>alert("x")</script>' in page.text
    assert "http" not in html  # self-contained
    assert "after <b>" in page.text and "tiny <1B>" in page.text and "Here is the crop & more." in page.text
    assert "unscored: judge is down" in page.text
    assert len(page.named("article")) == 3 and len(page.named("section")) == 2
    for kind, count in (("think", 3), ("tool_call", 3), ("answer", 3)):
        assert len(page.named("div", kind)) == count


def test_boxes_lie_where_the_tool_looked(tmp_path: Path, store: ImageStore, make_episode: Callable[..., Trajectory]) -> None:
    write_contact_sheet(tmp_path / "a.html", [("after", [make_episode()])], store, "t")
    page = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    (call,) = page.named("span", "box")[1:2]
    assert call["class"] == "box call call-0"
    assert call["style"] == "left: 41.67%; top: 37.50%; width: 33.33%; height: 50.00%"
    targets = page.named("span", "target")
    assert targets[0]["style"] == "left: 50.00%; top: 50.00%; width: 16.67%; height: 25.00%"
    assert targets[1]["style"] == "left: 25.00%; top: 25.00%; width: 50.00%; height: 50.00%"  # seen again in the crop
    assert "IoU 0.25" in page.text


def test_several_calls_of_a_turn_are_numbered_through(
    tmp_path: Path, store: ImageStore, make_episode: Callable[..., Trajectory]
) -> None:
    episode = make_episode()
    failed = ToolCall("turn", False, "no <angle>")
    episode.turns[0].tool_calls.append(failed)
    episode.turns[1].tool_calls.append(replace(failed, name="third"))
    write_contact_sheet(tmp_path / "a.html", [("after", [episode])], store, "t")
    page = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert [attrs["class"] for attrs in page.named("span", "tag")] == ["tag call-0", "tag call-1", "tag call-2"]
    assert page.text.count("no <angle>") == 2 and "tool called in 1" in page.text


def test_episode_without_turns_reward_or_pictures(
    tmp_path: Path, store: ImageStore, make_episode: Callable[..., Trajectory]
) -> None:
    episode = make_episode()
    bare = Trajectory(episode.task, 0, [])
    write_contact_sheet(tmp_path / "a.html", [("empty", []), ("bare", [bare])], store, "t")
    text = Page((tmp_path / "a.html").read_text(encoding="utf-8")).text
    assert "0 episodes" in text and "unscored: not scored" in text and "aborted" in text


def test_regions() -> None:
    whole, rotated = ImageRef("s", 84, 56), ImageRef("s", 56, 84, rotation_deg=90)
    crop = ImageRef("s", 50, 50, crop_box_px=(100, 100, 200, 200))
    assert shown_region((120, 80, 160, 120), whole, (240, 160)) == pytest.approx((42, 28, 56, 42))
    assert shown_region((150, 50, 300, 120), crop, (400, 400)) == pytest.approx((25, 0, 50, 10))
    assert shown_region((0, 0, 50, 50), crop, (400, 400)) is None
    assert shown_region((120, 80, 160, 120), rotated, (240, 160)) is None
    assert target_region({"target_bbox": (1, 2, 3, 4)}) == (1.0, 2.0, 3.0, 4.0)
    assert (
        target_region({}) is None
        and target_region({"target_bbox": "none"}) is None
        and target_region({"target_bbox": []}) is None
    )
    assert iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert iou((0, 0, 1, 1), (1, 1, 2, 2)) == 0.0


def test_segments_keep_every_word_and_bear_open_tags() -> None:
    assert segments("a<think>b</think>\n<answer>c") == [("plain", "a"), ("think", "<think>b</think>"), ("answer", "<answer>c")]
    assert segments("") == []
