"""Frozen Lake as a tool: the map of a row, moves out of text, rewards, boards as text and as pictures."""

from collections import Counter

import numpy as np
import pytest

from megatron_agent.data.images import ImageStore, PixelLimits
from megatron_agent.envs.base import make_session
from megatron_agent.envs.frozenlake import FrozenLake, make_map
from megatron_agent.errors import ConfigError, EnvError
from megatron_agent.types import Task

DESC = ["SFH", "HFF", "FFG"]
LIMITS = PixelLimits(784, 1 << 20)


def lake(extra_info, **options):
    tool = FrozenLake(config=FrozenLake.Config(**{"is_slippery": False, **options}))
    tool.reset([], {}, {}, extra_info=extra_info)
    return tool


def go(tool, move):
    raw, reward, done, info = tool.execute(f"<think>x</think><action>{move}</action>")
    return raw["chat"][0]["content"].removeprefix("[Observations]:\n"), reward, done, info


def test_a_walk_to_the_goal():
    tool = lake({"desc": DESC})
    assert go(tool, "right") == ("F P H\nH F F\nF F G", 0.0, False, {})
    assert go(tool, " Down ") == ("F F H\nH P F\nF F G", 0.0, False, {})
    assert go(tool, "down")[0] == "F F H\nH F F\nF P G"
    assert go(tool, "right")[1:] == (1.0, True, {})


def test_a_hole_ends_it_for_nothing_and_a_wall_stops():
    tool = lake({"desc": DESC})
    assert go(tool, "up") == ("P F H\nH F F\nF F G", 0.0, False, {})
    assert go(tool, "down")[1:] == (0.0, True, {})


@pytest.mark.parametrize(
    "text", ["", "<action>jump</action>", "<action></action>", "<action>left", "left", "<action>1</action>"]
)
def test_what_is_no_move_is_an_error_with_the_board_as_it_stands(text):
    raw, reward, done, info = lake({"desc": DESC}, invalid_reward=-0.1).execute(text)
    content = raw["chat"][0]["content"]
    assert content == f"Error: {info['error']}\n[Observations]:\nP F H\nH F F\nF F G" and "<action>left</action>" in content
    assert (reward, done) == (-0.1, False)


def test_the_last_move_of_a_turn_counts():
    raw, *_ = lake({"desc": DESC}).execute("<action>down</action> no <action>right</action>")
    assert "F P H" in raw["chat"][0]["content"]


def test_a_seed_names_a_map_for_every_rollout_of_a_group():
    boards = [lake({"seed": 7, "size": 5, "p": 0.7}).cells() for _ in range(3)]
    assert boards[0] == boards[1] == boards[2] and len(boards[0]) == 5
    assert len({str(lake({"seed": seed}).cells()) for seed in range(20)}) == 20
    assert lake({"seed": 7, "size": None, "desc": None}, size=4).cells() == lake({"seed": 7}, size=4).cells()
    assert make_map(4, 0.8, 0) == make_map(4, 0.8, 0) and make_map(4, 0.8, 0)[0][0] == "S"


@pytest.mark.parametrize("seed", range(20))
def test_there_is_a_way(seed):
    lines = make_map(8, 0.6, seed)
    seen, border = {(0, 0)}, [(0, 0)]
    while border:
        row, column = border.pop()
        for cell in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            if cell not in seen and min(cell) >= 0 and max(cell) < 8 and lines[cell[0]][cell[1]] != "H":
                seen.add(cell)
                border.append(cell)
    assert (7, 7) in seen and lines[7][7] == "G"


def test_slippery_ice_leads_astray_two_times_in_three():
    found = Counter()
    for _ in range(300):
        tool = lake({"desc": ["FFF", "FSF", "FFG"]}, is_slippery=True)
        found[go(tool, "right")[0]] += 1
    assert len(found) == 3 and all(60 <= count <= 140 for count in found.values())


def test_pictures(tmp_path):
    config = FrozenLake.Config(is_slippery=False, observation="picture", cell_px=28)
    store = ImageStore(tmp_path, LIMITS)
    session = make_session("frozenlake", {"frozenlake": config}, store, LIMITS)
    session.reset(Task("t:0", "", ({"role": "user", "content": "?"},), (), "frozenlake", "1", "?", {"desc": DESC}))
    result = session.step("<action>right</action>")
    content = result.observation.messages[0]["content"]
    assert [item["type"] for item in content] == ["text", "image"] and result.reward == 0.0
    ref = result.observation.images[0]
    assert (ref.width_px, ref.height_px) == (84, 84)
    middles = np.asarray(store.picture(ref))[14::28, 14::28].reshape(-1, 3)
    looks = {symbol: look.mark or look.ground for symbol, look in FrozenLake.looks.items()}
    expected = [looks[symbol] for line in ("FPH", "HFF", "FFG") for symbol in line]
    assert np.abs(middles - np.array(expected)).max() == 0
    assert session.step("<action>down</action>").observation.images[0] != ref


@pytest.mark.parametrize(
    ("extra_info", "why"),
    [
        ({}, "seed is missing"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": "3"}, "seed is '3'"),
        ({"seed": 1, "size": 99}, "size is 99"),
        ({"seed": 1, "p": 0.1}, "p is 0.1"),
        ({"seed": 1, "p": "x"}, "p is 'x'"),
        ({"desc": ["SF", "F"]}, "lines of equal length"),
        ({"desc": ["SX", "FG"]}, "lines of equal length"),
        ({"desc": ["SS", "FG"]}, "lines of equal length"),
        ({"desc": ["SF", "FF"]}, "lines of equal length"),
        ({"desc": "SFFG"}, "lines of equal length"),
    ],
)
def test_rows_that_describe_no_map(extra_info, why):
    with pytest.raises(EnvError, match=why):
        lake(extra_info)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (dict(size=1), "size is 1"),
        (dict(p=0.2), "p is 0.2"),
        (dict(observation="sound"), "observation is 'sound'"),
        (dict(cell_px=1), "cell_px is 1"),
    ],
)
def test_bad_configs(options, why):
    with pytest.raises(ConfigError, match=why):
        FrozenLake.Config(**options)
