"""What the games share: a move in `<action>` tags, the board back as text or picture, the game's reward every turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_agent.envs.base import ToolBase
from megatron_agent.envs.functional import last_tagged
from megatron_agent.errors import ConfigError, EnvError

if TYPE_CHECKING:
    import gymnasium
    from PIL import Image

HEADING = "[Observations]:"
Color = tuple[int, int, int]


@dataclass(frozen=True)
class Look:
    """How a cell is drawn: its ground, and a disc or a square on it."""

    ground: Color
    mark: Color | None = None
    is_disc: bool = True


@dataclass
class GridConfig:
    """`observation`: "text", or "picture" with cells of `cell_px` a side."""

    observation: str = "text"
    cell_px: int = 56
    invalid_reward: float = 0.0  # of a turn without a legible move

    def __post_init__(self) -> None:
        if self.observation not in ("text", "picture"):
            raise ConfigError(f"observation is {self.observation!r}; allowed: text, picture")
        if not 4 <= self.cell_px <= 256:
            raise ConfigError(f"cell_px is {self.cell_px}; allowed: 4 to 256")


class GridGame(ToolBase):
    """A gymnasium environment on a grid. The last `<action>` of a turn is carried out; the episode ends with the game.

    A move that cannot be read is an error, with the board as it stands. The board of a row is fixed by its extra_info, so
    that all rollouts of a group play the same one.
    """

    runs_inline: ClassVar[bool] = True
    answer_role: ClassVar[str] = "user"
    actions: ClassVar[dict[str, int]]  # what the model writes -> the environment's action
    looks: ClassVar[dict[str, Look]]  # of every symbol of the board
    config: GridConfig

    def reset(self, raw_prompt: Any, multi_modal_data: Any, origin_multi_modal_data: Any, **kwargs: Any) -> None:
        self.game = self.start(kwargs.get("extra_info") or {})

    def execute(self, action_string: str, **kwargs: Any) -> tuple[Any, float, bool, dict[str, Any]]:
        move = last_tagged(action_string, "action")
        action = self.actions.get(move.strip().lower()) if move is not None else None
        if action is None:
            error = f"end your turn with one of {', '.join(f'<action>{name}</action>' for name in self.actions)}"
            return self._observation(f"Error: {error}\n"), self.config.invalid_reward, False, {"error": error}
        _, reward, terminated, truncated, _ = self.game.step(action)
        return self._observation(), float(reward), terminated or truncated, {}

    def start(self, extra_info: dict[str, Any]) -> gymnasium.Env:
        """A game as the row describes it, already reset. Raises EnvError for a row that describes none."""
        raise NotImplementedError

    def cells(self) -> list[list[str]]:
        """The board's symbols, row by row."""
        raise NotImplementedError

    def _observation(self, error: str = "") -> dict[str, Any]:
        cells, is_text = self.cells(), self.config.observation == "text"
        content = f"{error}{HEADING}\n{show(cells) if is_text else '<image>'}"
        pictures = [] if is_text else [draw(cells, self.looks, self.config.cell_px)]
        return {"chat": [{"role": self.answer_role, "content": content}], "multi_modal_data": {"image": pictures}}


def show(cells: Sequence[Sequence[str]]) -> str:
    """One line a row, cells apart by spaces."""
    return "\n".join(" ".join(line) for line in cells)


def draw(cells: Sequence[Sequence[str]], looks: dict[str, Look], side_px: int) -> Image.Image:
    """A picture with `side_px` for the side of a cell and a dark line between cells."""
    from PIL import Image, ImageDraw

    canvas = Image.new("RGB", (len(cells[0]) * side_px, len(cells) * side_px), (40, 40, 40))
    pen, margin = ImageDraw.Draw(canvas), side_px // 5
    for row, line in enumerate(cells):
        for column, cell in enumerate(line):
            left, top, look = column * side_px, row * side_px, looks[cell]
            pen.rectangle((left, top, left + side_px - 2, top + side_px - 2), fill=look.ground)
            shape = pen.ellipse if look.is_disc else pen.rectangle
            if look.mark is not None:
                shape((left + margin, top + margin, left + side_px - 2 - margin, top + side_px - 2 - margin), fill=look.mark)
    return canvas


def whole_number(extra_info: dict[str, Any], name: str, default: int | None, low: int, high: int) -> int:
    """A number of a row's extra_info, `default` where it is absent or null. Raises EnvError."""
    value = default if extra_info.get(name) is None else extra_info[name]
    if value is None:
        raise EnvError(f"extra_info.{name} is missing")
    if not isinstance(value, (int, float)) or value != int(value) or not low <= value <= high:
        raise EnvError(f"extra_info.{name} is {value!r}; allowed: a whole number from {low} to {high}")
    return int(value)
