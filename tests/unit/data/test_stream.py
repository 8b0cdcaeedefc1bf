"""The order of training tasks: permutations by seed, weights, steps, curricula; resumed exactly from every point."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_agent.config import parse
from megatron_agent.data.dataset import DataConfig, training_stream
from megatron_agent.data.stream import MixPart, TaskMix, TaskStream, fingerprint
from megatron_agent.errors import ConfigError, DataError
from megatron_agent.types import ImageRef, Task

TASKS = [Task(str(i), "", (), (), "", "", "") for i in range(5)]


def ids(tasks):
    return [task.task_id for task in tasks]


def tasks_of(name, count):
    return [Task(f"{name}:{i}", "", (), (), "", "", "") for i in range(count)]


def shares(tasks):
    return Counter(task.task_id.partition(":")[0] for task in tasks)


def mix(*parts, sizes=None, prompts_per_step=4, **options):
    """Parts `a`, `b`, ... of 7, 8, ... tasks, or of the sizes that are given."""
    names = "abcdef"[: len(parts)]
    parts = [MixPart([name], **part) for name, part in zip(names, parts)]
    of_parts = [tasks_of(name, size) for name, size in zip(names, sizes or range(7, 20))]
    return TaskMix(parts, of_parts, 3, prompts_per_step, **options)


# ---------------------------------------------------------------- one part
def test_stream_order():
    stream = TaskStream(TASKS, seed=7)
    first, second = ids(stream.next(5)), ids(stream.next(5))
    assert first == ["1", "4", "3", "0", "2"] and second == ["2", "3", "4", "1", "0"] and stream.epoch == 1
    assert ids(TaskStream(TASKS, seed=7).next(13))[:10] == first + second
    assert ids(TaskStream(TASKS, seed=8).next(5)) != first
    assert ids(TaskStream(TASKS, seed=1, shuffle=False).next(7)) == ["0", "1", "2", "3", "4", "0", "1"]


@pytest.mark.parametrize("taken", [0, 3, 5, 7, 10, 23])
def test_stream_resumes_exactly(taken):
    whole = TaskStream(TASKS, seed=3)
    whole.next(taken)
    resumed = TaskStream(TASKS, seed=3)
    resumed.load_state(whole.state())
    assert ids(resumed.next(17)) == ids(whole.next(17))


def test_stream_refuses_other_data():
    state = TaskStream(TASKS, seed=3).state()
    for other in (TaskStream(TASKS[:4], 3), TaskStream(TASKS, 4), TaskStream(TASKS, 3, shuffle=False)):
        with pytest.raises(DataError, match="cannot be resumed"):
            other.load_state(state)
    with pytest.raises(DataError, match="at least one task"):
        TaskStream([], 0)


def test_the_fingerprint_is_of_the_content():
    changes = ({"ground_truth": "b"}, {"question": "why"}, {"images": (ImageRef("a", 28, 28),)}, {"env_name": "x"})
    found = {fingerprint([replace(TASKS[0], **change), *TASKS[1:]]) for change in ({}, *changes)}
    assert len(found) == 5
    shown_larger = [replace(TASKS[0], images=(ImageRef("a", 56, 56),)), *TASKS[1:]]
    assert fingerprint(shown_larger) in found  # only data.max_pixels has changed


# ---------------------------------------------------------------- weights and steps
@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (2.0, 1.0, 0.5), (0.1, 0.7, 0.2)])
def test_every_step_has_the_shares(weights):
    stream = mix(*({"weight": weight} for weight in weights))
    drawn = Counter()
    for count in range(1, 400):
        drawn += shares(stream.next(1))
        for name, weight in zip("abc", weights):
            assert abs(drawn[name] - count * weight / sum(weights)) < len(weights)


def test_every_part_has_epochs_of_its_own():
    stream = mix({"weight": 2}, {}, sizes=(6, 4))
    drawn = ids(stream.next(36))
    of_a, of_b = ([name for name in drawn if name.startswith(part)] for part in "ab")
    assert all(sorted(of_a[start : start + 6]) == sorted(ids(tasks_of("a", 6))) for start in (0, 6, 12, 18))
    assert all(sorted(of_b[start : start + 4]) == sorted(ids(tasks_of("b", 4))) for start in (0, 4, 8))
    assert of_a[:6] != of_a[6:12] and stream.epoch == 3
    plain = ids(mix({"weight": 2}, {}, sizes=(6, 4), shuffle=False).next(6))
    assert plain == ["a:0", "b:0", "a:1", "a:2", "b:1", "a:3"]


def test_parts_come_and_go_by_step():
    stream = mix({"until_step": 2}, {"from_step": 2}, {"from_step": 4, "weight": 3}, prompts_per_step=8)
    by_step = [dict(shares(stream.next(8))) for _ in range(5)]
    assert by_step == [{"a": 8}, {"a": 4, "b": 4}, {"b": 8}, {"b": 2, "c": 6}, {"b": 2, "c": 6}]


def test_how_many_are_asked_for_at_a_time_does_not_matter():
    options = ({"weight": 2, "until_step": 3}, {"from_step": 2}, {"num_epochs": 1})
    at_once, one_by_one = mix(*options), mix(*options)
    assert ids(at_once.next(50)) == [task.task_id for _ in range(50) for task in one_by_one.next(1)]


def test_a_part_with_epochs_ends():
    stream = mix({"num_epochs": 2}, {}, sizes=(3, 5))
    drawn = ids(stream.next(30))
    assert shares(stream.next(10)) == {"b": 10}
    assert Counter(name for name in drawn if name.startswith("a")) == {name: 2 for name in ids(tasks_of("a", 3))}


def test_a_curriculum_goes_part_by_part():
    stream = mix({}, {"num_epochs": 2}, {}, sizes=(3, 2, 4), curriculum=True)
    assert "".join(name[0] for name in ids(stream.next(15))) == "aaabbbbcccccccc"
    assert shares(stream.next(9)) == {"c": 9}


@pytest.mark.parametrize("options", [{}, {"curriculum": True}])
def test_a_mix_resumes_exactly_from_every_point(options):
    parts = ({}, {"num_epochs": 2}, {}) if options else ({"until_step": 3}, {"from_step": 2, "weight": 0.3}, {"num_epochs": 1})
    whole = mix(*parts, **options)
    expected = ids(whole.next(60))
    for taken in range(40):
        before = mix(*parts, **options)
        before.next(taken)
        state = json.loads(json.dumps(before.state()))
        resumed = mix(*parts, **options)
        resumed.load_state(state)
        assert ids(resumed.next(20)) == expected[taken : taken + 20], taken


def test_a_mix_refuses_another_plan():
    state = mix({}, {"weight": 2}).state()
    mix({}, {"weight": 2}).load_state(state)
    others = (mix({}, {"weight": 3}), mix({}, {"weight": 2, "from_step": 2}), mix({}, {"weight": 2}, {}),
              mix({}, {"weight": 2}, prompts_per_step=5), mix({}, {"weight": 2}, sizes=(7, 9)))  # fmt: skip
    for other in others:
        with pytest.raises(DataError, match="cannot be resumed"):
            other.load_state(state)
    with pytest.raises(DataError, match="cannot be resumed"):
        mix({}, {"weight": 2}).load_state(TaskStream(TASKS, 3).state())
    with pytest.raises(DataError, match="no usable row in b"):
        mix({}, {}, sizes=(3, 0))


# ---------------------------------------------------------------- from a configuration
def test_tasks_are_dealt_to_parts_by_file():
    config = DataConfig(mix=[MixPart(["x/a.parquet", "y/b.jsonl"], weight=3), MixPart(["y/a.parquet"])])
    assert config.all_train_files() == ["x/a.parquet", "y/b.jsonl", "y/a.parquet"]
    tasks = [*tasks_of("x/a", 3), *tasks_of("b", 3), *tasks_of("y/a", 5)]
    stream = training_stream(tasks, config, 0, 4)
    assert shares(stream.next(24)) == {"x/a": 9, "b": 9, "y/a": 6}


def test_plain_files_are_one_stream_and_a_curriculum_is_by_file():
    tasks = [*tasks_of("a", 3), *tasks_of("b", 4)]
    plain = training_stream(tasks, DataConfig(train_files=["a.parquet", "b.parquet"]), 5, 4)
    assert isinstance(plain, TaskStream) and ids(plain.next(20)) == ids(TaskStream(tasks, 5).next(20))
    by_file = training_stream(tasks, DataConfig(train_files=["a.parquet", "b.parquet"], curriculum=True), 5, 4)
    assert "".join(name[0] for name in ids(by_file.next(11))) == "aaabbbbbbbb"
    assert isinstance(training_stream(tasks, DataConfig(mix=[MixPart(["a.parquet"], weight=2)]), 5, 4), TaskStream)


def test_a_mix_is_written_in_yaml():
    parts = [{"files": ["a.parquet"], "weight": 2.0}, {"files": ["b.jsonl"], "from_step": 40}]
    config = parse({"data": {"mix": parts}}).data
    assert config.parts() == [MixPart(["a.parquet"], 2.0), MixPart(["b.jsonl"], from_step=40)]
    with pytest.raises(ConfigError, match=r"unknown key 'data.mix\[0\].wait'; did you mean 'weight'"):
        parse({"data": {"mix": [{"files": ["a"], "wait": 2}]}})


PART = {"files": ["a.parquet"]}


@pytest.mark.parametrize(("data", "why"), [
    ({"mix": [{"weight": 1.0}]}, "no files"),
    ({"mix": [{**PART, "weight": 0.0}]}, "weight of a.parquet is 0.0"),
    ({"mix": [{**PART, "weight": -1}]}, "must be above 0"),
    ({"mix": [{**PART, "from_step": 0}]}, "steps count from 1"),
    ({"mix": [{**PART, "from_step": 5, "until_step": 4}]}, "not before from_step"),
    ({"mix": [{"files": ["a", "a"]}]}, "names a file twice"),
    ({"mix": [{**PART, "until_step": 9}]}, "takes part in step 10"),
    ({"mix": [{**PART, "from_step": 2}]}, "takes part in step 1"),
    ({"mix": [{**PART, "num_epochs": 1}]}, "takes part in step 1"),
    ({"mix": [{**PART, "until_step": 9}, {"files": ["b"], "from_step": 11}]}, "takes part in step 10"),
    ({"mix": [PART], "train_files": ["b.parquet"]}, "both given"),
    ({"mix": [{**PART, "weight": 2}, PART], "curriculum": True}, "a.parquet has a weight or steps"),
    ({"mix": [PART, {"files": ["b"], "num_epochs": 1}], "curriculum": True}, "without end"),
    ({"train_files": ["a", "b", "a"]}, "names a twice"),
])  # fmt: skip
def test_mixes_that_are_refused(data, why):
    with pytest.raises(ConfigError, match=why):
        parse({"data": data})


def test_labels_tell_files_apart():
    from megatron_agent.data.dataset import file_labels

    files = ["train.parquet", "x/train.parquet", "x/train.jsonl", "other.parquet"]
    assert file_labels([Path(file) for file in files]) == ["train.parquet", "x/train.parquet", "x/train.jsonl", "other"]
    assert file_labels([Path("a/t.parquet"), Path("b/t.parquet")]) == ["a/t", "b/t"]
