"""The contract of a tool environment, and the session that keeps an episode safe from what a tool may do."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

from PIL import Image

from megatron_agent import registry
from megatron_agent.data.images import IMAGE_MARKER, ImageStore, PixelLimits, content_items
from megatron_agent.envs.functional import bind, last_tagged, parse_call, printable, tool_schema
from megatron_agent.errors import ConfigError, DataError, EnvError
from megatron_agent.types import ImageRef, Message, Task, ToolCall

logger = logging.getLogger(__name__)
VISION_PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
F = TypeVar("F", bound=Callable[..., Any])


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
    tool_call: ToolCall | None


class ToolBase:
    """The published contract of a DeepEyes tool; one object serves one episode at a time.

    `execute` returns (observation, reward, done, info). An observation is an `Observation`; a text, tokenised to the letter;
    a chat list; or a dict with `prompt` (text) or `chat` (list), and `multi_modal_data` {"image": [PIL picture]}.
    """

    name: str = ""
    runs_inline: ClassVar[bool] = False  # never waits, takes a few ms at most: called on the event loop, without deadline
    stop: ClassVar[tuple[str, ...]] = ()  # strings that end a turn in this env, beside `agent.custom_stop`
    workers: ClassVar[str] = "thread"  # where calls run: "thread", or "process" (then the tool must pickle between calls)
    config: Any

    @dataclass
    class Config:
        """Options of the tool in the run's `env:` section."""

    def __init__(self, _name: object = None, _desc: object = None, _params: object = None, **kwargs: Any) -> None:
        self.config = kwargs.get("config") or type(self).Config()

    def reset(self, raw_prompt: Any, multi_modal_data: Any, origin_multi_modal_data: Any, **kwargs: Any) -> None:
        """Called once per episode: chat messages, the pictures as shown, the original pictures."""

    def execute(self, action_string: str, **kwargs: Any) -> tuple[Any, float, bool, dict[str, Any]]:
        """Called after every generation with its text."""
        raise NotImplementedError(f"{type(self).__name__} does not define execute")

    def schemas(self) -> list[dict[str, Any]]:
        """OpenAI's function schemas of what the model may call."""
        return []

    def close(self) -> None:
        """Called once at the end of an episode, however it ended."""


def model_function(function: F) -> F:
    """Marks a typed method of a PictureTool as one that the model may call; it returns (Observation, ToolCall)."""
    function.is_model_function = True  # type: ignore[attr-defined]
    return function


class PictureTool(ToolBase):
    """A tool whose functions are typed methods and whose pictures are references.

    `image_refs` are the pictures that the model has seen, the task's first; the session adds those of every observation.
    """

    runs_inline: ClassVar[bool] = True  # a tool that asks a service or computes for long sets it False
    argument_aliases: ClassVar[dict[str, str]] = {}

    def reset(self, raw_prompt: Any, multi_modal_data: Any, origin_multi_modal_data: Any, **kwargs: Any) -> None:
        self.image_refs: list[ImageRef] = kwargs["image_refs"]
        self.store: ImageStore = kwargs["store"]

    def execute(self, action_string: str, **kwargs: Any) -> tuple[Any, float, bool, dict[str, Any]]:
        """An answer, or no tool call at all, ends the episode; otherwise the last call is carried out."""
        call = last_tagged(action_string, "tool_call")
        if call is None or last_tagged(action_string, "answer") is not None:
            return None, 0.0, True, {}
        name = self.name
        try:
            name, arguments = parse_call(call)
            observation, tool_call = self._call(name, arguments)
        except (EnvError, DataError) as error:
            failed = failed_step(name, error)
            return failed.observation, 0.0, False, {"tool_call": failed.tool_call}
        return observation, 0.0, False, {"tool_call": tool_call}

    def functions(self) -> dict[str, Callable[..., tuple[Observation, ToolCall]]]:
        members = {name: getattr(self, name) for name in dir(type(self)) if not name.startswith("_")}
        return {name: member for name, member in members.items() if getattr(member, "is_model_function", False)}

    def schemas(self) -> list[dict[str, Any]]:
        return [tool_schema(function) for function in self.functions().values()]

    def _call(self, name: str, arguments: dict[str, Any]) -> tuple[Observation, ToolCall]:
        functions = self.functions()
        if name not in functions:
            raise EnvError(f"there is no tool {name!r}; there are {', '.join(functions)}")
        arguments = {self.argument_aliases.get(key, key): value for key, value in arguments.items()}
        return functions[name](**bind(functions[name], arguments))


class EnvSession:
    """One tool object for one episode. Nothing that the tool raises or returns leaves `reset` or `step` as an exception.

    `limits` bound the pictures that a tool returns as PIL objects.
    """

    def __init__(self, tool: ToolBase, store: ImageStore, limits: PixelLimits) -> None:
        self.tool, self.store, self.limits = tool, store, limits
        self.image_refs: list[ImageRef] = []
        self._reset_error: Exception | None = None

    def reset(self, task: Task) -> None:
        """Start an episode. A tool that cannot start answers every step with the error."""
        self.image_refs, self._reset_error = list(task.images), None
        try:
            prompt = copy.deepcopy(list(task.messages))
            if isinstance(self.tool, PictureTool):
                self.tool.reset(prompt, {}, {}, image_refs=self.image_refs, store=self.store)
            else:
                shown = {"image": [self.store.picture(ref) for ref in task.images]}
                originals = {"image": [self.store.original(ref.source).copy() for ref in task.images]}
                self.tool.reset(prompt, shown, originals)
        except Exception as error:  # foreign code: see step
            logger.warning("env %s cannot start on %s", self.tool.name, task.task_id, exc_info=True)
            self._reset_error = error

    def step(self, action_text: str) -> StepResult:
        """Carry out what the model wrote. A failing tool gives an error observation and a ToolCall that is not ok."""
        started_s = time.monotonic()
        try:
            if self._reset_error is not None:
                raise self._reset_error
            result = self._step_result(self.tool.execute(action_text))
        except Exception as error:  # the tool is foreign code and may raise anything; the run goes on
            level = logging.DEBUG if isinstance(error, EnvError) else logging.WARNING
            logger.log(level, "env %s failed", self.tool.name, exc_info=True)
            result = failed_step(self.tool.name, error)
        if result.observation is not None:
            self.image_refs += result.observation.images
        if result.tool_call is None:
            return result
        return replace(result, tool_call=replace(result.tool_call, seconds=time.monotonic() - started_s))

    def close(self) -> None:
        """The episode is over; the session takes no further step."""
        try:
            self.tool.close()
        except Exception:  # foreign code: see step
            logger.warning("env %s cannot be closed", self.tool.name, exc_info=True)

    def _step_result(self, returned: Any) -> StepResult:
        if not isinstance(returned, tuple) or len(returned) != 4:
            raise EnvError(f"the tool returned {type(returned).__name__}, not (observation, reward, done, info)")
        raw, reward, done, info = returned
        reward, done, info = float(reward), bool(done), {} if info is None else info
        if not math.isfinite(reward) or not isinstance(info, dict):
            raise EnvError(
                f"the tool returned reward {reward} and info {type(info).__name__}; allowed: a finite number, a dict"
            )
        has_observation = raw is not None and (isinstance(raw, Observation) or bool(raw))
        if done:  # the episode is over: the model will not see what was returned
            return StepResult(None, None, reward, True, self._tool_call(info) if has_observation else None)
        if not has_observation:
            raise EnvError("the tool returned no observation and did not end the episode")
        observation, rendered_text = self._observation(raw)
        return StepResult(observation, rendered_text, reward, False, self._tool_call(info))

    def _tool_call(self, info: dict[str, Any]) -> ToolCall:
        given = info.get("tool_call")
        if isinstance(given, ToolCall):
            return given
        error = str(info.get("error") or "")
        ok = not error and info.get("status") != "failed"
        return ToolCall(str(info.get("tool_used") or self.tool.name), ok, error)

    def _observation(self, raw: Any) -> tuple[Observation, str | None]:
        if isinstance(raw, Observation):
            return _checked(raw, None)
        if isinstance(raw, str):
            return _checked(Observation(text=raw), raw)
        if isinstance(raw, list):
            return _checked(_from_chat(raw, []), None)
        if not isinstance(raw, dict):
            raise EnvError(f"the tool returned an observation of type {type(raw).__name__}; allowed: text, chat list, dict")
        pictures = (raw.get("multi_modal_data") or {}).get("image") or []
        images = [self._image_ref(picture) for picture in pictures]
        if raw.get("prompt"):
            text = str(raw["prompt"]).replace(VISION_PLACEHOLDER, IMAGE_MARKER)
            return _checked(Observation(images=images, text=text), text)
        if raw.get("chat"):
            return _checked(_from_chat(raw["chat"], images), None)
        raise EnvError(f"the tool returned a dict with neither 'prompt' nor 'chat': {', '.join(map(str, raw))}")

    def _image_ref(self, picture: Any) -> ImageRef:
        if isinstance(picture, ImageRef):
            return picture
        if isinstance(picture, Image.Image):
            return self.store.put_picture(picture, self.limits)
        data = picture.get("bytes") if isinstance(picture, dict) else picture
        if not isinstance(data, bytes):
            raise EnvError(f"the tool returned a picture of type {type(picture).__name__}; allowed: PIL pictures, bytes")
        return self.store.put(data, self.limits)


def make_session(env_name: str, configs: dict[str, Any], store: ImageStore, limits: PixelLimits) -> EnvSession | None:
    """The session of a task's `env_name`; None where it is empty. `configs` maps env names to their Config.

    Raises ConfigError: an unknown name, or a tool that cannot be built.
    """
    if not env_name:
        return None
    tool_class = registry.resolve("envs", env_name)
    options = {"config": configs[env_name]} if env_name in configs else {}
    try:
        tool = tool_class(None, None, None, **options)
    except (TypeError, ValueError, OSError, ImportError, RuntimeError) as error:
        raise ConfigError(f"env {env_name!r} cannot be built: {type(error).__name__}: {error}") from error
    return EnvSession(tool, store, limits)


def failed_step(name: str, error: Exception) -> StepResult:
    """The error as a tool message to the model, and as a ToolCall that is counted."""
    reason = printable(str(error) or type(error).__name__)
    text = f"Error: {reason}"
    observation = Observation([{"role": "tool", "content": text}], [], text)
    return StepResult(observation, None, 0.0, False, ToolCall(printable(name), False, reason))


def _from_chat(chat: Any, images: list[ImageRef]) -> Observation:
    messages: list[Message] = []
    for message in chat:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise EnvError(f"the tool returned a chat message without a role: {message!r:.100}")
        content = message.get("content")
        if isinstance(content, str) and IMAGE_MARKER in content:
            content = content_items(content)
        if not isinstance(content, (str, list)):
            raise EnvError(f"the tool returned a chat message without content: {message!r:.100}")
        messages.append({"role": message["role"], "content": content})
    return Observation(messages, images, "\n".join(_shown_text(message) for message in messages))


def _shown_text(message: Message) -> str:
    content = message["content"]
    if not isinstance(content, list):
        return str(content)
    return "".join(IMAGE_MARKER if item["type"] == "image" else str(item.get("text", "")) for item in content)


def _checked(observation: Observation, rendered_text: str | None) -> tuple[Observation, str | None]:
    """Every picture must have its place in the text: the token row is built from it. Raises EnvError."""
    if rendered_text is not None:
        num_places = rendered_text.count(IMAGE_MARKER)
    else:
        contents = [message["content"] for message in observation.messages]
        num_places = sum(item["type"] == "image" for content in contents if isinstance(content, list) for item in content)
    if num_places != len(observation.images):
        raise EnvError(f"the tool returned {len(observation.images)} pictures and {num_places} places for them")
    return observation, rendered_text
