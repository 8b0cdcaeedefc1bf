"""Shared by the families' renderers: messages -> token row, with one token per merged patch of every picture.

A family's renderer names its special tokens and how a picture is marked; everything else is here. The tokenizer is the
only part of Hugging Face that is used (no processor: the number of image tokens follows from the ImageRef's size).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_agent.errors import ConfigError, DataError
from megatron_agent.types import ImageRef, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHED_TEXTS = 8192  # a step has some hundred prompts, each asked for group_size times, and a few fixed observations


def expand_placeholders(token_ids: Sequence[int], placeholder_id: int, counts: Sequence[int]) -> list[int]:
    """Every `placeholder_id` in turn becomes `counts[i]` copies. Raises DataError when their numbers differ."""
    found = token_ids.count(placeholder_id)
    if found != len(counts):
        raise DataError(
            f"the text holds {found} image placeholders for {len(counts)} pictures; each picture needs one image item in "
            f"the messages, and no text may contain the placeholder token itself"
        )
    row: list[int] = []
    remaining = iter(counts)
    for token_id in token_ids:
        if token_id == placeholder_id:
            row += [placeholder_id] * next(remaining)
        else:
            row.append(token_id)
    return row


def collapse_runs(row: Sequence[int], placeholder_id: int) -> list[int]:
    """The inverse of `expand_placeholders`: every run of placeholders becomes a single one."""
    previous = [-1, *row[:-1]]
    return [t for t, before in zip(row, previous, strict=True) if t != placeholder_id or before != placeholder_id]


def run_lengths(row: Sequence[int], placeholder_id: int) -> list[int]:
    """Lengths of the runs of `placeholder_id`, in row order."""
    lengths: list[int] = []
    before = -1
    for token_id in row:
        if token_id == placeholder_id:
            if before == placeholder_id:
                lengths[-1] += 1
            else:
                lengths.append(1)
        before = token_id
    return lengths


def count_image_items(messages: Sequence[Message]) -> int:
    contents = [message["content"] for message in messages]
    return sum(item.get("type") == "image" for items in contents if isinstance(items, list) for item in items)


class ChatRenderer:
    """Token rows from a chat template. A family's class fills in the tokens; see models/qwen2_5_vl/renderer.py.

    `merge_px` is the side of the square of pixels that becomes one token. Texts are rendered and tokenised once and
    remembered: a driver serves hundreds of episodes a second from a few hundred prompts.
    """

    end_of_turn: str
    image_placeholder: str
    image_block: str  # what the template writes for a picture
    forbidden_tokens: tuple[str, ...]  # only the framework may write these
    fallback_template: str = ""  # for checkpoints whose own template cannot show pictures or answers of tools

    def __init__(self, model_path: str, merge_px: int) -> None:
        from transformers import AutoTokenizer

        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_path)
        self.merge_px = merge_px
        self.image_pad_id = self._token_id(self.image_placeholder)
        self.end_of_turn_id = self._token_id(self.end_of_turn)
        self.forbidden_ids = frozenset(self._token_id(token) for token in self.forbidden_tokens)
        ends = (self.end_of_turn_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        self.stop_token_ids = frozenset(token_id for token_id in ends if token_id is not None)
        special_ids = {token_id for token_id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        # No answer holds them: beside the forbidden ones the start of a forged turn, and its like.
        self.reserved_ids = (self.forbidden_ids | special_ids) - self.stop_token_ids
        self._encode = functools.lru_cache(CACHED_TEXTS)(self._encode_uncached)
        self._render = functools.lru_cache(CACHED_TEXTS)(self._render_uncached)
        if self.fallback_template and not self._shows_pictures_and_tools():
            self.tokenizer.chat_template = self.fallback_template

    def prompt(self, messages: Sequence[Message], images: Sequence[ImageRef], tools: list[dict] | None = None) -> list[int]:
        """The token row of a conversation up to where the model starts to write.

        `tools` are JSON schemas for the template. Raises DataError when pictures and image placeholders do not match.
        """
        self._check_items(messages, images)
        return self._row(self._render(json.dumps(list(messages)), json.dumps(tools), True), images)

    def observation(self, messages: Sequence[Message], images: Sequence[ImageRef], finished_by_eos: bool) -> list[int]:
        """The tokens between two turns of the model: the end of its turn, the messages, the next generation prompt.

        `finished_by_eos`: the model wrote the end-of-turn token itself, so only what the template puts behind it follows.
        Raises DataError as `prompt` does.
        """
        self._check_items(messages, images)
        behind_turn, text = self._observation_text(json.dumps(list(messages)))
        return self._row(behind_turn + text if finished_by_eos else self.end_of_turn + behind_turn + text, images)

    def verbatim(self, text: str, images: Sequence[ImageRef]) -> list[int]:
        """`text` exactly as an environment wrote it, `<image>` standing for a picture. Raises DataError on a mismatch."""
        return self._row(text.replace("<image>", self.image_block), images)

    def encode(self, text: str) -> list[int]:
        """Plain tokenisation of `text`, special tokens included where it spells them; nothing is added."""
        return list(self._encode(text))

    def collapse(self, row: Sequence[int]) -> list[int]:
        """One placeholder per picture instead of one per merged patch: the prompt that vLLM expands again."""
        return collapse_runs(row, self.image_pad_id)

    def decode(self, token_ids: Sequence[int], special_tokens: bool = False) -> str:
        """Text of generated tokens; `special_tokens` keeps end-of-turn and picture tokens in it."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=not special_tokens))

    def num_image_tokens(self, image: ImageRef) -> int:
        """Tokens that a picture occupies in the row. Raises DataError for a size that is no multiple of `merge_px`."""
        if image.width_px % self.merge_px or image.height_px % self.merge_px or not image.width_px or not image.height_px:
            raise DataError(f"picture of {image.width_px}x{image.height_px} px: both must be multiples of {self.merge_px} px")
        return (image.width_px // self.merge_px) * (image.height_px // self.merge_px)

    def check_row(self, row: Sequence[int], images: Sequence[ImageRef]) -> None:
        """Raises DataError unless the runs of placeholders in `row` are exactly those of `images`, in order."""
        found, expected = run_lengths(row, self.image_pad_id), [self.num_image_tokens(image) for image in images]
        if found != expected:
            raise DataError(f"the token row has pictures of {found} tokens, its images need {expected}")

    def _token_id(self, token: str) -> int:
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        if not isinstance(token_id, int) or token_id == self.tokenizer.unk_token_id:
            raise ConfigError(f"{self.tokenizer.name_or_path}: the tokenizer has no token {token!r}; is it of this family?")
        return token_id

    def _check_items(self, messages: Sequence[Message], images: Sequence[ImageRef]) -> None:
        if (found := count_image_items(messages)) != len(images):
            raise DataError(f"the messages show {found} pictures, {len(images)} were given")

    def _row(self, text: str, images: Sequence[ImageRef]) -> list[int]:
        return expand_placeholders(self._encode(text), self.image_pad_id, [self.num_image_tokens(image) for image in images])

    def _encode_uncached(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def _render_uncached(self, messages_json: str, tools_json: str, add_generation_prompt: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            json.loads(messages_json),
            tools=json.loads(tools_json),
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
        return str(text)

    def _shows_pictures_and_tools(self) -> bool:
        """Whether the checkpoint's template writes a picture where one is, and a tool's answer as a turn of the user."""
        from jinja2 import TemplateError

        picture = [{"type": "image"}]
        messages = [{"role": "user", "content": picture}, {"role": "assistant", "content": "."}]
        try:
            text = self._render_uncached(json.dumps([*messages, {"role": "tool", "content": picture}]), "null", True)
        except (TypeError, ValueError, TemplateError):  # pictures are no text to it, or there is no template at all
            return False
        return text.count(self.image_block) == 2 and "<tool_response>" in text

    def _observation_text(self, messages_json: str) -> tuple[str, str]:
        """What the template writes behind an end-of-turn token, and for messages that follow a turn of the model.

        Found by difference: the same conversation with and without them. Raises ConfigError for a template that rewrites
        earlier turns, because rows that only grow cannot follow it.
        """
        earlier = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]
        before = self._render(json.dumps(earlier), "null", False)
        after = self._render(json.dumps(earlier + json.loads(messages_json)), "null", True)
        if not after.startswith(before) or self.end_of_turn not in before:
            raise ConfigError(
                "this chat template changes earlier turns when messages follow; agents need one that only appends"
            )
        return before.rpartition(self.end_of_turn)[2], after.removeprefix(before)
