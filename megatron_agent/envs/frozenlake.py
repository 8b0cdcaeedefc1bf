"""Frozen Lake: from the start to the goal without a step into a hole, on ice that may be slippery (gymnasium's game)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from megatron_agent.envs.grid_game import GridConfig, GridGame, Look, whole_number
from megatron_agent.errors import ConfigError, EnvError

if TYPE_CHECKING:
    from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv

SMALLEST, LARGEST = 2, 12
LEAST_FROZEN = 0.6  # with less ice than that a map with a way to the goal is hard to draw
ICE = (205, 225, 240)


class FrozenLake(GridGame):
    """`<action>left|down|right|up</action>`. Reaching the goal is worth 1 and ends the game, as a hole does, for 0.

    The row's extra_info holds `seed`, and `size` and `p` where they are not the config's; or the map itself, `desc`, lines
    of S, F, H and G. Slips are drawn anew in every episode.
    """

    name = "frozenlake"
    actions: ClassVar[dict[str, int]] = {"left": 0, "down": 1, "right": 2, "up": 3}
    looks: ClassVar[dict[str, Look]] = {
        "F": Look(ICE), "H": Look((20, 45, 90)), "G": Look(ICE, (40, 150, 60), is_disc=False), "P": Look(ICE, (200, 50, 40)),
    }  # fmt: skip

    @dataclass
    class Config(GridConfig):
        """`size` cells a side, each frozen with probability `p`. On slippery ice a move goes astray two times in three."""

        size: int = 8
        p: float = 0.8
        is_slippery: bool = True

        def __post_init__(self) -> None:
            super().__post_init__()
            if not SMALLEST <= self.size <= LARGEST:
                raise ConfigError(f"size is {self.size}; allowed: {SMALLEST} to {LARGEST}")
            if not LEAST_FROZEN <= self.p <= 1:
                raise ConfigError(f"p is {self.p}; allowed: {LEAST_FROZEN} to 1")

    config: Config
    game: FrozenLakeEnv

    def start(self, extra_info: dict[str, Any]) -> FrozenLakeEnv:
        from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv

        if extra_info.get("desc"):
            desc = check_map(extra_info["desc"])
        else:
            p = self.config.p if extra_info.get("p") is None else extra_info["p"]
            if not isinstance(p, (int, float)) or not LEAST_FROZEN <= p <= 1:
                raise EnvError(f"extra_info.p is {p!r}; allowed: {LEAST_FROZEN} to 1")
            size = whole_number(extra_info, "size", self.config.size, SMALLEST, LARGEST)
            desc = make_map(size, float(p), whole_number(extra_info, "seed", None, 0, 2**63))
        game = FrozenLakeEnv(desc=desc, is_slippery=self.config.is_slippery)
        game.reset()
        return game

    def cells(self) -> list[list[str]]:
        lines = [[cell.decode() for cell in line] for line in np.asarray(self.game.desc)]
        return place(lines, int(self.game.s))


def make_map(size: int, p: float, seed: int) -> list[str]:
    """Lines of S, F, H and G in which a way leads from the top left corner to the bottom right one."""
    from gymnasium.envs.toy_text.frozen_lake import generate_random_map

    return list(map(str, generate_random_map(size, p, seed)))


def check_map(desc: Any) -> list[str]:
    """Raises EnvError unless `desc` is a rectangle of S, F, H and G with one start and a goal."""
    lines = [str(line) for line in desc] if isinstance(desc, (list, tuple)) else []
    cells = "".join(lines)
    if len(set(map(len, lines))) != 1 or set(cells) - set("SFHG") or cells.count("S") != 1 or "G" not in cells:
        raise EnvError(f"extra_info.desc is {desc!r:.100}; it must be lines of equal length of S (one), F, H and G")
    return lines


def place(lines: Sequence[Sequence[str]], state: int) -> list[list[str]]:
    """The cells of a map with the player P on the one of that number; F frozen (the start too), H hole, G goal."""
    cells = [["F" if cell == "S" else cell for cell in line] for line in lines]
    row, column = divmod(state, len(cells[0]))
    cells[row][column] = "P"
    return cells


COMPONENT = FrozenLake
