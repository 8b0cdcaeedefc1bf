"""One row of a dataset -> one Task. Every method raises DataError with the reason alone; the caller adds file and row."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_agent.data.images import IMAGE_MARKER, ImageStore, content_items
from megatron_agent.errors import DataError
from megatron_agent.types import ImageRef, Message, Task

if TYPE_CHECKING:
    from megatron_agent.data.dataset import DataConfig

META_KEY = "extra_info"


class TaskReader:
    """Rows in DeepEyes' columns -> Tasks; their pictures go into `store`. Threads may share a reader.

    `meta_key` is the column whose struct becomes `Task.extra_info`; only the default one may be absent.
    """

    def __init__(self, config: DataConfig, store: ImageStore, env_key: str, require_script: bool, meta_key: str) -> None:
        self.config, self.store, self.env_key, self.require_script = config, store, env_key, require_script
        self.meta_key = meta_key
        self.limits = config.pixel_limits()

    def required_columns(self) -> list[str]:
        names = ["data_source", self.config.prompt_key, self.config.image_key, self.env_key, "reward_model"]
        if self.meta_key != META_KEY:
            names.append(self.meta_key)
        return [name for name in [*names, *(["script"] if self.require_script else [])] if name]

    def columns(self) -> list[str]:
        return list(dict.fromkeys([*self.required_columns(), *([self.meta_key] if self.meta_key else []), "script"]))

    def task(self, row: Mapping[str, object], task_id: str, folder: Path) -> Task:
        """`folder` is where relative paths of pictures start."""
        pictures = (row.get(self.config.image_key) or []) if self.config.image_key else []
        if not isinstance(pictures, list):
            raise DataError(f"the column {self.config.image_key} must hold a list of pictures, not a {type(pictures).__name__}")
        messages = _messages(row[self.config.prompt_key], len(pictures))
        ground_truth = _ground_truth(row["reward_model"])
        extra_info = row.get(self.meta_key) or {}
        if not isinstance(extra_info, dict):
            raise DataError(f"{self.meta_key} is a {type(extra_info).__name__}, not a mapping")
        return Task(
            task_id=task_id,
            data_source=str(row["data_source"] or ""),
            messages=messages,
            images=tuple(self._image(picture, index, folder) for index, picture in enumerate(pictures)),
            env_name=str(row[self.env_key] or ""),
            ground_truth=ground_truth,
            question=str(extra_info.get("question") or _last_user_text(messages)),
            extra_info=extra_info,
            script=self._script(row),
        )

    def _image(self, picture: object, index: int, folder: Path) -> ImageRef:
        try:
            return self.store.put(_picture_bytes(picture, folder), self.limits)
        except DataError as error:
            raise DataError(f"picture {index}: {error}") from error

    def _script(self, row: Mapping[str, object]) -> tuple[str, ...]:
        script = row.get("script") or []
        if self.require_script and not script:
            raise DataError("the script is empty; a supervised row needs the assistant's turns")
        if not isinstance(script, list) or not all(isinstance(turn, str) for turn in script):
            raise DataError("the script must be a list of texts")
        return tuple(script)


def _picture_bytes(picture: object, folder: Path) -> bytes:
    """Of bytes, base64 (a data: URL, or the `bytes` of a JSON row), a path, or a mapping with `bytes` or `path`."""
    if isinstance(picture, dict):
        data = picture.get("bytes")
        if isinstance(data, str):
            return _from_base64(data)
        picture = data or picture.get("path")
    if isinstance(picture, bytes):
        return picture
    if not picture or not isinstance(picture, str):
        raise DataError("it has neither bytes nor a path")
    if picture.startswith("data:"):
        return _from_base64(picture)
    try:
        return (folder / picture).read_bytes()  # an absolute path replaces the folder
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {picture!r:.200} (looked for it in {folder}): {error}") from error


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text.rpartition(",")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"its bytes are not base64 ({text[:20]!r}...): {error}") from error


def _messages(prompt: object, num_pictures: int) -> tuple[Message, ...]:
    """Chat messages in which the user's `<image>` markers are items; pictures without any marker come first."""
    if not isinstance(prompt, list) or not prompt:
        raise DataError("the prompt is empty")
    for message in prompt:
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or not isinstance(message.get("content"), str)
        ):
            raise DataError(f"the prompt must be a list of messages with a role and a text as content, got {message!r:.100}")
    user = [index for index, message in enumerate(prompt) if message["role"] == "user"]
    if not user or not any(prompt[index]["content"].replace(IMAGE_MARKER, "").strip() for index in user):
        raise DataError("the prompt has no text of the user")
    num_markers = sum(prompt[index]["content"].count(IMAGE_MARKER) for index in user)
    if num_markers not in (0, num_pictures):
        raise DataError(f"{num_markers} {IMAGE_MARKER} markers in the user's text, {num_pictures} pictures in the row")
    first = IMAGE_MARKER * (num_pictures - num_markers)
    messages: list[Message] = []
    for index, message in enumerate(prompt):
        text = (first if index == user[0] else "") + message["content"]
        with_pictures = message["role"] == "user" and IMAGE_MARKER in text
        messages.append({"role": message["role"], "content": content_items(text) if with_pictures else text})
    return tuple(messages)


def _ground_truth(reward_model: object) -> str:
    truth = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
    if isinstance(truth, (int, float)):
        truth = str(truth)
    if not isinstance(truth, str) or not truth.strip():
        raise DataError(f"no ground truth: reward_model.ground_truth is {truth!r:.80}")
    return truth


def _last_user_text(messages: tuple[Message, ...]) -> str:
    content = next(message["content"] for message in reversed(messages) if message["role"] == "user")
    if isinstance(content, list):
        content = "".join(item.get("text", "") for item in content)
    return str(content).strip()
