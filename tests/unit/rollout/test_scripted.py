"""How a scripted turn ends: as the engine would end it, with the stop string or with the end-of-turn token."""

import asyncio

import pytest

from megatron_agent.rollout.generation import Sampling
from megatron_agent.rollout.scripted import scripted_generate
from megatron_agent.types import Task

STOP = ("</search>", "zoom")


@pytest.mark.parametrize(
    ("text", "stop", "ended"),
    [("turn on", STOP, True), ("turn on zoom", STOP, False), ("zoom in", STOP, True), ("turn on zoom", (), True)],
)
def test_a_turn_that_a_stop_string_ends_has_no_end_token(renderer, text, stop, ended):
    task = Task("t:0", "", (), (), "x", "red", "?", script=(text,))
    turn = asyncio.run(scripted_generate(task, renderer)([1], [], Sampling(stop=stop)))
    assert turn.token_ids == renderer.encode(text) + [renderer.end_of_turn_id] * ended and turn.stop_reason == "stop"
    cut = Sampling(stop=stop, max_tokens=len(turn.token_ids) - 1)
    assert asyncio.run(scripted_generate(task, renderer)([1], [], cut)).stop_reason == "length"
