"""Sokoban: rooms from seeds that can be solved, the rules, the rewards of gym-sokoban, boards as text and as pictures."""

import gymnasium
import numpy as np
import pytest

from megatron_agent.envs.sokoban import Sokoban
from megatron_agent.envs.sokoban_room import SYMBOLS, SokobanEnv, draw_room, read_room
from megatron_agent.errors import ConfigError, EnvError

ROOM = ["######", "#_XO##", "#P__##", "######"]


def play(extra_info, **options):
    tool = Sokoban(config=Sokoban.Config(**options))
    tool.reset([], {}, {}, extra_info=extra_info)
    return tool


def go(tool, move):
    raw, reward, done, info = tool.execute(f"<action>{move}</action>")
    lines = raw["chat"][0]["content"].removeprefix("[Observations]:\n").split("\n")
    return [line.replace(" ", "") for line in lines], pytest.approx(reward), done, info


def test_a_box_onto_its_target():
    tool = play({"room": ROOM})
    assert go(tool, "up") == (["######", "#PXO##", "#___##", "######"], -0.1, False, {})
    assert go(tool, "right") == (["######", "#_P√##", "#___##", "######"], -0.1 + 1 + 10, True, {})


def test_rules_and_rewards():
    tool = play({"room": ["#######", "#P√X_O#", "#_____#", "#######"]})
    assert go(tool, "right")[:2] == (["#######", "#P√X_O#", "#_____#", "#######"], -0.1)  # two boxes in a row
    assert go(tool, "up")[1] == -0.1  # a wall
    tool = play({"room": ["########", "#P√_XO_#", "########"]})
    assert go(tool, "right")[:2] == (["########", "#_SXXO_#", "########"], -0.1 - 1)
    assert go(tool, "left")[0][1] == "#PO" + "XXO_#"


def test_what_is_no_move():
    raw, reward, done, info = play({"room": ROOM}, invalid_reward=-0.5).execute("<answer>up</answer>")
    assert (reward, done) == (-0.5, False) and "<action>up</action>" in info["error"]
    assert raw["chat"][0]["content"].endswith("# P _ _ # #\n# # # # # #")


@pytest.mark.parametrize(("size", "num_boxes"), [(5, 1), (6, 1), (6, 2), (8, 3), (10, 4)])
def test_every_drawn_room_can_be_solved(size, num_boxes):
    for seed in range(25):
        room = draw_room(size, num_boxes, 60, seed)
        assert len(room.boxes) == len(room.targets) == num_boxes and not room.boxes & room.targets
        assert room.player in room.floor and room.player not in room.boxes
        outer = {(r, c) for r in range(size) for c in range(size) if not (0 < r < size - 1 and 0 < c < size - 1)}
        assert not outer & room.floor and room.boxes | room.targets <= room.floor
        env = SokobanEnv(room)
        env.reset(seed=0)
        dones = [env.step(move)[2] for move in room.solution]
        assert len(dones) <= 60 and True in dones and env.now().boxes != room.boxes


def test_a_seed_names_a_room_for_every_rollout_of_a_group():
    rooms = [play({"seed": 11, "size": 7, "num_boxes": 2}).game.room for _ in range(3)]
    assert rooms[0] == rooms[1] == rooms[2] == draw_room(7, 2, 60, 11)
    assert len({draw_room(7, 2, 60, seed) for seed in range(20)}) == 20


def test_it_is_a_gymnasium_environment():
    env = SokobanEnv(draw_room(6, 1, 60, 1))
    start, info = env.reset(seed=1)
    assert isinstance(env, gymnasium.Env) and env.observation_space.contains(start) and info == {}
    assert np.array_equal(start, [[SYMBOLS.index(symbol) for symbol in line] for line in env.room.cells()])
    for move in env.room.solution:
        observation, *_ = env.step(move)
        assert env.observation_space.contains(observation)
    assert np.array_equal(env.reset()[0], start)


def test_text_reads_back():
    room = draw_room(8, 3, 60, 5)
    again = read_room([" ".join(line) for line in room.cells()])
    assert again.cells() == room.cells() and again.targets == room.targets and again.boxes == room.boxes


def test_pictures():
    tool = play({"room": ROOM}, observation="picture", cell_px=20)
    raw, *_ = tool.execute("<action>right</action>")
    (picture,) = raw["multi_modal_data"]["image"]
    assert raw["chat"][0]["content"] == "[Observations]:\n<image>" and picture.size == (120, 80)
    middles = np.asarray(picture)[10::20, 10::20].reshape(-1, 3).tolist()
    looks = {symbol: list(look.mark or look.ground) for symbol, look in Sokoban.looks.items()}
    assert middles == [looks[symbol] for symbol in "".join(["######", "#_XO##", "#_P_##", "######"])]
    assert set(Sokoban.looks) == set(SYMBOLS)


@pytest.mark.parametrize(
    ("extra_info", "why"),
    [
        ({}, "seed is missing"),
        ({"seed": 1, "num_boxes": 9}, "num_boxes is 9"),
        ({"seed": 1, "size": 4}, "size is 4"),
        ({"room": ["###", "#P#"]}, "as many boxes as targets"),
        ({"room": ["PXO", "PP"]}, "equal lines"),
        ({"room": ["PXO", "PXO"]}, "one player"),
        ({"room": ["PXOQ"]}, "equal lines"),
    ],
)
def test_rows_that_describe_no_room(extra_info, why):
    with pytest.raises(EnvError, match=why):
        play(extra_info)


def test_a_room_that_cannot_be_found():
    with pytest.raises(EnvError, match="take fewer boxes"):
        draw_room(5, 4, 4, 0)


def test_bad_configs():
    for options, why in ((dict(size=4), "size is 4"), (dict(num_boxes=0), "num_boxes is 0"), (dict(num_moves=1), "num_moves")):
        with pytest.raises(ConfigError, match=why):
            Sokoban.Config(**options)
