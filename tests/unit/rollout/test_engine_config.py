"""The parts of engine.py that need no vLLM: options, versions per token, where two rows part."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from megatron_agent.errors import ConfigError
from megatron_agent.rollout.engine import RolloutConfig
from megatron_agent.rollout.generation import Generation, first_difference, versions_of


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_engines", 0),
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("top_k", -1),
        ("dtype", "float8"),
        ("max_num_batched_tokens", 8),
    ],
)
def test_config_names_what_is_wrong(option, value):
    with pytest.raises(ConfigError, match=f"rollout.{option}"):
        RolloutConfig(**{option: value})


def test_weight_versions_per_token():
    spans = [SimpleNamespace(version="default", start=0, end=2), SimpleNamespace(version="5", start=2, end=4)]
    assert versions_of(SimpleNamespace(weight_versions=spans), 4) == [0, 0, 5, 5]
    assert versions_of(SimpleNamespace(weight_versions=None), 2) == [0, 0]


def test_a_turn_that_was_cut_goes_on():
    first = Generation([1, 2, 3], [-0.1, -0.2, -0.3], [4, 4, 4], "aborted", 64)
    rest = Generation([5], [-0.5], [7], "stop", 32)
    assert first.first(2).then(rest) == Generation([1, 2, 5], [-0.1, -0.2, -0.5], [4, 4, 7], "stop", 64)
    assert first.first(-4).token_ids == []


def test_first_difference_names_the_token():
    assert "token 1: 2 in our row, 3" in first_difference([1, 2], [1, 3])
    assert "token 1: None in our row, 3 in vLLM's (lengths 1 and 2)" in first_difference([1], [1, 3])


def test_configuration_imports_nothing_heavy():
    code = (
        "import sys, megatron_agent.rollout.engine, megatron_agent.rollout.agent_loop, megatron_agent.rollout.rollouts\n"
        "heavy = {'ray', 'vllm', 'torch', 'transformers', 'megatron.core'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
