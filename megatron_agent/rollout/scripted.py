"""A policy that says what a script says: the supervised warm start walks through the same loop, tools and masks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_agent.errors import DataError
from megatron_agent.rollout.generation import Generation, Sampling
from megatron_agent.types import ImageRef, Status, Task, Trajectory

if TYPE_CHECKING:
    from megatron_agent.models.renderer import ChatRenderer
    from megatron_agent.rollout.agent_loop import Generate


def scripted_generate(task: Task, renderer: ChatRenderer) -> Generate:
    """One string of the task's script per turn, ended as the model's turns end: by a stop string that the text ends with,
    otherwise by the end-of-turn token; log-probs are 0.

    A turn that asks for more than its token budget comes back cut, as the model's would. Raises DataError when the
    episode outlasts the script.
    """
    turns = iter(task.script)

    async def generate(row: list[int], images: list[ImageRef], sampling: Sampling, /) -> Generation:
        text = next(turns, None)
        if text is None:
            raise DataError(
                f"script of {task.task_id}: it has {len(task.script)} turns and its episode goes on; its last turn must answer"
            )
        whole = renderer.encode(text)
        if not text.endswith(sampling.stop):
            whole.append(renderer.end_of_turn_id)
        token_ids = whole[: sampling.max_tokens]
        reason = "stop" if len(token_ids) == len(whole) else "length"
        return Generation(token_ids, [0.0] * len(token_ids), [0] * len(token_ids), reason)

    return generate


WHY = {
    Status.MAX_TURNS: "it has more turns than agent.max_turns allows",
    Status.CONTEXT_FULL: "it does not fit rollout.max_model_len or agent.max_vllm_images",
    Status.LENGTH: "a turn is longer than agent.single_response_max_tokens",
    Status.EMITTED_PLACEHOLDER: "it writes a picture token, which only the framework may",
    Status.ABORTED: "its tool could not start",
}


def check_scripted(trajectory: Trajectory) -> None:
    """Raises DataError, naming the task, unless the whole script was said, every tool call worked and the end is an answer."""
    task, calls = trajectory.task, trajectory.tool_calls
    failed = next((call for call in calls if not call.ok), None)
    if failed is not None:
        raise DataError(f"script of {task.task_id}: the call of {failed.name} failed: {failed.error}")
    if trajectory.status is not Status.ANSWERED:
        raise DataError(f"script of {task.task_id}: ended as {trajectory.status.value}: {WHY[trajectory.status]}")
    if len(trajectory.turns) != len(task.script):
        raise DataError(
            f"script of {task.task_id}: {len(trajectory.turns)} of its {len(task.script)} turns were said; only the last turn "
            f"may answer, and a task without {'a tool' if not task.env_name else 'a call'} ends with its first turn"
        )
