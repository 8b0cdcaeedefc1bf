"""Trajectories -> rows to train on: the token row as vLLM saw it, a mask over the model's own tokens, advantages."""

from __future__ import annotations

from dataclasses import replace

from megatron_agent.algorithms.base import Algorithm
from megatron_agent.types import LossUse, RewardParts, TrainSample, Trajectory, TrajectoryGroup


def to_sample(trajectory: Trajectory, weight_version: int | None = None) -> TrainSample:
    """One row. Prompt and observation tokens carry mask False and zeros, a masked trajectory nothing else; advantages are
    filled in later."""
    tokens = list(trajectory.prompt_token_ids)
    mask = [False] * len(tokens)
    logprobs = [0.0] * len(tokens)
    after_image = [False] * len(tokens)
    process = [0.0] * len(tokens)
    lag = [0] * len(tokens)
    saw_tool_image, is_trained = False, trajectory.loss_use is not LossUse.MASK
    for turn in trajectory.turns:
        for ids, own in ((turn.token_ids, True), (turn.observation_token_ids, False)):
            tokens += ids
            mask += [own and is_trained] * len(ids)
            logprobs += turn.logprobs if own and is_trained else [0.0] * len(ids)
            after_image += [saw_tool_image] * len(ids)
            process += [0.0] * len(ids)
            known = own and weight_version is not None
            lag += [weight_version - version for version in turn.weight_versions] if known else [0] * len(ids)  # type: ignore[operator]
            if own and ids:
                process[-1] = turn.tool_reward
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
        process_rewards_T=process,
        lag_T=lag,
    )


def scored_samples(groups: list[TrajectoryGroup], weight_version: int | None = None) -> list[TrainSample]:
    """All scored trajectories of the step, without advantages. Unscored and dropped ones are left out of their group.

    `weight_version`: the trainer's, from which a token's lag is counted; None: all tokens are of the newest.
    """
    samples = []
    for index, group in enumerate(groups):
        greedy = group.greedy and group.greedy.reward
        for trajectory in group.trajectories:
            if isinstance(trajectory.reward, RewardParts) and trajectory.loss_use is not LossUse.DROP:
                sample = to_sample(trajectory, weight_version)
                sample.group_id = f"{index}/{sample.group_id}"  # a task may be drawn twice in one step
                if isinstance(greedy, RewardParts) and group.greedy is not None:
                    sample.baseline_reward = greedy.total + group.greedy.process_reward
                samples.append(sample)
    return samples


def staleness(samples: list[TrainSample]) -> dict[str, float]:
    """How many weight versions the tokens that are trained on are behind the trainer: mean and largest."""
    lags = [lag for s in samples for lag, own in zip(s.lag_T, s.action_mask_T) if own]
    return {"staleness_mean": sum(lags) / len(lags), "staleness_max": float(max(lags))} if lags else {}


def credited(samples: list[TrainSample], algorithm: Algorithm) -> list[TrainSample]:
    """The rows to train on, with their advantages and, for a critic, returns.

    One without tokens of its own counts in its group's baseline as any other, but is no row: there is nothing to train.
    """
    rows = [s.with_advantages(a) for s, a in zip(samples, algorithm.advantages(samples), strict=True)]
    if algorithm.needs_critic:
        rows = [replace(row, returns_T=r) for row, r in zip(rows, algorithm.returns(samples), strict=True)]
    return [row for row in rows if row.num_action_tokens]


def to_samples(groups: list[TrajectoryGroup], algorithm: Algorithm) -> list[TrainSample]:
    """Of an algorithm that needs nothing but rewards."""
    return credited(scored_samples(groups), algorithm)
