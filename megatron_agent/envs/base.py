"""The contract of a tool environment, and the session that keeps an episode safe from what a tool may do."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from PIL import Image

from megatron_agent import registry
from megatron_agent.data.images import IMAGE_MARKER, ImageStore, PixelLimits
from megatron_agent.envs.functional import between, bind, last_tagged, parse_call, printable, tool_schema
from megatron_agent.envs.observation import Observation, StepResult, checked, failed_step, from_chat, sound
from megatron_agent.errors import ConfigError, DataError, EnvError
from megatron_agent.types import ImageRef, Task, ToolCall

logger = logging.getLogger(__name__)
VISION_PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
F = TypeVar("F", bound=Callable[..., Any])


class ToolBase:
    """The published contract of a DeepEyes tool; one object serves one episode at a time.

    `execute` returns (observation, reward, done, info). An observation is an `Observation`; a text, tokenised to the letter;
    a chat list; or a dict with `prompt` (text) or `chat` (list), and `multi_modal_data` {"image": [PIL picture]}.
    """

    name: str = ""
    runs_inline: ClassVar[bool] = False  # never waits, takes a few ms at most: called on the event loop, without deadline
    stop: ClassVar[tuple[str, ...]] = ()  # strings that end a turn in this env, beside `agent.custom_stop`
    answer_role: ClassVar[str] = "tool"  # of the messages that answer a call, errors too
    workers: ClassVar[str] = "thread"  # where calls run: "thread", or "process" (then the tool must pickle between calls)
    config: Any

    @dataclass
    class Config:
        """Options of the tool in the run's `env:` section."""

    def __init__(self, name: Any = None, description: Any = None, parameters: Any = None, **kwargs: Any) -> None:
        self.name = name or type(self).name
        self.description, self.parameters = description or "", parameters or {}
        self.config = kwargs.get("config") or type(self).Config()

    def reset(self, raw_prompt: Any, multi_modal_data: Any, origin_multi_modal_data: Any, **kwargs: Any) -> None:
        """Called once per episode: chat messages, the pictures as shown, the original pictures.

        `kwargs["extra_info"]` is what the dataset's row says beside them (`agent.tool_meta_key`).
        """

    def execute(self, action_string: str, **kwargs: Any) -> tuple[Any, float, bool, dict[str, Any]]:
        """Called after every generation with its text."""
        raise NotImplementedError(f"{type(self).__name__} does not define execute")

    def schemas(self) -> list[dict[str, Any]]:
        """OpenAI's function schemas of what the model may call: here the one that was given as `parameters`."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return [{"type": "function", "function": function}] if self.parameters else []

    def close(self) -> None:
        """Called once at the end of an episode, however it ended."""


def extract_tool_call_contents(start_token: str, end_token: str, text: str) -> list[str]:
    """The helper that DeepEyes' tools import together with ToolBase: what stands between each pair of tokens."""
    return between(text, start_token, end_token)


def model_function(function: F) -> F:
    """Marks a typed method of a PictureTool as one that the model may call; it returns (Observation, ToolCall)."""
    function.is_model_function = True  # type: ignore[attr-defined]
    return function


class PictureTool(ToolBase):
    """A tool whose functions are typed methods and whose pictures are references.

    `image_refs` are the pictures that the model has seen, the task's first; the session adds those of every observation.
    How a call is written, and which of a turn's calls are carried out, is what a class may choose: see `parse`, `carry_out`.
    """

    runs_inline: ClassVar[bool] = True  # a tool that asks a service or computes for long sets it False
    argument_aliases: ClassVar[dict[str, str]] = {}
    call_tags: ClassVar[tuple[str, str]] = ("<tool_call>", "</tool_call>")
    ends_without_call: ClassVar[bool] = True  # False: the model is told to call or to answer, and the episode goes on

    def reset(self, raw_prompt: Any, multi_modal_data: Any, origin_multi_modal_data: Any, **kwargs: Any) -> None:
        self.image_refs: list[ImageRef] = kwargs["image_refs"]
        self.store: ImageStore = kwargs["store"]

    def execute(self, action_string: str, **kwargs: Any) -> tuple[Any, float, bool, dict[str, Any]]:
        """An answer, or no tool call at all, ends the episode; otherwise calls are carried out."""
        calls = between(action_string, *self.call_tags)
        if last_tagged(action_string, "answer") is not None or (not calls and self.ends_without_call):
            return None, 0.0, True, {}
        no_call = EnvError(f"there is neither a call in {''.join(self.call_tags)} nor an answer in <answer></answer>")
        done = self.carry_out(calls) if calls else [self.failed(self.name, no_call)]
        observation = Observation(
            [message for answer, _ in done for message in answer.messages],
            [ref for answer, _ in done for ref in answer.images],
            "\n".join(answer.text for answer, _ in done),
        )
        return observation, 0.0, False, {"tool_calls": [call for _, call in done]}

    def carry_out(self, calls: Sequence[str]) -> list[tuple[Observation, ToolCall]]:
        """The calls of one turn, at least one, as the model wrote them; the last one counts. See `call`."""
        return [self.call(calls[-1])]

    def call(self, text: str) -> tuple[Observation, ToolCall]:
        """One call as the model wrote it; what is wrong with it becomes the answer."""
        name = self.name
        try:
            name, arguments = self.parse(text)
            return self._call(name, arguments)
        except (EnvError, DataError) as error:
            return self.failed(name, error)

    def parse(self, call: str) -> tuple[str, dict[str, Any]]:
        """A call as the model wrote it -> (function, arguments). Raises EnvError."""
        return parse_call(call)

    def failed(self, name: str, error: Exception) -> tuple[Observation, ToolCall]:
        step = failed_step(name, error, self.answer_role)
        assert step.observation is not None
        return step.observation, step.tool_calls[0]

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
            prompt, meta = copy.deepcopy(list(task.messages)), copy.deepcopy(task.extra_info)
            if isinstance(self.tool, PictureTool):
                self.tool.reset(prompt, {}, {}, image_refs=self.image_refs, store=self.store, extra_info=meta)
            else:
                shown = {"image": [self.store.picture(ref) for ref in task.images]}
                originals = {"image": [self.store.original(ref.source).copy() for ref in task.images]}
                # By name, and nothing more than is asked for: so DeepEyes calls it, and some tools count on either.
                more = {"extra_info": meta} if _takes(self.tool.reset, "extra_info") else {}
                self.tool.reset(raw_prompt=prompt, multi_modal_data=shown, origin_multi_modal_data=originals, **more)
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
            result = failed_step(self.tool.name, error, self.tool.answer_role)
        if result.observation is not None:
            self.image_refs += result.observation.images
        share_s = (time.monotonic() - started_s) / max(len(result.tool_calls), 1)
        calls = tuple(replace(call, seconds=share_s) for call in result.tool_calls)
        return replace(result, tool_calls=calls)

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
            return StepResult(None, None, reward, True, self._tool_calls(info) if has_observation else ())
        if not has_observation:
            raise EnvError("the tool returned no observation and did not end the episode")
        observation, rendered_text = self._observation(raw)
        return StepResult(observation, rendered_text, reward, False, self._tool_calls(info))

    def _tool_calls(self, info: dict[str, Any]) -> tuple[ToolCall, ...]:
        given = info.get("tool_calls") or (info.get("tool_call"),)
        if isinstance(given, (list, tuple)) and all(isinstance(call, ToolCall) for call in given):
            return tuple(sound(call) for call in given)
        error = printable(str(info.get("error") or ""))
        ok = not error and info.get("status") != "failed"
        return (ToolCall(printable(str(info.get("tool_used") or self.tool.name)), ok, error),)

    def _observation(self, raw: Any) -> tuple[Observation, str | None]:
        if isinstance(raw, Observation):
            return checked(replace(from_chat(raw.messages, list(raw.images)), text=raw.text), None, self.store)
        if isinstance(raw, str):
            return checked(Observation(text=raw), raw, self.store)
        if isinstance(raw, list):
            return checked(from_chat(raw, []), None, self.store)
        if not isinstance(raw, dict):
            raise EnvError(f"the tool returned an observation of type {type(raw).__name__}; allowed: text, chat list, dict")
        pictures = (raw.get("multi_modal_data") or {}).get("image") or []
        images = [self._image_ref(picture) for picture in pictures]
        if raw.get("prompt"):
            text = str(raw["prompt"]).replace(VISION_PLACEHOLDER, IMAGE_MARKER)
            return checked(Observation(images=images, text=text), text, self.store)
        if raw.get("chat"):
            return checked(from_chat(raw["chat"], images), None, self.store)
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


def _takes(function: Callable[..., Any], keyword: str) -> bool:
    parameters = inspect.signature(function).parameters
    return keyword in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


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
    if not isinstance(tool, ToolBase):
        raise ConfigError(f"env {env_name!r} is a {type(tool).__name__}; an env is a class that inherits ToolBase")
    return EnvSession(tool, store, limits)
