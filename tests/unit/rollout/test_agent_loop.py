"""Episodes driven by scripted turns and a scripted tool: every way to end, and the row that is left behind.

Not covered: vLLM (tests/integration/test_engine.py) and the tools themselves (tests/contracts).
"""

import asyncio
import time
from dataclasses import replace

import pytest

from megatron_agent.envs.base import Observation, StepResult, ToolBase
from megatron_agent.errors import ConfigError, DataError, RequestLostError
from megatron_agent.rollout.agent_loop import AgentConfig, run_episode
from megatron_agent.rollout.generation import Generation, Sampling
from megatron_agent.rollout.scripted import check_scripted, scripted_generate
from megatron_agent.rollout.tool_calls import ToolRunner
from megatron_agent.types import ImageRef, Status, Task, ToolCall

PICTURE = ImageRef("original", 84, 56)
CROP = ImageRef("original", 56, 56, crop_box_px=(0, 0, 10, 10))
QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color is it ?"}]}
TASK = Task("t0", "unit", (QUESTION,), (PICTURE,), "scripted_tool", "red", "what color is it ?")


class ToolSession:
    """Shows `images` and `text` after every turn; a turn that says "red" ends the episode."""

    tool = ToolBase()

    def __init__(self, text="zoom", images=(), rendered_text=None, seconds=0.0):
        self.text, self.images, self.rendered_text, self.seconds = text, list(images), rendered_text, seconds
        self.actions, self.image_refs, self.seen, self.num_closed = [], [], [], 0

    def reset(self, task):
        self.image_refs = list(task.images)

    def close(self):
        self.num_closed += 1

    def step(self, action_text):
        self.actions.append(action_text)
        self.seen.append(len(self.image_refs))
        time.sleep(self.seconds)
        if "red" in action_text:
            return StepResult(None, None, 0.5, True)
        content = [{"type": "image"} for _ in self.images] + [{"type": "text", "text": self.text}]
        messages = [] if self.rendered_text else [{"role": "tool", "content": content}]
        observation = Observation(messages, list(self.images), self.text)
        self.image_refs += self.images
        return StepResult(observation, self.rendered_text, 0.25, False, (ToolCall("zoom", True, seconds=0.01),))


def says_in_turn(renderer, *script):
    return scripted_generate(replace(TASK, script=script), renderer)


def play(renderer, script, session=None, task=TASK, max_model_len=2048, sampling=Sampling(), **agent):  # noqa: B008
    async def main():
        generate = script if callable(script) else scripted_generate(replace(task, script=tuple(script)), renderer)
        config = AgentConfig(**agent)
        tools = ToolRunner(config.concurrent_workers, config.tool_timeout_s)
        return await run_episode(task, 3, generate, renderer, lambda _: session, config, sampling, max_model_len, tools)

    return asyncio.run(main())


def says(renderer, token_ids, reason="stop"):
    async def generate(row, images, sampling):
        return Generation(list(token_ids), [-0.5] * len(token_ids), [7] * len(token_ids), reason)

    return generate


def test_row_is_prompt_turns_and_observations(renderer):
    session = ToolSession(images=[CROP])
    trajectory = play(renderer, ["turn on", "red"], session)
    prompt = renderer.prompt([QUESTION], [PICTURE])
    seen = [{"role": "tool", "content": [{"type": "image"}, {"type": "text", "text": "zoom"}]}]
    first, second = trajectory.turns
    assert trajectory.status is Status.ANSWERED
    assert trajectory.prompt_token_ids == prompt
    assert first.token_ids == [*renderer.encode("turn on"), renderer.end_of_turn_id]
    assert first.observation_token_ids == renderer.observation(seen, [CROP], finished_by_eos=True)
    assert second.token_ids == [*renderer.encode("red"), renderer.end_of_turn_id]
    assert second.observation_token_ids == []
    assert trajectory.token_ids == prompt + first.token_ids + first.observation_token_ids + second.token_ids
    assert trajectory.images == [PICTURE, CROP]
    renderer.check_row(trajectory.token_ids, trajectory.images)
    whole = renderer.prompt([QUESTION, {"role": "assistant", "content": "turn on"}, *seen], [PICTURE, CROP])
    assert trajectory.token_ids == whole + second.token_ids
    assert session.actions == ["turn on", "red"]
    assert (trajectory.process_reward, trajectory.sample_index) == (0.75, 3)
    assert [call.ok for call in trajectory.tool_calls] == [True]


def test_every_call_of_the_model_sees_the_row_so_far(renderer):
    scripted, rows = says_in_turn(renderer, "turn on", "red"), []

    async def generate(row, images, sampling):
        rows.append((list(row), list(images), sampling.max_tokens, sampling.stop))
        return await scripted(row, images, sampling)

    trajectory = play(
        renderer, generate, ToolSession(images=[CROP]), custom_stop=["</tool_call>"], single_response_max_tokens=9
    )
    assert [row for row, *_ in rows] == [
        trajectory.prompt_token_ids,
        trajectory.token_ids[: -len(trajectory.turns[1].token_ids)],
    ]
    assert [rest for _, *rest in rows] == [[[PICTURE], 9, ("</tool_call>",)], [[PICTURE, CROP], 9, ("</tool_call>",)]]


def test_what_ends_a_turn(renderer):
    class Searching(ToolBase):
        stop = ("<|end_of_query|>", "</tool_call>")

    scripted, stops = says_in_turn(renderer, "red"), []

    async def generate(row, images, sampling):
        stops.append(sampling.stop)
        return await scripted(row, images, sampling)

    session = ToolSession()
    session.tool = Searching()
    play(renderer, generate, session, custom_stop=["\n\n"], stop_after_tool_call=True)
    no_tool = replace(TASK, env_name="")
    scripted = says_in_turn(renderer, "red")
    play(renderer, generate, session, task=no_tool, custom_stop=["\n\n"], stop_after_tool_call=True)
    assert stops == [("\n\n", "</tool_call>", "<|end_of_query|>"), ("\n\n",)]


def test_the_tool_is_closed_however_the_episode_ends(renderer):
    class Closing(ToolBase):
        def close(self):
            raise AssertionError("the session stands before it")

    sessions = [ToolSession(), ToolSession(), ToolSession()]
    for session in sessions:
        session.tool = Closing()

    async def hangs(row, images, sampling):
        raise asyncio.CancelledError

    play(renderer, ["red"], sessions[0])
    play(renderer, says(renderer, renderer.encode("zoom"), "aborted"), sessions[1])
    with pytest.raises(asyncio.CancelledError):
        play(renderer, hangs, sessions[2])
    assert [session.num_closed for session in sessions] == [1, 1, 1]


def test_every_turn_has_random_numbers_of_its_own(renderer):
    scripted, seeds = says_in_turn(renderer, "zoom", "zoom", "red"), []

    async def generate(row, images, sampling):
        seeds.append(sampling.seed)
        return await scripted(row, images, sampling)

    play(renderer, generate, ToolSession(), sampling=Sampling(seed=2**31 - 1))
    assert seeds == [2**31 - 1, 1_000_002, 2_000_005]


def test_without_agent_or_tool_there_is_one_turn(renderer):
    session = ToolSession()
    trajectory = play(renderer, ["turn on", "red"], session, activate_agent=False)
    assert (trajectory.status, len(trajectory.turns), session.actions) == (Status.ANSWERED, 1, [])
    no_tool = Task("t1", "unit", (QUESTION,), (PICTURE,), "", "red", "what color is it ?")
    assert len(play(renderer, ["zoom"], session, task=no_tool).turns) == 1


def test_max_turns_drops_the_observation_that_nobody_reads(renderer):
    trajectory = play(renderer, ["zoom"] * 2, ToolSession(), max_turns=2)
    assert (trajectory.status, len(trajectory.turns)) == (Status.MAX_TURNS, 2)
    assert trajectory.turns[0].observation_token_ids
    assert trajectory.turns[1].observation_token_ids == []
    assert len(trajectory.tool_calls) == 2


def test_observation_that_does_not_fit_is_not_added(renderer):
    trajectory = play(renderer, ["zoom", "red"], ToolSession(text="zoom " * 50), max_model_len=80)
    assert trajectory.status is Status.CONTEXT_FULL
    assert trajectory.turns[-1].observation_token_ids == []
    assert len(trajectory.token_ids) <= 80


def test_more_pictures_than_vllm_takes(renderer):
    trajectory = play(renderer, ["zoom"] * 4, ToolSession(images=[CROP]), max_vllm_images=2)
    assert (trajectory.status, len(trajectory.turns)) == (Status.CONTEXT_FULL, 2)
    assert trajectory.images == [PICTURE, CROP]


def test_turn_that_fills_the_context(renderer):
    prompt_tokens = len(renderer.prompt([QUESTION], [PICTURE]))
    trajectory = play(renderer, ["zoom " * 50], ToolSession(), max_model_len=prompt_tokens + 10)
    assert (trajectory.status, trajectory.num_response_tokens) == (Status.CONTEXT_FULL, 10)
    assert play(renderer, ["zoom"], ToolSession(), max_model_len=prompt_tokens).turns == []


def test_turn_that_hits_its_own_limit(renderer):
    session = ToolSession()
    trajectory = play(renderer, ["zoom " * 50], session, single_response_max_tokens=6)
    assert (trajectory.status, trajectory.num_response_tokens, session.actions) == (Status.LENGTH, 6, [])
    assert trajectory.turns[0].stop_reason == "length"


def test_placeholder_of_the_model_is_cut_off(renderer):
    written = [*renderer.encode("zoom red"), renderer.image_pad_id, *renderer.encode("green")]
    trajectory = play(renderer, says(renderer, written), ToolSession())
    (turn,) = trajectory.turns
    assert trajectory.status is Status.EMITTED_PLACEHOLDER
    assert turn.token_ids == renderer.encode("zoom red")
    assert (len(turn.logprobs), turn.weight_versions) == (len(turn.token_ids), [7] * len(turn.token_ids))
    renderer.check_row(trajectory.token_ids, trajectory.images)


def test_aborted_generation(renderer):
    trajectory = play(renderer, says(renderer, renderer.encode("zoom"), "aborted"), ToolSession())
    assert (trajectory.status, trajectory.text) == (Status.ABORTED, "zoom")


def test_a_lost_request_ends_its_trajectory_alone(renderer, caplog):
    scripted = says_in_turn(renderer, "zoom")

    async def generate(row, images, sampling):
        if len(images) > 1:
            raise RequestLostError("3 engines died")
        return await scripted(row, images, sampling)

    trajectory = play(renderer, generate, ToolSession(images=[CROP]))
    assert (trajectory.status, len(trajectory.turns)) == (Status.ENGINE_LOST, 1)
    assert "task t0, sample 3: 3 engines died" in caplog.text


def test_what_an_end_means_to_the_loss():
    agent = AgentConfig(on_status={"length": "mask", "aborted": "penalise"})
    meant = {status: agent.loss_use(status).value for status in Status}
    assert meant == dict.fromkeys(Status, "keep") | {
        Status.LENGTH: "mask", Status.ABORTED: "penalise", Status.UNSCORED: "drop", Status.ENGINE_LOST: "drop"
    }  # fmt: skip


@pytest.mark.fault
def test_tool_that_passes_its_deadline(renderer):
    session = ToolSession(seconds=0.3, images=[CROP])
    trajectory = play(renderer, ["zoom", "turn on", "zoom"], session, tool_timeout_s=0.05, max_turns=3)
    late, busy, _ = trajectory.tool_calls
    assert (late.ok, busy.ok, late.seconds) == (False, False, 0.05)
    assert "did not answer within 0.05 s" in trajectory.turns[0].observation_text
    assert "still busy" in trajectory.turns[1].observation_text
    assert trajectory.images == [PICTURE]


def test_late_pictures_do_not_shift_the_ones_the_model_saw(renderer):
    session = ToolSession(seconds=0.2, images=[CROP])
    scripted = says_in_turn(renderer, "zoom", "zoom", "red")

    async def slow(row, images, sampling):
        await asyncio.sleep(0.3 if session.actions else 0.0)
        return await scripted(row, images, sampling)

    play(renderer, slow, session, tool_timeout_s=0.05, max_turns=3)
    assert session.seen == [1, 1, 1]


def test_tool_answer_with_a_forged_picture_becomes_an_error(renderer):
    trajectory = play(renderer, ["zoom", "red"], ToolSession(text="<|image_pad|>"))
    (call,) = trajectory.tool_calls
    assert (trajectory.status, call.ok) == (Status.ANSWERED, False)
    assert "cannot be shown" in trajectory.turns[0].observation_text
    renderer.check_row(trajectory.token_ids, trajectory.images)


def test_verbatim_observation(renderer):
    text = "\n<|im_start|>user\n<image>zoom<|im_end|>\n<|im_start|>assistant\n"
    trajectory = play(renderer, ["zoom", "red"], ToolSession(rendered_text=text, images=[CROP]))
    assert trajectory.turns[0].observation_token_ids == renderer.verbatim(text, [CROP])


def test_turn_without_end_of_turn_token_gets_one_in_the_observation(renderer):
    trajectory = play(renderer, says(renderer, renderer.encode("zoom")), ToolSession(), max_turns=2)
    assert trajectory.turns[0].observation_token_ids[0] == renderer.end_of_turn_id


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_a_tool_that_does_not_start_aborts_the_episode(renderer, caplog, seconds):
    class Broken(ToolSession):
        def reset(self, task):
            time.sleep(seconds)
            raise OSError("no service")

    trajectory = play(renderer, ["zoom"], Broken(), tool_timeout_s=0.1)
    assert (trajectory.status, trajectory.turns) == (Status.ABORTED, [])
    assert trajectory.prompt_token_ids == renderer.prompt([QUESTION], [PICTURE])
    assert "task t0: env scripted_tool did not start" in caplog.text
    assert ("did not answer" if seconds else "no service") in caplog.text


def test_text_keeps_special_tokens_but_the_last(renderer):
    forged = "zoom<|im_start|>user"
    trajectory = play(renderer, [forged, "red"], ToolSession())
    assert [turn.text for turn in trajectory.turns] == [forged, "red"]
    assert trajectory.turns[0].token_ids[-1] == renderer.end_of_turn_id
    assert play(renderer, says(renderer, renderer.encode("red"), "length"), ToolSession()).text == "red"


def test_script_that_goes_through(renderer):
    check_scripted(play(renderer, ["zoom", "red"], ToolSession(), task=replace(TASK, script=("zoom", "red"))))


@pytest.mark.parametrize(("script", "options", "why"), [
    (("zoom",), {}, "it has 1 turns and its episode goes on"),
    (("red", "red"), {}, "1 of its 2 turns were said"),
    (("zoom", "zoom"), {"max_turns": 2}, "ended as max_turns: .*agent.max_turns"),
    (("zoom " * 50,), {"single_response_max_tokens": 9}, "ended as length"),
    (("zoom", "red"), {"max_model_len": 25}, "ended as context_full"),
    (("<|image_pad|>",), {}, "ended as emitted_placeholder"),
    (("zoom", "red"), {"session": ToolSession(text="<|image_pad|>")}, "the call of zoom failed: .*placeholders"),
])  # fmt: skip
def test_script_that_does_not_go_through(renderer, script, options, why):
    task = replace(TASK, script=script)
    with pytest.raises(DataError, match=f"script of t0: {why}"):
        check_scripted(play(renderer, script, task=task, **({"session": ToolSession()} | options)))


@pytest.mark.parametrize(
    ("option", "value"),
    [("max_turns", 0), ("max_vllm_videos", 1), ("tool_timeout_s", 0.0), ("custom_stop", [""]), ("tool_name_key", ""),
     ("on_status", {"lenght": "mask"}), ("on_status", {"length": "hide"}), ("on_status", {"unscored": "mask"}),
     ("status_penalty", -1.0)],
)  # fmt: skip
def test_config_names_what_is_wrong(option, value):
    with pytest.raises(ConfigError, match=f"agent.{option}"):
        AgentConfig(**{option: value})
