"""What a tool may return: how it is read, and what is refused before it reaches the model, the token row or a file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from traceback import TracebackException
from typing import Any

from megatron_agent.data.images import IMAGE_MARKER, ImageStore, content_items
from megatron_agent.envs.functional import printable
from megatron_agent.errors import EnvError
from megatron_agent.types import ImageRef, Message, ToolCall

MAX_TEXT_CHARS = 1_000_000  # of one observation; no context holds more, and tokenising it would stop the event loop


@dataclass
class Observation:
    """What the model is shown after a tool call: messages with one `{"type": "image"}` item per picture, in order."""

    messages: list[Message] = field(default_factory=list)
    images: list[ImageRef] = field(default_factory=list)
    text: str = ""  # for logs and the viewer


@dataclass(frozen=True)
class StepResult:
    """`rendered_text` is set where a tool rendered its observation itself: raw text with chat-template tokens, to be
    tokenised to the letter, with one `<image>` per picture of `observation.images`; `observation.messages` is then empty.
    """

    observation: Observation | None
    rendered_text: str | None
    reward: float
    done: bool
    tool_calls: tuple[ToolCall, ...] = ()  # what was carried out, in order


def failed_step(name: str, error: Exception, role: str = "tool") -> StepResult:
    """The error as a message to the model, and as a ToolCall that is counted."""
    words = str(TracebackException(type(error), error, None))  # an error whose own str() fails has some too
    reason = printable(words or type(error).__name__)
    text = f"Error: {reason}"
    observation = Observation([{"role": role, "content": text}], [], text)
    return StepResult(observation, None, 0.0, False, (ToolCall(printable(str(name)), False, reason),))


def sound(call: ToolCall) -> ToolCall:
    """The call with its texts fit to be shown. Raises EnvError for one that others could not read."""
    for box in (call.box_px, call.shown_box_px):
        if box is not None and (len(box) != 4 or not all(isinstance(side, (int, float)) for side in box)):
            raise EnvError(f"the tool returned a ToolCall with the box {box!r:.100}; allowed: (left, top, right, bottom)")
    return replace(call, name=printable(str(call.name)), ok=bool(call.ok), error=printable(str(call.error)))


def from_chat(chat: Any, images: list[ImageRef]) -> Observation:
    messages: list[Message] = []
    for message in chat:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise EnvError(f"the tool returned a chat message without a role: {message!r:.100}")
        content = message.get("content")
        if isinstance(content, str) and IMAGE_MARKER in content:
            content = content_items(content)
        elif isinstance(content, list):
            content = [_content_item(item) for item in content]
        elif not isinstance(content, str):
            raise EnvError(f"the tool returned a chat message without content: {message!r:.100}")
        messages.append({"role": message["role"], "content": content})
    return Observation(messages, images, "\n".join(_shown_text(message) for message in messages))


def _content_item(item: Any) -> dict[str, str]:
    if isinstance(item, dict) and item.get("type") == "image":
        return {"type": "image"}
    if isinstance(item, dict) and item.get("type") == "text" and isinstance(item.get("text"), str):
        return {"type": "text", "text": item["text"]}
    raise EnvError(f"the tool returned a chat message with {item!r:.100}; allowed: text items and image items")


def _shown_text(message: Message) -> str:
    content = message["content"]
    if not isinstance(content, list):
        return str(content)
    return "".join(IMAGE_MARKER if item["type"] == "image" else item["text"] for item in content)


def checked(observation: Observation, rendered_text: str | None, store: ImageStore) -> tuple[Observation, str | None]:
    """Text that can be tokenised and written, pictures that are there, each with its place. Raises EnvError."""
    if rendered_text is not None:
        num_places = rendered_text.count(IMAGE_MARKER)
    else:
        contents = [message["content"] for message in observation.messages]
        num_places = sum(item["type"] == "image" for items in contents if isinstance(items, list) for item in items)
    if num_places != len(observation.images):
        raise EnvError(f"the tool returned {len(observation.images)} pictures and {num_places} places for them")
    for ref in observation.images:
        if not isinstance(ref, ImageRef) or ref.source not in store:
            raise EnvError(f"the tool returned a picture that is not in the image store: {ref!r:.100}")
    text = json.dumps([observation.messages, observation.text, rendered_text], ensure_ascii=False)
    if len(text) > MAX_TEXT_CHARS:
        raise EnvError(f"the tool returned a text of {len(text)} characters; at most {MAX_TEXT_CHARS}")
    text.encode()  # a lone surrogate is a UnicodeEncodeError, and would be one wherever the text goes
    return observation, rendered_text
