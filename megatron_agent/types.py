"""The dataclasses that cross a boundary between stages; nothing else does (no dict, no bag of tensors).

dataset --Task--> rollout --Trajectory, TrajectoryGroup--> samples --TrainSample--> MicroBatch --> actor
                                                                          Megatron --ShardCopy--> vLLM
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch

Box: TypeAlias = tuple[int, int, int, int]  # (left, top, right, bottom), right and bottom exclusive
BANNED_LOGIT_BIAS = -100.0  # on a banned token's logit, here and in vLLM (its largest bias): e^-100 is never sampled
Message: TypeAlias = dict[str, object]  # one chat message as Hugging Face's chat templates take it


@dataclass(frozen=True)
class ImageRef:
    """A picture by reference: the hash of the original's bytes and the recipe that turns it into what the model sees.

    `crop_box_px` is in the original's pixels (after `rotation_deg`, counter-clockwise); the result is resized to
    `width_px` x `height_px`. Equal recipes have equal keys, so vLLM, the trainer and the viewer share one name.
    """

    source: str
    width_px: int
    height_px: int
    crop_box_px: Box | None = None
    rotation_deg: int = 0

    @property
    def key(self) -> str:
        recipe = f"{self.source}|{self.crop_box_px}|{self.rotation_deg}|{self.width_px}x{self.height_px}"
        return hashlib.sha256(recipe.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Task:
    """One row of the dataset: a question with its pictures, and what is needed to act on it and to score it."""

    task_id: str
    data_source: str
    messages: tuple[Message, ...]  # content is a str or a list of {"type": "text"|"image", ...}
    images: tuple[ImageRef, ...]
    env_name: str  # empty: no tool, a single turn
    ground_truth: str
    question: str
    extra_info: dict[str, object] = field(default_factory=dict)
    script: tuple[str, ...] = ()  # assistant turns of a scripted trajectory (supervised rows only)


class Status(str, enum.Enum):
    """How an episode ended."""

    ANSWERED = "answered"
    MAX_TURNS = "max_turns"
    CONTEXT_FULL = "context_full"
    LENGTH = "length"  # the last turn hit single_response_max_tokens
    EMITTED_PLACEHOLDER = "emitted_placeholder"  # the model wrote an image placeholder itself
    ABORTED = "aborted"
    ENGINE_LOST = "engine_lost"  # engines kept dying under it, or could not carry out its request
    UNSCORED = "unscored"  # it came to an end, and then could not be judged


class LossUse(str, enum.Enum):
    """What becomes of a scored trajectory in the loss; which end means what is the run's choice (agent.on_status)."""

    KEEP = "keep"  # trained on as scored
    MASK = "mask"  # its reward counts in its group's baseline, its tokens in no loss
    PENALISE = "penalise"  # as keep, its reward lowered by agent.status_penalty
    DROP = "drop"  # left out of its group altogether


@dataclass(frozen=True)
class ToolCall:
    """What one tool execution did; `box_px` is the looked-at region in the pixels of the original picture."""

    name: str
    ok: bool
    error: str = ""
    seconds: float = 0.0
    image_index: int = 0
    box_px: Box | None = None
    shown_box_px: Box | None = None  # the same box in the coordinates of the picture that the model saw


@dataclass
class Turn:
    """One generation of the model and, where it called a tool, the observation that followed."""

    token_ids: list[int]
    logprobs: list[float]
    weight_versions: list[int]  # one per generated token
    text: str
    stop_reason: str
    observation_token_ids: list[int] = field(default_factory=list)
    observation_images: list[ImageRef] = field(default_factory=list)
    observation_text: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    tool_reward: float = 0.0


@dataclass(frozen=True)
class RewardParts:
    """Named parts of a reward and their weights, kept apart to the end: `total` is their weighted sum."""

    parts: dict[str, float]
    weights: dict[str, float]

    def __post_init__(self) -> None:
        if set(self.parts) != set(self.weights):
            raise ValueError(f"reward parts {sorted(self.parts)} and weights {sorted(self.weights)} name different things")

    @property
    def total(self) -> float:
        return sum(value * self.weights[name] for name, value in self.parts.items())


@dataclass(frozen=True)
class Unscored:
    """A trajectory that could not be judged; it is left out of its group, never scored 0."""

    reason: str


@dataclass
class Trajectory:
    """One episode. The token row is prompt + every turn's tokens and observation, exactly as vLLM was conditioned on it.

    Every picture occupies one image-pad token per merged patch in the row; `images` are in row order.
    """

    task: Task
    sample_index: int  # which rollout of its group
    prompt_token_ids: list[int]
    turns: list[Turn] = field(default_factory=list)
    status: Status = Status.ABORTED
    reward: RewardParts | Unscored | None = None
    seconds: float = 0.0
    loss_use: LossUse = LossUse.KEEP

    @property
    def token_ids(self) -> list[int]:
        row = list(self.prompt_token_ids)
        for turn in self.turns:
            row += turn.token_ids
            row += turn.observation_token_ids
        return row

    @property
    def images(self) -> list[ImageRef]:
        return [*self.task.images, *(ref for turn in self.turns for ref in turn.observation_images)]

    @property
    def num_response_tokens(self) -> int:
        return sum(len(turn.token_ids) for turn in self.turns)

    @property
    def tool_calls(self) -> list[ToolCall]:
        return [call for turn in self.turns for call in turn.tool_calls]

    @property
    def text(self) -> str:
        return "".join(turn.text for turn in self.turns)

    @property
    def process_reward(self) -> float:
        return sum(turn.tool_reward for turn in self.turns)


@dataclass
class TrajectoryGroup:
    """The rollouts of one task: what group-relative algorithms compare."""

    task: Task
    trajectories: list[Trajectory]
    greedy: Trajectory | None = None  # at temperature 0, for algorithms that compare with it (ReMax); not trained on


@dataclass
class TrainSample:
    """One row to train on. All lists have the length T of the row; entries of prompts and observations are 0.

    `action_mask_T[t]` says that token t was generated by the model: the only tokens that enter a loss.
    """

    token_ids_T: list[int]
    action_mask_T: list[bool]
    rollout_logprobs_T: list[float]
    advantages_T: list[float]
    images: list[ImageRef]
    group_id: str = ""
    reward: float = 0.0  # outcome and process rewards of the whole trajectory
    has_image_before_T: list[bool] = field(default_factory=list)  # is there a picture from a tool before token t
    old_logprobs_T: list[float] | None = None  # the trainer's own, before the update; None: this update's forward pass
    values_T: list[float] | None = None  # a critic's estimates, before the update
    returns_T: list[float] | None = None  # what they should have been
    process_rewards_T: list[float] = field(default_factory=list)  # at the last token of each turn; empty: none
    baseline_reward: float | None = None  # of the greedy trajectory of the same task
    reference_logprobs_T: list[float] | None = None  # a reference policy's or a teacher's
    lag_T: list[int] = field(default_factory=list)  # weight versions between sampling and training; empty: 0 everywhere

    def __post_init__(self) -> None:
        lengths = {len(self.token_ids_T), len(self.action_mask_T), len(self.rollout_logprobs_T), len(self.advantages_T)}
        if len(lengths) != 1:
            raise ValueError(f"TrainSample lists differ in length: {sorted(lengths)}")

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids_T)

    @property
    def num_action_tokens(self) -> int:
        return sum(self.action_mask_T)

    def with_advantages(self, advantages_T: list[float]) -> TrainSample:
        return replace(self, advantages_T=advantages_T)


@dataclass(frozen=True)
class Support:
    """Which tokens sampling chooses among, after temperature: log-probs and entropy are of the distribution over them.

    As vLLM: of the `top_k` largest (0: of all) the fewest that hold `top_p` of the probability. A banned token's logit is
    lowered by BANNED_LOGIT_BIAS.
    """

    banned_token_ids: tuple[int, ...] = ()
    top_k: int = 0
    top_p: float = 1.0

    @property
    def is_cut(self) -> bool:
        return self.top_k > 0 or self.top_p < 1


ALL_TOKENS = Support()


@dataclass
class MicroBatch:
    """Packed rows (THD): the tokens of several samples back to back; `cu_seqlens` bounds them.

    Shapes: T tokens, R action tokens ("targets"), N vision patches, I pictures.
    `target_positions_R[i]` is the index of the token whose hidden state predicts `target_ids_R[i]` (the one before it).
    """

    token_ids_T: torch.Tensor  # int64 [T]
    position_ids_3T: torch.Tensor  # int64 [3, T], mRoPE (time, height, width), from 0 in every sample
    cu_seqlens: torch.Tensor  # int32 [num_samples + 1]
    target_positions_R: torch.Tensor  # int64 [R]
    target_ids_R: torch.Tensor  # int64 [R]
    sample_index_R: torch.Tensor  # int64 [R]: which sample of the micro-batch a target belongs to
    advantages_R: torch.Tensor  # float32 [R]
    rollout_logprobs_R: torch.Tensor  # float32 [R]
    old_logprobs_R: torch.Tensor | None  # float32 [R]
    after_image_R: torch.Tensor  # bool [R]: a tool's picture lies before the target
    patches_NP: torch.Tensor | None  # float32 [N, channels * temporal * patch * patch]
    grids_I3: torch.Tensor | None  # int64 [I, 3] (time, rows, columns) in patches
    sample_ids: list[int] = field(default_factory=list)  # indices of the samples in the step's list
    old_values_R: torch.Tensor | None = None  # float32 [R], of a critic
    returns_R: torch.Tensor | None = None  # float32 [R]
    reference_logprobs_R: torch.Tensor | None = None  # float32 [R]
    lag_R: torch.Tensor | None = None  # int64 [R]
    reference: ReferenceHead | None = None  # for the divergence over the whole vocabulary
    wants_hidden: bool = False  # the last stage gives the targets' hidden states [R, h] in place of log-probs
    temperature: float = 1.0  # at which the targets were sampled: log-probs are of that distribution
    support: Support = ALL_TOKENS

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids_T.shape[0])


@dataclass(frozen=True)
class ReferenceHead:
    """What a reference policy made of the same targets, one multiplication before its logits."""

    hidden_Rh: torch.Tensor
    weight: torch.Tensor  # this rank's shard of the vocabulary head [V_padded / tp, h]


@dataclass(frozen=True)
class BatchSize:
    """What the losses of one mini-batch are divided by: over all ranks and micro-batches."""

    num_tokens: int  # action tokens
    num_sequences: int  # rows that have some

    @staticmethod
    def of(samples: Sequence[TrainSample]) -> BatchSize:
        counts = [sample.num_action_tokens for sample in samples]
        return BatchSize(sum(counts), sum(count > 0 for count in counts))


@dataclass
class LossInputs:
    """Per-token tensors of the R action tokens of one micro-batch; what an algorithm's loss may see."""

    logprobs_R: torch.Tensor  # with gradient
    old_logprobs_R: torch.Tensor
    rollout_logprobs_R: torch.Tensor
    advantages_R: torch.Tensor
    sample_index_R: torch.Tensor
    num_samples: int
    entropy_R: torch.Tensor | None = None  # with gradient
    reference_logprobs_R: torch.Tensor | None = None
    full_kl_R: torch.Tensor | None = None  # KL(policy || reference) over the whole vocabulary, with gradient
    lag_R: torch.Tensor | None = None  # weight versions between sampling and training
    sum_over_context: Callable[[torch.Tensor], torch.Tensor] | None = None  # differentiable, over context-parallel ranks

    def sum_over_sequence(self, values_R: torch.Tensor) -> torch.Tensor:
        """Sum of `values_R` over the action tokens of each sample -> [num_samples], over all context-parallel ranks.

        Sequence-level losses use nothing else, and so need to know nothing of context parallelism.
        """
        sums = values_R.new_zeros(self.num_samples).index_add(0, self.sample_index_R, values_R)
        return sums if self.sum_over_context is None else self.sum_over_context(sums)

    def mean_over_sequence(self, values_R: torch.Tensor) -> torch.Tensor:
        """[num_samples]; 0 for a sample without action tokens."""
        return self.sum_over_sequence(values_R) / self.sequence_lengths().clamp(min=1)

    def sequence_lengths(self) -> torch.Tensor:
        """Action tokens of each sample, float [num_samples], over all context-parallel ranks."""
        return self.sum_over_sequence(self.logprobs_R.new_ones(self.logprobs_R.shape))


@dataclass
class LossOutputs:
    """`loss_R` is the loss of every action token; training/loss.py sums and divides. Metrics are [R] tensors, detached."""

    loss_R: torch.Tensor
    metrics_R: dict[str, torch.Tensor] = field(default_factory=dict)


Slices: TypeAlias = tuple[tuple[int, int], ...]  # (start, stop) per dim


TRANSPORTS = ("auto", "shared_memory", "cuda_ipc", "nccl", "gloo")  # what carries weights from rank to rank


@dataclass(frozen=True)
class SyncRound:
    """One round of weight transfer: where its store is (host, port), what it is called there, the secret that both sides
    know, and what carries the bytes (weights/meeting.py)."""

    host: str
    port: int
    name: str
    key: str
    transport: str = "auto"


@dataclass(frozen=True)
class ShardCopy:
    """Move `src_slice` of a Megatron rank's parameter to `dst_slice` of a vLLM rank's parameter (equal shapes)."""

    src_rank: int
    src_param: str
    src_slice: Slices
    dst_rank: int
    dst_param: str
    dst_slice: Slices

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.src_slice)
