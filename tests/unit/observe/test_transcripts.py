"""Transcripts there and back on a real file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_agent.observe.transcripts import read_transcripts, rewind_transcripts, to_transcript, write_transcript
from megatron_agent.types import Trajectory


def test_transcript_round_trip(tmp_path: Path, make_episode: Callable[..., Trajectory]) -> None:
    path = tmp_path / "deep" / "transcripts.jsonl"
    episodes = [make_episode("t0"), make_episode("t1", unscored=True)]
    write_transcript(path, 3, episodes)
    with path.open("a") as file:
        file.write('{"step": 3, "cut')
    write_transcript(path, 4, [make_episode("t2")])
    back = read_transcripts(path)
    assert [(record.step, record.task_id) for record in back] == [(3, "t0"), (3, "t1"), (4, "t2")]
    assert back[0] == to_transcript(3, episodes[0])

    record, look, answer = back[0], *back[0].turns
    assert record.reward_parts == {"accuracy": 1.0, "format": -0.5} and record.reward_total == 0.7 and record.unscored == ""
    assert back[1].reward_total is None and back[1].unscored == "judge is down"
    assert (look.num_tokens, look.mean_logprob, look.weight_version_first, look.weight_version_last) == (3, -0.5, 4, 5)
    assert look.tool_calls == episodes[0].turns[0].tool_calls
    assert look.observation_images == episodes[0].turns[0].observation_images
    assert answer.mean_logprob is None  # NaN has no place in JSON
    assert record.images == list(episodes[0].task.images)


def test_limit_takes_evenly_spaced_episodes(tmp_path: Path, make_episode: Callable[..., Trajectory]) -> None:
    path = tmp_path / "transcripts.jsonl"
    episodes = [make_episode(f"t{index}") for index in range(8)]
    write_transcript(path, 1, episodes, limit=0)
    assert not path.exists()
    write_transcript(path, 1, episodes, limit=4)
    write_transcript(path, 2, episodes[:2], limit=4)
    assert [record.task_id for record in read_transcripts(path)] == ["t0", "t2", "t4", "t6", "t0", "t1"]


def test_rewind_forgets_later_steps_and_a_cut_line(tmp_path):
    path = tmp_path / "transcripts.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "te')
    rewind_transcripts(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
