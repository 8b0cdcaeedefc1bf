"""Every alarm on rows of metrics drawn by hand: when it begins, when it is silent, what survives a restart."""

import json
import math

import pytest

from megatron_agent.errors import ConfigError
from megatron_agent.observe.alarms import DEFAULT_ACTIONS, Alarms, AlarmsConfig

HEALTHY = {
    "loss": 0.1, "grad_norm": 0.5, "reward": 1.0, "accuracy": 0.5, "entropy": 1.0, "tool_rate": 0.9,
    "logprob_gap_mean": 1e-7, "repeated_fraction": 0.0, "degenerate_groups": 0.3,
}  # fmt: skip
BROKEN = {
    "not_finite": {"loss": math.nan},
    "logprob_gap": {"logprob_gap_mean": 0.2},
    "reward_collapse": {"reward": -1.0},
    "tool_collapse": {"tool_rate": 0.2},
    "entropy_collapse": {"entropy": 0.05},
    "repetition": {"repeated_fraction": 0.5},
    "judge_hacking": {"reward": 1.5},
    "degenerate_groups": {"degenerate_groups": 1.0},
}


def after(num_steps, config=None, logprob_gap=0.05):
    """Alarms that saw healthy steps, the reward moving by 1%."""
    alarms = Alarms(config or AlarmsConfig(), logprob_gap)
    for step in range(1, num_steps + 1):
        assert alarms.check(step, HEALTHY | {"reward": 1.0 + 0.01 * (-1) ** step}) == []
    return alarms


def test_every_alarm_has_a_case():
    assert BROKEN.keys() == DEFAULT_ACTIONS.keys()


@pytest.mark.parametrize("name", BROKEN)
def test_an_alarm_begins_and_is_repeated_only_now_and_then(name):
    alarms = after(10)
    (alarm,) = alarms.check(11, HEALTHY | BROKEN[name])
    assert (alarm.name, alarm.action) == (name, "stop" if name == "not_finite" else "warn")
    assert len(alarm.text) > 40
    if name in ("tool_collapse", "judge_hacking"):  # the mean follows: a change is news for a while only
        return
    said = [step for step in range(12, 33) if alarms.check(step, HEALTHY | BROKEN[name])]
    assert said == [21, 31]
    if name == "reward_collapse":  # over once the last three steps are well
        return
    assert alarms.check(33, HEALTHY) == []
    assert alarms.check(34, HEALTHY | BROKEN[name])  # it is over, and begins again


@pytest.mark.parametrize("name", ["reward_collapse", "tool_collapse", "entropy_collapse", "judge_hacking"])
def test_a_change_needs_a_full_window_to_be_one(name):
    assert after(9).check(10, HEALTHY | BROKEN[name]) == []


def test_what_is_not_one():
    assert after(10).check(11, HEALTHY | {"reward": 1.5, "accuracy": 0.9}) == []  # it answers better
    assert after(10).check(11, HEALTHY | {"reward": 0.95}) == []  # within the noise of three steps
    assert after(10).check(11, HEALTHY | {"tool_rate": 0.5}) == []
    assert after(10).check(11, {}) == []  # a step without anything to learn from
    assert after(10, logprob_gap=0.3).check(11, HEALTHY | BROKEN["logprob_gap"]) == []


def test_a_reward_that_was_gained_and_is_lost():
    """The curve of the quickstart's overlapped run without a correction; and the same rise without the fall."""
    rise = [0.28, 0.3, 0.35, 0.33, 0.4, 0.5, 0.55, 0.65, 0.7, 0.78, 0.84, 0.86, 0.9, 0.91]
    alarms = Alarms(AlarmsConfig(), 0.05)
    for step, reward in enumerate([*rise, 0.9, 0.84, 0.8], start=1):
        assert alarms.check(step, HEALTHY | {"reward": reward, "accuracy": reward}) == []
    fall = [0.7, 0.6, 0.45, 0.3, 0.17]
    said = [a.name for s, r in enumerate(fall, start=18) for a in alarms.check(s, HEALTHY | {"reward": r, "accuracy": r})]
    assert said == ["reward_collapse"]


def test_actions_are_configured():
    config = AlarmsConfig(actions={"tool_collapse": "stop", "repetition": "ignore"})
    found = after(10, config).check(11, HEALTHY | BROKEN["tool_collapse"] | BROKEN["repetition"])
    assert [(alarm.name, alarm.action) for alarm in found] == [("tool_collapse", "stop")]
    with pytest.raises(ConfigError, match="no such alarm; there are not_finite, logprob_gap"):
        AlarmsConfig(actions={"tool": "stop"})
    with pytest.raises(ConfigError, match="allowed: warn, stop, ignore"):
        AlarmsConfig(actions={"repetition": "halt"})
    with pytest.raises(ConfigError, match=r"window=2 must be 3 steps"):
        AlarmsConfig(window=2)


def test_the_history_survives_a_restart():
    resumed = Alarms(AlarmsConfig(), 0.05)
    resumed.load_state(json.loads(json.dumps(after(10).state())))
    found = resumed.check(11, HEALTHY | BROKEN["tool_collapse"] | BROKEN["entropy_collapse"])
    assert [alarm.name for alarm in found] == ["tool_collapse", "entropy_collapse"]
    fresh = Alarms(AlarmsConfig(), 0.05)
    fresh.load_state({})  # of a checkpoint without alarms
    assert fresh.check(1, HEALTHY) == []
