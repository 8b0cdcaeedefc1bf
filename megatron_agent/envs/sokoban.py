"""Sokoban: push every box onto a target; a box in a corner is lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_agent.envs.grid_game import GridConfig, GridGame, Look, whole_number
from megatron_agent.errors import ConfigError

if TYPE_CHECKING:
    from megatron_agent.envs.sokoban_room import SokobanEnv

SIZES, BOXES, MOVES = (5, 12), (1, 4), (4, 500)
FLOOR, TARGET, BOX, PLAYER = (225, 215, 195), (240, 190, 190), (150, 95, 40), (50, 90, 180)


class Sokoban(GridGame):
    """`<action>up|down|left|right</action>`; -0.1 a step, 1 for a box onto a target, -1 for one off, 10 when solved.

    The row's extra_info holds `seed`, and `size`, `num_boxes` where they are not the config's; or the room itself, `room`,
    lines of # wall, _ floor, O target, X box, √ box on target, P player, S player on target.
    """

    name = "sokoban"
    actions: ClassVar[dict[str, int]] = {"up": 0, "down": 1, "left": 2, "right": 3}
    looks: ClassVar[dict[str, Look]] = {
        "#": Look((90, 90, 90)), "_": Look(FLOOR), "O": Look(TARGET), "X": Look(FLOOR, BOX, is_disc=False),
        "√": Look(TARGET, BOX, is_disc=False), "P": Look(FLOOR, PLAYER), "S": Look(TARGET, PLAYER),
    }  # fmt: skip

    @dataclass
    class Config(GridConfig):
        """`size` cells a side, walls included. A drawn room can be solved within `num_moves` moves."""

        size: int = 6
        num_boxes: int = 1
        num_moves: int = 60

        def __post_init__(self) -> None:
            super().__post_init__()
            for name, (low, high) in {"size": SIZES, "num_boxes": BOXES, "num_moves": MOVES}.items():
                if not low <= getattr(self, name) <= high:
                    raise ConfigError(f"{name} is {getattr(self, name)}; allowed: {low} to {high}")

    config: Config
    game: SokobanEnv

    def start(self, extra_info: dict[str, Any]) -> SokobanEnv:
        from megatron_agent.envs.sokoban_room import SokobanEnv, draw_room, read_room

        if extra_info.get("room"):
            return SokobanEnv(read_room(extra_info["room"]))
        size = whole_number(extra_info, "size", self.config.size, *SIZES)
        num_boxes = whole_number(extra_info, "num_boxes", self.config.num_boxes, *BOXES)
        seed = whole_number(extra_info, "seed", None, 0, 2**63)
        return SokobanEnv(draw_room(size, num_boxes, self.config.num_moves, seed))

    def cells(self) -> list[list[str]]:
        return self.game.now().cells()


COMPONENT = Sokoban
