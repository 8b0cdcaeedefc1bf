"""A critic on Ray's ranks: values of rows with pictures, steps towards returns, memory given away in between.

Not covered: PPO around it.
"""

import asyncio

import numpy as np
import pytest
from PIL import Image

from megatron_agent import cluster, stages
from megatron_agent.config import load
from megatron_agent.training.critic import Critic, ValueObjective
from megatron_agent.types import TrainSample
from tests.integration.conftest import RUN_YAML

pytestmark = pytest.mark.integration


def samples_with(store, family):
    rng = np.random.default_rng(0)
    samples = []
    for index in range(6):
        picture = store.put_picture(Image.fromarray(rng.integers(0, 256, (56, 56, 3), dtype=np.uint8))) if index % 2 else None
        prompt = [1, 2, 3, *([family.image_token_id] * 4 if picture else [])]
        tokens = [*prompt, *range(10, 18)]
        own = [False] * len(prompt) + [True] * 8
        zeros = [0.0] * len(tokens)
        samples.append(
            TrainSample(tokens, own, zeros, zeros, [picture] if picture else [], str(index), 0.0, [False] * len(own))
        )
        samples[-1].returns_T = [float(index % 2) if is_own else 0.0 for is_own in own]
    return samples


def test_values_move_to_the_returns(overrides):
    config = load(RUN_YAML, [*overrides, "training.offload=all", "training.pipeline_parallel=2", "training.tensor_parallel=1"])
    family, store = stages.check(config), stages.image_store(config)
    assert config.training.layout.stage_layers, "stages were not dealt by cost"

    async def run():
        critic = Critic(cluster.start_workers(config, store), config.training)
        await critic.set_up(config.model.family, config.model.path, 0, config.vision)
        await critic.reset_optimizer(1e-3, 1.0)
        samples = samples_with(store, family)
        await critic.fill_values(samples)
        assert all(values == [0.0] * len(values) for values in (sample.values_T for sample in samples))
        metrics = []
        for _ in range(12):
            await critic.to_host()
            metrics.append(await critic.update_values(samples, ValueObjective(clip=0.0), 1e-3, num_minibatches=2))
        await critic.to_host()
        await critic.fill_values(samples)
        return samples, metrics

    cluster.start_ray()
    try:
        samples, metrics = asyncio.run(run())
    finally:
        cluster.stop_ray()
    assert metrics[0]["value_loss"] == pytest.approx(0.25, abs=0.02)  # of zeros: half of half ones
    assert metrics[-1]["value_loss"] < 0.1 and metrics[-1]["value_explained_variance"] > 0.5
    for sample in samples:
        values = np.array(sample.values_T)
        assert (values[~np.array(sample.action_mask_T)] == 0).all() and (values[sample.action_mask_T] != 0).all()
