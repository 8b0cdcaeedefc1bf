"""One episode, token in and token out: the model writes, its tool acts, the observation is appended, until it ends.

The row only ever grows, by the ids that were generated and by the ids of observations. Nothing generated is turned into
text and back, so the trainer gets the very tokens and pictures that vLLM was conditioned on.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from megatron_agent.errors import ConfigError, DataError, EnvError, RequestLostError
from megatron_agent.rollout.generation import Generation, Sampling
from megatron_agent.rollout.tool_calls import ToolDeadlineError, ToolRunner
from megatron_agent.types import ImageRef, LossUse, Message, Status, Task, ToolCall, Trajectory, Turn

if TYPE_CHECKING:
    from megatron_agent.envs.base import EnvSession, StepResult
    from megatron_agent.models.renderer import ChatRenderer

logger = logging.getLogger(__name__)

MIN_TURN_TOKENS = 4  # a turn with less room than this cannot say anything
TURN_SEED_STRIDE = 1_000_003
TOOL_CALL_END = "</tool_call>"
NEVER_SCORED = (Status.ENGINE_LOST, Status.UNSCORED)


class Generate(Protocol):
    """(row, images, sampling) -> one turn; an engine, the pool, or a script."""

    def __call__(self, row: list[int], images: list[ImageRef], sampling: Sampling, /) -> Awaitable[Generation]: ...


@dataclass
class AgentConfig:
    """How an episode goes; the names are DeepEyes', so its configurations read here.

    `tool_name_key` is the dataset column that names the tool, `tool_meta_key` the column with what the tool is told.
    `concurrent_workers` bounds the tools that run at once, `tool_timeout_s` each of their calls once it runs.
    Strings of `custom_stop`, those that the tool declares and, with `stop_after_tool_call`, "</tool_call>" end a turn.
    `on_status` says what the ends of trajectories mean to the loss, {length: mask, context_full: penalise, ...}: keep, mask,
    penalise or drop (types.LossUse); an end that is not named keeps its trajectory. What has no reward is always dropped.
    """

    activate_agent: bool = True
    single_response_max_tokens: int = 512
    max_turns: int = 5
    concurrent_workers: int = 4
    tool_name_key: str = "env_name"
    tool_meta_key: str = "extra_info"
    custom_stop: list[str] = field(default_factory=list)
    stop_after_tool_call: bool = False
    show_tqdm: bool = False
    vl_model_path: str = ""  # where the tokenizer is; empty: model.path
    max_vllm_images: int = 8
    max_vllm_videos: int = 0
    tool_timeout_s: float = 30.0
    on_status: dict[str, str] = field(default_factory=dict)
    status_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("single_response_max_tokens", "max_turns", "concurrent_workers", "max_vllm_images"):
            if getattr(self, name) < 1:
                raise ConfigError(f"agent.{name}={getattr(self, name)} must be 1 or more")
        if self.max_vllm_videos != 0:
            raise ConfigError(f"agent.max_vllm_videos={self.max_vllm_videos}: videos are not supported; leave it at 0")
        if self.tool_timeout_s <= 0:
            raise ConfigError(f"agent.tool_timeout_s={self.tool_timeout_s} must be above 0 seconds")
        if not self.tool_name_key:
            raise ConfigError("agent.tool_name_key is empty; name the dataset column that holds the tool's name")
        if any(not stop for stop in self.custom_stop):
            raise ConfigError("agent.custom_stop holds an empty string, which would end every turn at once")
        if not 0 <= self.status_penalty < math.inf:
            raise ConfigError(f"agent.status_penalty={self.status_penalty} must be 0 or more: it is taken off the reward")
        for status, use in self.on_status.items():
            self._check_end(status, use)

    def _check_end(self, status: str, use: str) -> None:
        where = f"agent.on_status.{status}"
        if status not in {known.value for known in Status}:
            raise ConfigError(f"{where}: there is no such end; there are {', '.join(known.value for known in Status)}")
        if use not in {known.value for known in LossUse}:
            raise ConfigError(f"{where}={use!r}; allowed: {', '.join(known.value for known in LossUse)}")
        if Status(status) in NEVER_SCORED and use != LossUse.DROP:
            raise ConfigError(f"{where}={use!r}: such a trajectory has no reward; it can only be dropped")

    def loss_use(self, status: Status) -> LossUse:
        return LossUse.DROP if status in NEVER_SCORED else LossUse(self.on_status.get(status.value, LossUse.KEEP))


async def run_episode(
    task: Task,
    sample_index: int,
    generate: Generate,
    renderer: ChatRenderer,
    env_factory: Callable[[Task], EnvSession | None],
    agent: AgentConfig,
    sampling: Sampling,
    max_model_len: int,
    tools: ToolRunner,
) -> Trajectory:
    """One rollout of `task`; it always comes back with a typed status, whatever the model or its tool does.

    waits for: `generate` (an engine), the tool (a place in `tools`, then at most its deadline).
    unblocked by: the end of the turn, the tool's answer or its deadline.
    produces: a Trajectory without reward; without turns where the prompt leaves no room (CONTEXT_FULL) or the tool cannot
    start (ABORTED). `max_tokens`, `stop` and the turn's own seed are set in `sampling` here.
    Raises DataError for a task whose pictures and messages do not match, EngineError when no engine is left.
    """
    episode = _Episode(task, sample_index, generate, renderer, agent, sampling, max_model_len, tools)
    return await episode.run(env_factory)


@dataclass
class _Episode:
    """The state of one episode: the row so far and its pictures."""

    task: Task
    sample_index: int
    generate: Generate
    renderer: ChatRenderer
    agent: AgentConfig
    sampling: Sampling
    max_model_len: int
    tools: ToolRunner

    async def run(self, env_factory: Callable[[Task], EnvSession | None]) -> Trajectory:
        start_s = time.perf_counter()
        prompt = self.renderer.prompt(self.task.messages, self.task.images)
        trajectory = Trajectory(self.task, self.sample_index, list(prompt))
        self.row, self.images = prompt, list(self.task.images)
        session = env_factory(self.task) if self.agent.activate_agent and self.task.env_name else None
        self.stop = self._stop_strings(session)
        try:
            if session is None or await self._can_start(session):
                trajectory.status = await self._turns(trajectory, session)
            else:
                trajectory.status = Status.ABORTED
        finally:  # a cancelled episode closes its tool too
            if session is not None:
                await self._close(session)
        trajectory.seconds = time.perf_counter() - start_s
        return trajectory

    async def _can_start(self, session: EnvSession) -> bool:
        try:
            await self.tools.call(session, session.reset, self.task)
        except Exception as error:  # noqa: BLE001 - foreign code; without its tool the episode is worth nothing
            logger.warning("task %s: env %s did not start: %r", self.task.task_id, self.task.env_name, error)
            return False
        return True

    async def _close(self, session: EnvSession) -> None:
        from megatron_agent.envs.base import ToolBase

        if type(session.tool).close is ToolBase.close:  # nothing to do, and so nothing to wait for a place for
            return
        try:
            await self.tools.call(session, session.close)
        except EnvError as error:
            logger.warning("task %s: env %s was not closed: %s", self.task.task_id, self.task.env_name, error)

    def _stop_strings(self, session: EnvSession | None) -> tuple[str, ...]:
        of_tool = session.tool.stop if session is not None else ()
        of_call = (TOOL_CALL_END,) if session is not None and self.agent.stop_after_tool_call else ()
        return tuple(dict.fromkeys([*self.agent.custom_stop, *of_call, *of_tool]))

    async def _turns(self, trajectory: Trajectory, session: EnvSession | None) -> Status:
        last_turn = self.agent.max_turns - 1 if session is not None else 0
        for turn_index in range(last_turn + 1):
            room_tokens = self.max_model_len - len(self.row)
            if room_tokens < MIN_TURN_TOKENS or len(self.images) > self.agent.max_vllm_images:
                return Status.CONTEXT_FULL
            max_tokens = min(self.agent.single_response_max_tokens, room_tokens)
            sampling = self._sampling_of(turn_index, max_tokens)
            try:
                generation = await self.generate(self.row, self.images, sampling)
            except RequestLostError as error:
                logger.error("task %s, sample %d: %s", self.task.task_id, self.sample_index, error)
                return Status.ENGINE_LOST
            turn, ended = self._turn_of(generation)
            trajectory.turns.append(turn)
            self.row = self.row + turn.token_ids  # a new list: the engine may still hold the old one
            if ended is Status.LENGTH and max_tokens == room_tokens < self.agent.single_response_max_tokens:
                return Status.CONTEXT_FULL
            if ended is not None:
                return ended
            if session is None:
                return Status.ANSWERED
            result = await self._step(session, turn.text)
            turn.tool_reward, turn.tool_calls = result.reward, list(result.tool_calls)
            if result.done:
                return Status.ANSWERED
            if turn_index == last_turn:
                return Status.MAX_TURNS
            if not self._observe(turn, result, session.tool.answer_role):
                return Status.CONTEXT_FULL
        raise AssertionError("unreachable: the last turn always returns")

    def _sampling_of(self, turn_index: int, max_tokens: int) -> Sampling:
        # One seed for all turns would draw the same random numbers in each of them.
        seed = self.sampling.seed
        seed = None if seed is None else (seed + turn_index * TURN_SEED_STRIDE) % 2**31
        return replace(self.sampling, max_tokens=max_tokens, stop=self.stop, seed=seed)

    def _turn_of(self, generation: Generation) -> tuple[Turn, Status | None]:
        """The turn, and how the episode ends with it if it does.

        A placeholder that the model wrote is cut off with all behind it: the row has no picture for it, so neither vLLM
        nor the trainer could read on.
        """
        token_ids, stop_reason, ended = list(generation.token_ids), generation.stop_reason, None
        if stop_reason == "aborted":
            ended = Status.ABORTED
        elif stop_reason == "length":
            ended = Status.LENGTH
        forbidden = self.renderer.forbidden_ids
        cut = next((index for index, token_id in enumerate(token_ids) if token_id in forbidden), None)
        if cut is not None:
            del token_ids[cut:]
            ended, stop_reason = Status.EMITTED_PLACEHOLDER, "placeholder"
        kept = len(token_ids)
        logprobs, versions = generation.logprobs[:kept], generation.weight_versions[:kept]
        return Turn(token_ids, logprobs, versions, self._text_of(token_ids), stop_reason), ended

    def _text_of(self, token_ids: list[int]) -> str:
        """With the special tokens that the model wrote, such as a forged turn of the user: rewards look for them."""
        ended = bool(token_ids) and token_ids[-1] in self.renderer.stop_token_ids
        return self.renderer.decode(token_ids[:-1] if ended else token_ids, special_tokens=True)

    async def _step(self, session: EnvSession, action_text: str) -> StepResult:
        """The session turns whatever the tool does into a result; only a call that does not come back is seen to here."""
        from megatron_agent.envs.base import failed_step

        try:
            return await self.tools.call(session, _step_seeing, session, self.images, action_text)
        except EnvError as error:
            failed = failed_step(self.task.env_name, error, session.tool.answer_role)
            seconds = self.tools.timeout_s if isinstance(error, ToolDeadlineError) else 0.0
        (call,) = failed.tool_calls
        return replace(failed, tool_calls=(replace(call, seconds=seconds),))

    def _observe(self, turn: Turn, result: StepResult, answer_role: str) -> bool:
        """Append the observation to the row; False when it does not fit (then nothing is appended)."""
        if result.observation is None:
            return True
        images, text = list(result.observation.images), result.observation.text
        try:
            token_ids = self._observation_ids(turn, result, images)
        except DataError as error:
            # The tool echoed what only the framework may write (a forged picture token); the model is told so.
            images, text = [], "Error: the tool's answer holds tokens that stand for pictures and cannot be shown"
            message: Message = {"role": answer_role, "content": text}
            token_ids = self.renderer.observation([message], [], self._ended_by_eos(turn))
            calls = turn.tool_calls or [ToolCall(name=self.task.env_name, ok=False)]
            turn.tool_calls = [replace(call, ok=False, error=str(error)) for call in calls]
        full = len(self.row) + len(token_ids) + MIN_TURN_TOKENS > self.max_model_len
        if full or len(self.images) + len(images) > self.agent.max_vllm_images:
            return False
        turn.observation_token_ids, turn.observation_images, turn.observation_text = token_ids, images, text
        self.row = self.row + token_ids
        self.images = [*self.images, *images]
        return True

    def _observation_ids(self, turn: Turn, result: StepResult, images: Sequence[ImageRef]) -> list[int]:
        if result.rendered_text is not None:
            return self.renderer.verbatim(result.rendered_text, images)
        assert result.observation is not None
        return self.renderer.observation(result.observation.messages, images, self._ended_by_eos(turn))

    def _ended_by_eos(self, turn: Turn) -> bool:
        return bool(turn.token_ids) and turn.token_ids[-1] == self.renderer.end_of_turn_id


def _step_seeing(session: EnvSession, images: list[ImageRef], action_text: str) -> StepResult:
    """A late or unshown answer may have left pictures that the model never saw; the tool counts only those of `images`."""
    session.image_refs[:] = images
    return session.step(action_text)
