"""Episodes side by side as one self-contained HTML page: pictures, boxes, crops, words and rewards."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_agent.types import Box, ImageRef, RewardParts, ToolCall, Trajectory, Unscored

if TYPE_CHECKING:
    from megatron_agent.data.images import ImageStore

PICTURE_WIDTH_CSS_PX, CROP_WIDTH_CSS_PX = 340, 170
TAGGED = re.compile(r"<(think|tool_call|answer|tool_response)>.*?(?:</\1>|\Z)", re.DOTALL)
ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)

Region = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class BoxView:
    """A rectangle over a picture, in per cent of its size; `label` is the number of the tool call, or empty."""

    label: str
    kind: str  # "target" or "call call-<color>"
    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class PictureView:
    data_uri: str
    caption: str
    width_css_px: int
    pixelated: bool
    boxes: list[BoxView]


@dataclass(frozen=True)
class CallView:
    """A tool call; `number` counts through the episode, `iou` is that with the true region."""

    call: ToolCall
    number: int
    iou: float | None


@dataclass(frozen=True)
class TurnView:
    segments: list[tuple[str, str]]  # (kind, text)
    num_tokens: int
    stop_reason: str
    calls: list[CallView]
    observation_text: str
    crops: list[PictureView]


@dataclass(frozen=True)
class EpisodeView:
    question: str
    expected: str
    answer: str
    task_id: str
    status: str
    pictures: list[PictureView]
    turns: list[TurnView]
    parts: list[tuple[str, float, float]]  # name, value, weight
    total: float | None
    unscored: str
    iou: float | None
    has_target: bool


@dataclass(frozen=True)
class SectionView:
    title: str
    summary: str
    episodes: list[EpisodeView]


def write_contact_sheet(
    out_html: Path,
    episodes: Sequence[tuple[str, Sequence[Trajectory]]],
    store: ImageStore,
    title: str,
    header: Mapping[str, str] | None = None,
) -> None:
    """Write sections of episodes (say "before" and "after" training), with pictures, style and all in one file.

    `header` is shown as name and value pairs. The dashed box is `extra_info["target_bbox"]` of the task, in the
    original's pixels. Raises what `store` raises for a picture that it lacks.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    sections = [_section(section, trajectories, store) for section, trajectories in episodes]
    page = environment.get_template("contact_sheet.html.j2").render(title=title, header=dict(header or {}), sections=sections)
    out_html = Path(out_html)
    out_html.parent.mkdir(parents=True, exist_ok=True)
    out_html.write_text(page, encoding="utf-8")


def _section(title: str, trajectories: Sequence[Trajectory], store: ImageStore) -> SectionView:
    views = [_episode(trajectory, store) for trajectory in trajectories]
    totals = [view.total for view in views if view.total is not None]
    ious = [view.iou or 0.0 for view in views if view.has_target]
    used = sum(any(turn.calls for turn in view.turns) for view in views)
    facts = [f"{len(views)} episodes", f"tool called in {used}"]
    facts += [f"mean reward {sum(totals) / len(totals):.2f}"] if totals else []
    facts += [f"mean IoU {sum(ious) / len(ious):.2f}"] if ious else []
    return SectionView(title, " · ".join(facts), views)


def _episode(trajectory: Trajectory, store: ImageStore) -> EpisodeView:
    task, reward = trajectory.task, trajectory.reward
    target = target_region(task.extra_info)
    target_source = task.images[0].source if task.images else ""
    views = []
    for index, ref in enumerate(trajectory.images):
        boxes = _call_boxes(trajectory.tool_calls, index, ref)
        if target and ref.source == target_source:
            boxes = [*_target_box(target, ref, store.original(ref.source).size), *boxes]
        views.append(_picture(ref, store, boxes, is_crop=index >= len(task.images)))
    turns = _turns(trajectory, views[len(task.images) :], target)
    scored = reward if isinstance(reward, RewardParts) else None
    answers = ANSWER.findall(trajectory.text)
    return EpisodeView(
        question=task.question,
        expected=task.ground_truth,
        answer=answers[-1].strip() if answers else "",
        task_id=task.task_id,
        status=trajectory.status.value,
        pictures=views[: len(task.images)],
        turns=turns,
        parts=[(name, value, scored.weights[name]) for name, value in scored.parts.items()] if scored else [],
        total=scored.total if scored else None,
        unscored=reward.reason if isinstance(reward, Unscored) else "" if scored else "not scored",
        iou=max((call.iou for turn in turns for call in turn.calls if call.iou is not None), default=None),
        has_target=target is not None,
    )


def _turns(trajectory: Trajectory, crops: Sequence[PictureView], target: Region | None) -> list[TurnView]:
    turns: list[TurnView] = []
    next_crop, num_calls = 0, 0
    for turn in trajectory.turns:
        first_crop, first_number = next_crop, num_calls + 1
        next_crop += len(turn.observation_images)
        num_calls += len(turn.tool_calls)
        view = TurnView(
            segments=segments(turn.text),
            num_tokens=len(turn.token_ids),
            stop_reason=turn.stop_reason,
            calls=[_call_view(call, number, target) for number, call in enumerate(turn.tool_calls, first_number)],
            observation_text=turn.observation_text,
            crops=list(crops[first_crop:next_crop]),
        )
        turns.append(view)
    return turns


def _call_view(call: ToolCall, number: int, target: Region | None) -> CallView:
    return CallView(call, number, iou(call.box_px, target) if call.box_px and target else None)


def _picture(ref: ImageRef, store: ImageStore, boxes: list[BoxView], is_crop: bool) -> PictureView:
    png = io.BytesIO()
    store.picture(ref).convert("RGB").save(png, "PNG")
    width_css_px = CROP_WIDTH_CSS_PX if is_crop else PICTURE_WIDTH_CSS_PX
    caption = f"{ref.width_px}×{ref.height_px} px"
    if ref.crop_box_px:
        caption += f" of {ref.crop_box_px}"
    if ref.rotation_deg:
        caption += f", rotated {ref.rotation_deg}°"
    data_uri = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    return PictureView(data_uri, caption, width_css_px, ref.width_px < width_css_px, boxes)


def _call_boxes(calls: Sequence[ToolCall], image_index: int, ref: ImageRef) -> list[BoxView]:
    return [
        _box_view(str(number), f"call call-{(number - 1) % 4}", call.shown_box_px, ref)
        for number, call in enumerate(calls, start=1)
        if call.shown_box_px and call.image_index == image_index
    ]


def _target_box(target: Region, ref: ImageRef, original_size_px: tuple[int, int]) -> list[BoxView]:
    region = shown_region(target, ref, original_size_px)
    return [_box_view("", "target", region, ref)] if region else []


def _box_view(label: str, kind: str, box: Region | Box, ref: ImageRef) -> BoxView:
    left, top, right, bottom = box
    across, down = 100 / ref.width_px, 100 / ref.height_px
    return BoxView(label, kind, left * across, top * down, (right - left) * across, (bottom - top) * down)


def target_region(extra_info: Mapping[str, object]) -> Region | None:
    """The true region of a task in the original's pixels, or None where there is none or it is not four numbers."""
    value = extra_info.get("target_bbox")
    numbers = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else []
    if len(numbers) != 4:
        return None
    left, top, right, bottom = (float(number) for number in numbers)
    return left, top, right, bottom


def shown_region(region: Region, ref: ImageRef, original_size_px: tuple[int, int]) -> Region | None:
    """Where a region of the original lies in the picture of `ref`, clipped to it; None where it lies outside.

    A rotated picture gives None: there the region is not drawn.
    """
    if ref.rotation_deg % 360:
        return None
    crop = ref.crop_box_px or (0, 0, *original_size_px)
    across, down = ref.width_px / (crop[2] - crop[0]), ref.height_px / (crop[3] - crop[1])
    left, right = ((min(max(x, crop[0]), crop[2]) - crop[0]) * across for x in (region[0], region[2]))
    top, bottom = ((min(max(y, crop[1]), crop[3]) - crop[1]) * down for y in (region[1], region[3]))
    return (left, top, right, bottom) if right > left and bottom > top else None


def iou(a: Region | Box, b: Region | Box) -> float:
    """Intersection over union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def segments(text: str) -> list[tuple[str, str]]:
    """Cut a text at its known tags: ("think" | "tool_call" | "answer" | "tool_response" | "plain", text with tags)."""
    found, position = [], 0
    for match in TAGGED.finditer(text):
        found += [("plain", text[position : match.start()]), (match[1], match[0])]
        position = match.end()
    return [(kind, piece) for kind, piece in [*found, ("plain", text[position:])] if piece.strip()]
