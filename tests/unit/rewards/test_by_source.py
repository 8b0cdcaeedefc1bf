"""Who scores what: routes by pattern, by the sample, by default; options and judges of routes; mistakes at parse time."""

import asyncio
import json
from typing import ClassVar

import pytest

from megatron_agent.config import parse, to_dict
from megatron_agent.errors import ConfigError
from megatron_agent.rewards.base import RewardBase
from megatron_agent.rewards.by_source import BySourceReward
from megatron_agent.types import RewardParts, Status, Task, Trajectory, Turn, Unscored

JUDGE = {"kind": "openai", "endpoints": ["http://127.0.0.1:9/v1"]}
ROUTES = {
    "thinklite_*": "math",
    "geoguessr": {"name": "common_reasoning", "format_weight": 0.5},
    "rag*": "rag",
    "rag_v2": "exact_match",  # never: rag* comes first
    "own": f"{__name__}:Constant",
}


class Constant(RewardBase):
    async def score(self, trajectory, task):
        return RewardParts({"constant": 1.0}, {"constant": 7.0})


class Silent(RewardBase):
    """Counts starts and ends."""

    events: ClassVar[list[str]] = []

    async def start(self):
        self.events.append("start")

    async def close(self):
        self.events.append("close")


def reward_of(**options):
    return BySourceReward(parse({"reward": {"name": "by_source", **options}}).reward)


def score(reward, source, text, extra_info=None, truth="red"):
    task = Task("t", source, (), (), "", truth, "Which?", extra_info or {})
    trajectory = Trajectory(task, 0, [1], [Turn([1], [0.0], [0], text, "stop")], Status.ANSWERED)
    return asyncio.run(reward.score(trajectory, task))


@pytest.mark.parametrize(("source", "text", "parts", "total"), [
    ("thinklite_eureka", r"<think>a</think>\boxed{red}", {"accuracy": 1, "format": 0}, 1.2),
    ("geoguessr", "<answer>red", {"accuracy": 0, "format": -1}, -0.5),
    ("rag_v2", "<think>a</think><answer>red</answer>", {"accuracy": 1, "format": 0, "retrieval": 0}, 1.0),
    ("own", "", {"constant": 1}, 7.0),
    ("vstar", "<answer>red</answer>", {"accuracy": 1, "format": 0, "tool": 0}, 0.8),  # the default
])  # fmt: skip
def test_routes(source, text, parts, total):
    found = score(reward_of(routes=ROUTES), source, text)
    assert found.parts == parts and found.total == pytest.approx(total)


def test_the_sample_says_so_itself():
    reward = reward_of(routes=ROUTES)
    wrong = "<answer>red"
    assert score(reward, "vstar", wrong, {"reward": "common_reasoning"}).total == -0.5  # with the route's options
    assert score(reward, "vstar", "<answer>red</answer>", {"reward": "exact_match"}).parts == {"accuracy": 1.0}
    assert score(reward, "rag", "", {"reward": f"{__name__}:Constant"}).total == 7.0
    assert score(reward, "rag", "<answer>red</answer>", {"reward": ""}).parts["retrieval"] == 0.0
    for name, reason in (
        ("exact_mach", "did you mean 'exact_match'"),
        ("os:system", "data cannot load it"),
        ("by_source", "itself"),
    ):
        found = score(reward, "vstar", wrong, {"reward": name})
        assert isinstance(found, Unscored) and reason in found.reason
    other = reward_of(routes=ROUTES, sample_key="style")
    assert score(other, "vstar", "<answer>red</answer>", {"reward": "x", "style": "exact_match"}).parts == {"accuracy": 1.0}


def test_no_route():
    found = score(reward_of(routes=ROUTES, default=""), "vstar", "<answer>red</answer>")
    assert isinstance(found, Unscored) and "'vstar'" in found.reason and "thinklite_*" in found.reason


def test_of_two_routes_to_one_reward_a_sample_means_the_first():
    routes = {"a": {"name": "rag", "format_weight": 1.0}, "b": {"name": "rag", "format_weight": 3.0}}
    reward = reward_of(routes=routes, default="rag")
    assert [score(reward, source, "x").total for source in ("a", "b", "c")] == [-1.0, -3.0, -2.0]
    assert score(reward, "b", "x", {"reward": "rag"}).total == -1.0


def test_one_judge_for_all_that_have_none_of_their_own():
    own = {**JUDGE, "model": "big"}
    routes = {"a": "vl_agent", "b": {"name": "math", "judge": own}, "c": {"name": "common_reasoning", "judge": {}}, "d": "rag"}
    reward = reward_of(routes=routes, judge=JUDGE)
    judges = {key: getattr(route, "judge", None) for key, route in reward._routes.items()}
    assert judges["a"] is reward._default.judge and judges["a"].config.model == "" and judges["b"].config.model == "big"
    assert type(judges["c"]).__name__ == "ExactMatchJudge" and judges["d"] is None
    assert len(reward._judges) == 3
    asyncio.run(reward.close())


def test_start_and_close_reach_every_route_once():
    Silent.events.clear()
    name = f"{__name__}:Silent"
    reward = reward_of(routes={"a": name, "b": name}, default=name)
    asyncio.run(reward.start())
    asyncio.run(reward.close())
    assert Silent.events == ["start"] * 3 + ["close"] * 3
    with pytest.raises(ConfigError, match=r"min_accuracy=0\.99 is not reached"):
        asyncio.run(reward_of(routes={"a": {"name": "math", "judge": {"min_accuracy": 0.99}}}).start())


def test_a_recorded_config_comes_back_with_every_option():
    config = parse(
        {"reward": {"name": "by_source", "routes": ROUTES, "judge": JUDGE, "default": {"name": "rag", "metric": "em"}}}
    )
    tree = json.loads(json.dumps(to_dict(config)))
    assert parse(tree) == config and to_dict(parse(tree)) == tree
    assert tree["reward"]["routes"]["geoguessr"]["judge"]["endpoints"] == JUDGE["endpoints"]
    assert tree["reward"]["routes"]["geoguessr"]["accuracy_weight"] == 0.8 and tree["reward"]["default"]["metric"] == "em"


@pytest.mark.parametrize(("options", "message"), [
    ({"routes": {"a": "common_reasonin"}}, "did you mean 'common_reasoning'"),
    ({"routes": {"a": {"name": "math", "acuracy_weight": 1}}}, r"reward\.routes\.a\.acuracy_weight.*mean 'accuracy_weight'"),
    ({"routes": {"a": {"name": "math", "accuracy_weight": "much"}}}, r"reward\.routes\.a\.accuracy_weight: expected float"),
    ({"routes": {"a": {"name": "math", "judge": {"kind": "gpt"}}}}, "allowed: exact_match, openai"),
    ({"routes": {"a": {"weight": 1}}}, r"reward\.routes\.a: give a reward's name"),
    ({"routes": {"a": 3}}, r"reward\.routes\.a: give a reward's name"),
    ({"routes": {"a": "by_source"}}, "not to itself"),
    ({"routes": {"a": "no.such.module:Class"}}, "cannot load"),
    ({"default": "exact"}, "did you mean 'exact_match'"),
    ({"routes": ["math"]}, "expected a mapping"),
    ({"judge": {"timeout": 3}}, "did you mean 'timeout_s'"),
])  # fmt: skip
def test_mistakes_are_found_when_the_config_is_parsed(options, message):
    with pytest.raises(ConfigError, match=message):
        parse({"reward": {"name": "by_source", **options}})
