"""Options of algorithms that are refused, with what is allowed."""

import pytest

from megatron_agent import registry
from megatron_agent.errors import ConfigError
from megatron_agent.options import build

REFUSED = [
    ("grpo", {"clip_low": 0.0}, "algorithm.clip_low=0.0"),
    ("grpo", {"clip_low": 1.1}, "algorithm.clip_low=1.1"),
    ("grpo", {"clip_high": -0.1}, "algorithm.clip_high=-0.1"),
    ("grpo", {"dual_clip": 0.5}, r"algorithm.dual_clip=0.5: must be 0 \(off\) or above 1"),
    ("grpo", {"aggregation": "mean"}, "algorithm.aggregation='mean'; allowed: token-mean, sequence-mean, sequence-sum"),
    ("grpo", {"aggregation": "fixed-length"}, "algorithm.fixed_length_tokens=0 with aggregation='fixed-length'"),
    ("grpo", {"fixed_length_tokens": 5}, "algorithm.fixed_length_tokens=5 with aggregation='token-mean'"),
    ("grpo", {"kl": {"estimator": "k4"}}, "algorithm.kl.estimator='k4'; allowed: k1, k2"),
    ("grpo", {"kl": {"where": "here"}}, "algorithm.kl.where='here'; allowed: loss, reward"),
    ("grpo", {"kl": {"coefficient": -1.0}}, "algorithm.kl.coefficient=-1.0: must be 0 or more"),
    ("grpo", {"kl": {"where": "reward", "estimator": "full"}}, "is for kl.where='loss'"),
    ("grpo", {"kl": {"target": 0.1}}, "needs a kl.coefficient above 0"),
    ("grpo", {"importance": {"correction": "cut"}}, "algorithm.importance.correction='cut'"),
    ("grpo", {"importance": {"correction": "clip", "level": "sequence"}}, "level='sequence' is of truncate and mask"),
    ("cispo", {"importance": {"correction": "clip"}}, "nothing would bound stale tokens"),
    ("grpo", {"importance": {"correction": "clip", "high": 3.0}}, "clip_low, clip_high and dual_clip"),
    ("gpg", {"importance": {"correction": "clip"}}, "gpg has no ratio to clip"),
    ("grpo", {"importance": {"high": 0.9}}, "0 <= low <= 1 <= high"),
    ("grpo", {"importance": {"max_lag": -2}}, "algorithm.importance.max_lag=-2"),
    ("ppo", {"gae_lambda": 1.5}, "algorithm.gae_lambda=1.5: must be 0 to 1"),
    ("ppo", {"critic": {"lr": 0.0}}, "algorithm.critic.lr=0.0"),
    ("reinforce_plus_plus", {"discount": -0.1}, "algorithm.discount=-0.1"),
    ("dapo", {"overlong_max_tokens": 10}, "algorithm.overlong_cache_tokens=0"),
    ("dapo", {"max_sampling_rounds": 0}, "algorithm.max_sampling_rounds=0"),
    ("cispo", {"dual_clip": 3.0}, "cispo clips the weight"),
    ("distillation", {"kl": {"coefficient": 0.1}}, "the teacher is the reference"),
    ("gpg", {"clip_low": 0.2}, "unknown key 'algorithm.clip_low'"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        build(registry.resolve("algorithms", name).Config, options, "algorithm")
