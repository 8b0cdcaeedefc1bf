"""Trajectories -> rows to train on: the token row as vLLM saw it, a mask over the model's own tokens, advantages."""

from __future__ import annotations

from megatron_agent.algorithms.base import Algorithm
from megatron_agent.types import LossUse, RewardParts, TrainSample, Trajectory, TrajectoryGroup


def to_sample(trajectory: Trajectory) -> TrainSample:
    """One row. Prompt and observation tokens carry mask False and zeros, a masked trajectory nothing else; advantages are
    filled in later."""
    tokens = list(trajectory.prompt_token_ids)
    mask = [False] * len(tokens)
    logprobs = [0.0] * len(tokens)
    after_image = [False] * len(tokens)
    saw_tool_image, is_trained = False, trajectory.loss_use is not LossUse.MASK
    for turn in trajectory.turns:
        for ids, own in ((turn.token_ids, True), (turn.observation_token_ids, False)):
            tokens += ids
            mask += [own and is_trained] * len(ids)
            logprobs += turn.logprobs if own and is_trained else [0.0] * len(ids)
            after_image += [saw_tool_image] * len(ids)
        saw_tool_image |= bool(turn.observation_images)
    reward = trajectory.reward
    return TrainSample(
        token_ids_T=tokens,
        action_mask_T=mask,
        rollout_logprobs_T=logprobs,
        advantages_T=[0.0] * len(tokens),
        images=trajectory.images,
        group_id=trajectory.task.task_id,
        reward=reward.total + trajectory.process_reward if isinstance(reward, RewardParts) else 0.0,
        has_image_before_T=after_image,
    )


def to_samples(groups: list[TrajectoryGroup], algorithm: Algorithm) -> list[TrainSample]:
    """All scored trajectories of the step with their advantages. Unscored and dropped ones are left out of their group.

    One without tokens of its own counts in its group's baseline as any other, but is no row: there is nothing to train.
    """
    samples = []
    for index, group in enumerate(groups):
        for trajectory in group.trajectories:
            if isinstance(trajectory.reward, RewardParts) and trajectory.loss_use is not LossUse.DROP:
                sample = to_sample(trajectory)
                sample.group_id = f"{index}/{sample.group_id}"  # a task may be drawn twice in one step
                samples.append(sample)
    advantages = algorithm.advantages(samples)
    return [s.with_advantages(a) for s, a in zip(samples, advantages, strict=True) if s.num_action_tokens]
