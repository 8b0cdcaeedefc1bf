"""Sokoban: rooms drawn from a seed by playing backwards from the solved room, and the game as a gymnasium environment."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np

from megatron_agent.errors import EnvError

Cell = tuple[int, int]  # (row, column)
UP, DOWN, LEFT, RIGHT = range(4)
STEPS: dict[int, Cell] = {UP: (-1, 0), DOWN: (1, 0), LEFT: (0, -1), RIGHT: (0, 1)}
BACK = {UP: DOWN, DOWN: UP, LEFT: RIGHT, RIGHT: LEFT}
SYMBOLS = "#_O√XPS"  # wall, floor, target, box on target, box, player, player on target
MAX_ATTEMPTS = 200
FLOOR_SHARE = 0.6  # of a room's inner cells


@dataclass(frozen=True)
class Room:
    """Where everything stands; `solution` are moves that solve it (of a drawn room; not the fewest)."""

    height: int
    width: int
    floor: frozenset[Cell]  # all cells that are no wall
    targets: frozenset[Cell]
    boxes: frozenset[Cell]
    player: Cell
    solution: tuple[int, ...] = ()

    def cells(self) -> list[list[str]]:
        return [[self._symbol((row, column)) for column in range(self.width)] for row in range(self.height)]

    def _symbol(self, cell: Cell) -> str:
        if cell not in self.floor:
            return "#"
        on_target = cell in self.targets
        if cell in self.boxes:
            return "√" if on_target else "X"
        if cell == self.player:
            return "S" if on_target else "P"
        return "O" if on_target else "_"


def moved(cell: Cell, action: int) -> Cell:
    return cell[0] + STEPS[action][0], cell[1] + STEPS[action][1]


def read_room(lines: Sequence[str]) -> Room:
    """A room from lines of symbols, with or without spaces between them. Raises EnvError."""
    rows = ["".join(str(line).split()) for line in lines]
    cells = {(row, column): symbol for row, line in enumerate(rows) for column, symbol in enumerate(line)}
    found = {symbol: frozenset(cell for cell, s in cells.items() if s == symbol) for symbol in SYMBOLS}
    player, boxes = found["P"] | found["S"], found["X"] | found["√"]
    targets = found["O"] | found["√"] | found["S"]
    if (
        len(set(map(len, rows))) != 1
        or set(cells.values()) - set(SYMBOLS)
        or len(player) != 1
        or not boxes
        or len(boxes) != len(targets)
    ):
        raise EnvError(f"a room is equal lines of {SYMBOLS} with one player and as many boxes as targets, not {lines!r:.200}")
    (start,) = player
    return Room(len(rows), len(rows[0]), frozenset(cells) - found["#"], targets, boxes, start)


def draw_room(size: int, num_boxes: int, num_moves: int, seed: int) -> Room:
    """A room of `size` x `size` cells, solvable within `num_moves` moves, with no box on a target. Raises EnvError.

    From boxes on their targets the player walks at random and pulls; of the states on that way, the one whose boxes lie
    farthest from the targets is kept, and the way back is a solution.
    """
    rng = random.Random(seed)
    for _ in range(MAX_ATTEMPTS):
        floor = _carve(size, rng)
        if len(floor) < 2 * num_boxes + 1:
            continue
        *targets, player = rng.sample(sorted(floor), num_boxes + 1)
        room = _played_back(Room(size, size, floor, frozenset(targets), frozenset(targets), player), num_moves, rng)
        if room is not None:
            return room
    raise EnvError(f"no room of {size} x {size} with {num_boxes} boxes was found from seed {seed}; take fewer boxes")


def _carve(size: int, rng: random.Random) -> frozenset[Cell]:
    """A connected floor within the outer walls, by a random walk."""
    cell = (rng.randrange(1, size - 1), rng.randrange(1, size - 1))
    floor = {cell}
    while len(floor) < FLOOR_SHARE * (size - 2) ** 2:
        row, column = moved(cell, rng.randrange(4))
        if 1 <= row < size - 1 and 1 <= column < size - 1:
            cell = (row, column)
            floor.add(cell)
    return frozenset(floor)


def _played_back(solved: Room, num_moves: int, rng: random.Random) -> Room | None:
    """None where the walk never took all boxes off the targets."""
    player, boxes = solved.player, {box: box for box in solved.boxes}  # where a box is -> where it came from
    moves: list[int] = []
    best, best_distance = None, 0
    for _ in range(num_moves):
        free = [a for a in STEPS if (to := moved(player, a)) in solved.floor and to not in boxes]
        if not free:
            break
        pulling = [action for action in free if moved(player, BACK[action]) in boxes]
        action = rng.choice(pulling or free)
        behind = moved(player, BACK[action])
        if behind in boxes:
            boxes[player] = boxes.pop(behind)
        player = moved(player, action)
        moves.append(BACK[action])
        distance = sum(abs(box[0] - home[0]) + abs(box[1] - home[1]) for box, home in boxes.items())
        if distance > best_distance and not solved.targets & boxes.keys():
            best_distance, solution = distance, tuple(reversed(moves))
            best = Room(solved.height, solved.width, solved.floor, solved.targets, frozenset(boxes), player, solution)
    return best


class SokobanEnv(gymnasium.Env[np.ndarray, Any]):
    """Actions up, down, left, right; a step into a box pushes it, if the cell behind it is free.

    Rewards as in gym-sokoban: -0.1 a step, 1 for a box pushed onto a target, -1 for one pushed off, 10 at the end.
    An observation is the room as indices into SYMBOLS, uint8 [height, width].
    """

    STEP_REWARD, BOX_REWARD, SOLVED_REWARD = -0.1, 1.0, 10.0

    def __init__(self, room: Room) -> None:
        self.room = room
        self.action_space = gymnasium.spaces.Discrete(len(STEPS))
        self.observation_space = gymnasium.spaces.Box(0, len(SYMBOLS) - 1, (room.height, room.width), np.uint8)
        self._start()

    def _start(self) -> None:
        self.player, self.boxes = self.room.player, set(self.room.boxes)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._start()
        return self._observation(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward, to = self.STEP_REWARD, moved(self.player, action)
        if to in self.boxes:
            beyond = moved(to, action)
            if beyond in self.room.floor and beyond not in self.boxes:
                self.boxes.remove(to)
                self.boxes.add(beyond)
                reward += self.BOX_REWARD * ((beyond in self.room.targets) - (to in self.room.targets))
        if to in self.room.floor and to not in self.boxes:
            self.player = to
        solved = self.boxes == self.room.targets
        return self._observation(), reward + self.SOLVED_REWARD * solved, solved, False, {}

    def now(self) -> Room:
        """The room as it stands."""
        room = self.room
        return Room(room.height, room.width, room.floor, room.targets, frozenset(self.boxes), self.player)

    def _observation(self) -> np.ndarray:
        return np.array([[SYMBOLS.index(symbol) for symbol in line] for line in self.now().cells()], np.uint8)
