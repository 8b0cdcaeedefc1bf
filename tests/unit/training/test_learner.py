"""The learner on the driver: what is asked of which model, in which order, and what is saved where.

Models are stand-ins that fill in fixed numbers or write real files; real ones: tests/integration/test_train.py.
"""

import asyncio
from types import SimpleNamespace

import pytest

from megatron_agent import registry
from megatron_agent.options import build
from megatron_agent.training.actor import TrainingConfig
from megatron_agent.training.checkpoint import complete_checkpoints
from megatron_agent.training.checksums import first_problem, read_checksums
from megatron_agent.training.learner import Learner, model_folders
from megatron_agent.training.loss import LossStats
from megatron_agent.types import TrainSample
from tests.unit.fake_ranks import FakeRanks
from tests.unit.test_run_checkpoints import make as make_checkpoints


class Model:
    """An actor or critic that says what it was asked for."""

    def __init__(self, name, log):
        self.name, self.log, self.config = name, log, TrainingConfig(lr=0.5)

    async def fill_old_logprobs(self, samples, temperature):
        self.log.append(f"{self.name} old")
        for sample in samples:
            sample.old_logprobs_T = [-1.0 * own for own in sample.action_mask_T]
        return LossStats()

    async def fill_reference_logprobs(self, samples, temperature, own):
        self.log.append(f"{self.name} {'reference' if own else 'teacher'}")
        for sample in samples:
            sample.reference_logprobs_T = [-2.0 * own for own in sample.action_mask_T]

    async def fill_values(self, samples):
        self.log.append(f"{self.name} values")
        for sample in samples:
            sample.values_T = [0.5 * own for own in sample.action_mask_T]

    async def update_values(self, samples, objective, lr, num_minibatches):
        self.log.append(f"{self.name} step {lr} clip {objective.clip}")
        self.returns = [sample.returns_T for sample in samples]
        return {"value_loss": 1.0}

    async def update(self, samples, algorithm, lr, num_minibatches, temperature):
        self.log.append(f"{self.name} step {lr}")
        self.rows = samples
        return {"loss": 0.0, "kl": 5.0}

    async def to_host(self):
        pass


def make(name, **options):
    component, log = registry.resolve("algorithms", name), []
    learner = Learner(Model("policy", log), component(build(component.Config, options, "algorithm")))
    learner.critic = Model("critic", log) if learner.algorithm.needs_critic else None
    return learner, log


def samples():
    """Two rows and a trajectory without tokens of its own."""
    masks = ([False, True, False, True], [False, True], [False, False])
    return [
        TrainSample([1] * len(m), m, [0.0] * len(m), [0.0] * len(m), [], "a", reward)
        for m, reward in zip(masks, [1.0, 0.0, 0.5])
    ]


def step(learner, number=1, rows=None):
    return asyncio.run(learner.update(samples() if rows is None else rows, number, 1, 1.0))


def test_grpo_needs_nothing_but_rewards():
    learner, log = make("grpo")
    assert not learner.needs_start and step(learner) == {"loss": 0.0, "kl": 5.0}
    assert log == ["policy step 0.5"] and [row.advantages_T for row in learner.actor.rows] == [[0, 1, 0, 1], [0, -1]]


def test_a_reference_in_the_loss_and_the_controller():
    learner, log = make("grpo", kl={"coefficient": 0.1, "target": 1.0, "horizon_trajectories": 3})
    assert learner.needs_start
    step(learner)
    assert log == ["policy reference", "policy step 0.5"]
    assert learner.algorithm.kl_coefficient == pytest.approx(0.12)  # three trajectories of a horizon of three


def test_a_reference_in_the_reward_comes_before_advantages():
    learner, log = make("rloo", kl={"coefficient": 0.1, "where": "reward", "estimator": "k1"})
    step(learner)
    assert log == ["policy reference", "policy old", "policy step 0.5"]
    first, second = (row.advantages_T for row in learner.actor.rows)  # rewards 0.8, -0.1, 0.5
    assert first == pytest.approx([0, 0.6, 0, 0.6]) and second == pytest.approx([0, -0.75])


def test_the_whole_vocabulary_needs_no_pass_of_its_own():
    learner, log = make("grpo", kl={"coefficient": 0.1, "estimator": "full"})
    step(learner)
    assert learner.needs_start and log == ["policy step 0.5"]


def test_a_teacher_is_asked_in_place_of_the_reference():
    learner, log = make("distillation", teacher_path="somewhere")
    learner.teacher = Model("teacher", log)
    step(learner)
    assert not learner.needs_start and log == ["teacher teacher", "policy step 0.5"]
    assert [row.reference_logprobs_T for row in learner.actor.rows] == [[0, -2, 0, -2], [0, -2]]


def test_ppo_warms_its_critic_up():
    learner, log = make("ppo", critic={"lr": 0.25, "warmup_steps": 1, "value_clip": 0.3})
    assert step(learner, 1) == {"value_loss": 1.0}
    assert log == ["critic values", "critic step 0.25 clip 0.3"]
    assert learner.critic.returns == [[0.0, 1.0, 0.0, 1.0], [0.0, 0.0]]
    assert step(learner, 2) == {"loss": 0.0, "kl": 5.0, "value_loss": 1.0}
    assert log[2:] == ["critic values", "critic step 0.25 clip 0.3", "policy step 0.5"]


def test_a_step_without_a_row_changes_nothing():
    learner, log = make("ppo")
    assert step(learner, rows=[]) == step(learner, rows=samples()[2:]) == {} and log == []


def test_a_checkpoint_holds_the_critic_in_a_folder_of_its_own(tmp_path):
    async def play():
        checkpoints, policy, critic = make_checkpoints(tmp_path), FakeRanks(), FakeRanks()
        loaded = []
        for name, ranks in (("policy", policy), ("critic", critic)):
            ranks.load = lambda folder, name=name: asyncio.sleep(0, loaded.append((name, folder)))
        learner = Learner(policy, SimpleNamespace(), critic)
        critic.go_on.clear()
        await checkpoints.save(learner, {"step": 3})
        await asyncio.sleep(0.2)
        assert complete_checkpoints(checkpoints.root) == []  # the critic's ranks are not done
        critic.go_on.set()
        await checkpoints.finish(learner)
        (folder,) = complete_checkpoints(checkpoints.root)
        assert model_folders(folder) == [folder, folder / "critic"]
        for of_model in model_folders(folder):
            items, unchecked = read_checksums(of_model)
            assert first_problem(of_model, items) is None and not unchecked
            assert [item.tensor for item in items if item.tensor] == ["weight at [0, 0]", "weight at [1, 0]"]
        await learner.load(folder)
        assert loaded == [("policy", folder), ("critic", folder / "critic")]

    asyncio.run(play())


def test_the_weights_that_rl_began_with_are_kept(tmp_path):
    async def play():
        checkpoints, ranks = make_checkpoints(tmp_path), FakeRanks()
        assert checkpoints.start is None
        for _ in range(2):  # a run that was killed in between does it again
            await checkpoints.save_start(ranks)
        items, _ = read_checksums(checkpoints.start)
        assert first_problem(checkpoints.start, items) is None and not list(tmp_path.rglob("*.partial"))

    asyncio.run(play())
