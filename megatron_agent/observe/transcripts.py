"""Episodes as JSON lines: what was asked, said, looked at and scored, for people and for offline tools."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_agent.observe.metrics import drop_cut_line, read_json_lines, rounded
from megatron_agent.types import ImageRef, RewardParts, ToolCall, Trajectory, Turn, Unscored


@dataclass
class TurnRecord:
    """One generation and its observation; `weight_version_*` say which weights began and ended it."""

    text: str
    observation_text: str
    num_tokens: int
    mean_logprob: float | None
    weight_version_first: int | None
    weight_version_last: int | None
    stop_reason: str
    tool_calls: list[ToolCall] = field(default_factory=list)
    tool_reward: float | None = 0.0
    observation_images: list[ImageRef] = field(default_factory=list)


@dataclass
class Transcript:
    """One episode. `reward_total` is None and `unscored` says why where the episode could not be judged."""

    step: int
    task_id: str
    sample_index: int
    env_name: str
    question: str
    ground_truth: str
    status: str
    reward_parts: dict[str, float | None]
    reward_weights: dict[str, float | None]
    reward_total: float | None
    unscored: str
    seconds: float | None
    images: list[ImageRef]
    turns: list[TurnRecord]


def write_transcript(path: Path, step: int, trajectories: Sequence[Trajectory], limit: int | None = None) -> None:
    """Append up to `limit` episodes of a step (None: all), evenly spaced so that they come from different tasks."""
    path = Path(path)
    count = len(trajectories) if limit is None else min(limit, len(trajectories))
    chosen = [trajectories[index * len(trajectories) // count] for index in range(count)]
    if not chosen:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    drop_cut_line(path)
    with path.open("a", encoding="utf-8") as file:
        for trajectory in chosen:
            file.write(json.dumps(dataclasses.asdict(to_transcript(step, trajectory)), ensure_ascii=False) + "\n")


def read_transcripts(path: Path) -> list[Transcript]:
    """The episodes of a file in the order they were written; a cut last line is left out."""
    return [_from_json(row) for row in read_json_lines(path)]


def rewind_transcripts(path: Path, step: int) -> None:
    """Forget the episodes from `step` on: a resumed run samples them again."""
    if not path.is_file():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) < step]
    aside = path.with_suffix(".jsonl.tmp")
    aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    aside.replace(path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return math.inf  # a line that a kill cut short


def to_transcript(step: int, trajectory: Trajectory) -> Transcript:
    reward = trajectory.reward
    scored = reward if isinstance(reward, RewardParts) else None
    return Transcript(
        step=step,
        task_id=trajectory.task.task_id,
        sample_index=trajectory.sample_index,
        env_name=trajectory.task.env_name,
        question=trajectory.task.question,
        ground_truth=trajectory.task.ground_truth,
        status=trajectory.status.value,
        reward_parts={name: rounded(value) for name, value in scored.parts.items()} if scored else {},
        reward_weights={name: rounded(value) for name, value in scored.weights.items()} if scored else {},
        reward_total=rounded(scored.total) if scored else None,
        unscored=reward.reason if isinstance(reward, Unscored) else "" if scored else "not scored",
        seconds=rounded(trajectory.seconds),
        images=list(trajectory.task.images),
        turns=[_to_record(turn) for turn in trajectory.turns],
    )


def _to_record(turn: Turn) -> TurnRecord:
    return TurnRecord(
        text=turn.text,
        observation_text=turn.observation_text,
        num_tokens=len(turn.token_ids),
        mean_logprob=rounded(math.fsum(turn.logprobs) / len(turn.logprobs)) if turn.logprobs else None,
        weight_version_first=turn.weight_versions[0] if turn.weight_versions else None,
        weight_version_last=turn.weight_versions[-1] if turn.weight_versions else None,
        stop_reason=turn.stop_reason,
        tool_calls=list(turn.tool_calls),
        tool_reward=rounded(turn.tool_reward),
        observation_images=list(turn.observation_images),
    )


def _from_json(row: dict) -> Transcript:
    turns = []
    for turn in row["turns"]:
        calls = turn["tool_calls"]
        turn["tool_calls"] = [ToolCall(**_with_boxes(call, "box_px", "shown_box_px")) for call in calls]
        turn["observation_images"] = _images(turn["observation_images"])
        turns.append(TurnRecord(**turn))
    return Transcript(**{**row, "turns": turns, "images": _images(row["images"])})


def _images(rows: list[dict]) -> list[ImageRef]:
    return [ImageRef(**_with_boxes(row, "crop_box_px")) for row in rows]


def _with_boxes(row: dict, *names: str) -> dict:
    """JSON has no tuples, and a Box is one."""
    return {key: tuple(value) if key in names and value is not None else value for key, value in row.items()}
