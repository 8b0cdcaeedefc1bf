"""A teacher of another depth on ranks of its own: log-probs as its folder gives them, and the policy steps towards it.

Not covered: rollouts around it.
"""

import asyncio

import numpy as np
import pytest
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from megatron_agent import cluster, stages
from megatron_agent.config import load
from megatron_agent.training.actor import Actor, TrainingConfig
from tests.conftest import write_checkpoint
from tests.integration.conftest import RUN_YAML
from tests.integration.test_critic_on_ray import samples_with

pytestmark = pytest.mark.integration


@pytest.fixture
def teacher(small_quickstart, tmp_path):
    config = Qwen2_5_VLConfig.from_pretrained(small_quickstart / "model")
    config.text_config.num_hidden_layers += 1
    config.text_config.layer_types.append(config.text_config.layer_types[-1])
    tokenizer = AutoTokenizer.from_pretrained(small_quickstart / "model")
    return write_checkpoint(tmp_path / "teacher", Qwen2_5_VLForConditionalGeneration, config, tokenizer)


def flat(samples, name):
    return np.concatenate([np.array(getattr(sample, name))[sample.action_mask_T] for sample in samples])


def test_the_teacher_is_that_of_its_folder_and_the_policy_nears_it(overrides, teacher):
    algorithm = f"algorithm={{name: distillation, teacher_path: {teacher}}}"
    config = load(RUN_YAML, [*overrides, algorithm, "training.tensor_parallel=1"])
    family, store = stages.check(config), stages.image_store(config)

    async def run():
        learner, alone = stages.make_learner(config, store), TrainingConfig()
        other = Actor(cluster.start_workers(config, store, alone.layout), alone, "all")
        await asyncio.gather(stages.set_up(config, learner), other.set_up("qwen2_5_vl", str(teacher), 0, config.vision))
        await learner.begin(None)
        await learner.actor.reset_optimizer(config.training.lr, config.training.clip_grad)
        rows = [samples_with(store, family) for _ in range(3)]
        await other.fill_old_logprobs(rows[0], 1.0)
        await learner.actor.fill_old_logprobs(rows[1], 1.0)
        metrics = await learner.update(rows[1], 1, 1, 1.0)
        await learner.actor.fill_old_logprobs(rows[2], 1.0)
        return metrics, rows

    cluster.start_ray()
    try:
        metrics, (of_folder, before, after) = asyncio.run(run())
    finally:
        cluster.stop_ray()
    asked = flat(before, "reference_logprobs_T")
    np.testing.assert_allclose(asked, flat(of_folder, "old_logprobs_T"), atol=2e-5)
    gaps = [np.square(asked - flat(samples, "old_logprobs_T")).mean() for samples in (before, after)]
    assert np.isfinite(list(metrics.values())).all() and gaps[0] > 1e-3 and gaps[1] < gaps[0]
