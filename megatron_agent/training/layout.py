"""Parallel layout: degrees, their checks, rank <-> coordinates in Megatron's order (tp fastest, then cp, dp, pp)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_agent.errors import ConfigError
from megatron_agent.models.base import StageSpec
from megatron_agent.models.mapping import Entry, Piece, Replicated, pieces


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism; world_size = tensor x context x data x pipeline."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    context_parallel: int = 1
    sequence_parallel: bool = False
    virtual_pipeline: int = 1  # model chunks per pipeline stage (interleaved schedule)
    stage_layers: tuple[int, ...] = ()  # decoder layers of every chunk, in the order of the model; none: even

    def __post_init__(self) -> None:
        for name in ("tensor_parallel", "pipeline_parallel", "data_parallel", "context_parallel", "virtual_pipeline"):
            if getattr(self, name) < 1:
                raise ConfigError(f"training.{name}={getattr(self, name)}: a degree of parallelism is 1 or more")
        if self.virtual_pipeline > 1 and self.pipeline_parallel == 1:
            raise ConfigError("training.virtual_pipeline interleaves pipeline stages: set training.pipeline_parallel above 1")
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ConfigError("training.sequence_parallel splits rows over tensor ranks: set training.tensor_parallel above 1")

    @property
    def world_size(self) -> int:
        return self.tensor_parallel * self.context_parallel * self.pipeline_parallel * self.data_parallel

    @property
    def segment_multiple(self) -> int:
        """Every packed sample is padded to a multiple of this many tokens: context ranks take two chunks of it each."""
        return 2 * self.context_parallel if self.context_parallel > 1 else 1

    @property
    def row_multiple(self) -> int:
        """The whole packed row is padded to a multiple of this."""
        return self.segment_multiple * (self.tensor_parallel if self.sequence_parallel else 1)

    def coordinates(self, rank: int) -> Coordinates:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} outside a world of {self.world_size}")
        rest, tp = divmod(rank, self.tensor_parallel)
        rest, cp = divmod(rest, self.context_parallel)
        pp, dp = divmod(rest, self.data_parallel)
        return Coordinates(tp, dp, pp, cp)

    @property
    def num_chunks(self) -> int:
        return self.pipeline_parallel * self.virtual_pipeline

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Decoder layers of every chunk, in the order of the model."""
        return self.stage_layers or split_layers(num_layers, self.num_chunks)

    def with_costs(self, num_layers: int, first_cost: float, last_cost: float) -> Layout:
        """Layers dealt by what the stages cost (see split_layers)."""
        if num_layers < self.num_chunks:
            return self  # check_layers says what is wrong
        return replace(self, stage_layers=split_layers(num_layers, self.num_chunks, first_cost, last_cost))

    def check_layers(self, num_layers: int) -> None:
        """Raise ConfigError when the model's layers cannot be dealt to the stages."""
        given = self.stage_layers
        if num_layers < self.num_chunks:
            raise ConfigError(
                f"training.pipeline_parallel={self.pipeline_parallel} x training.virtual_pipeline={self.virtual_pipeline} is "
                f"more than the model's {num_layers} layers: every stage needs one"
            )
        if given and (len(given) != self.num_chunks or sum(given) != num_layers or min(given) < 1):
            raise ConfigError(
                f"training.stage_layers={list(given)}: give {self.num_chunks} numbers of at least 1 (pipeline_parallel x "
                f"virtual_pipeline) that add up to the model's {num_layers} layers"
            )

    def megatron_stages(self, num_layers: int) -> list[list[str]] | None:
        """The split as Megatron's `pipeline_model_parallel_layout`; None: one stage."""
        if self.num_chunks == 1:
            return None
        chunks = [["decoder"] * count for count in self.layers(num_layers)]
        chunks[0].insert(0, "embedding")
        chunks[-1].append("loss")
        return chunks

    def stage(self, pipeline_rank: int, num_layers: int, chunk: int = 0) -> StageSpec:
        """What chunk `chunk` of a pipeline rank builds; chunks are dealt to the ranks in turn."""
        layers, index = self.layers(num_layers), chunk * self.pipeline_parallel + pipeline_rank
        first = sum(layers[:index])
        return StageSpec(
            first_layer=first,
            last_layer=first + layers[index],
            is_first=index == 0,
            is_last=index == self.num_chunks - 1,
        )


def split_layers(num_layers: int, num_chunks: int, first_cost: float = 0.0, last_cost: float = 0.0) -> tuple[int, ...]:
    """Layers of each chunk, at least one, so that the slowest is as fast as can be. Costs are in decoder layers: what the
    first chunk (embedding, vision tower) and the last (head) carry besides. Of equals the later takes more: earlier
    stages of a pipeline hold the activations of more micro-batches."""
    costs = [0.0] * num_chunks
    costs[0] += first_cost
    costs[-1] += last_cost
    layers = [1] * num_chunks
    for _ in range(num_layers - num_chunks):
        cheapest = min(range(num_chunks), key=lambda i: (layers[i] + costs[i], -i))
        layers[cheapest] += 1
    return tuple(layers)


@dataclass(frozen=True)
class Coordinates:
    """Where one rank sits on each axis."""

    tensor: int
    data: int
    pipeline: int
    context: int = 0


def holds(entry: Entry, stage: StageSpec) -> bool:
    if entry.stage == "first":
        return stage.is_first
    if entry.stage == "last":
        return stage.is_last
    return stage.first_layer <= int(entry.stage) < stage.last_layer


def megatron_pieces(table: list[Entry], layout: Layout, num_layers: int, rank: int) -> list[Piece]:
    """What HF box every local parameter of a training rank holds; layers numbered from 0 in each stage.

    With a virtual pipeline the names are those of a ModuleList of the rank's chunks: "0.language...", "1.language...".
    """
    at = layout.coordinates(rank)
    rows = []
    for chunk in range(layout.virtual_pipeline):
        stage = layout.stage(at.pipeline, num_layers, chunk)
        prefix = f"{chunk}." if layout.virtual_pipeline > 1 else ""
        for e in table:
            if holds(e, stage):
                param = e.param
                if isinstance(e.stage, int):
                    param = param.replace(f".layers.{e.stage}.", f".layers.{e.stage - stage.first_layer}.", 1)
                rows.append((e.hf_name, e.shape, prefix + param, e.rule))
    return list(dict.fromkeys(pieces(rows, at.tensor, layout.tensor_parallel)))


def is_tensor_parallel(piece: Piece, table: list[Entry]) -> bool:
    """Whether ranks of one tensor-parallel group hold different parts of this parameter."""
    return any(e.hf_name == piece.hf_name and not isinstance(e.rule, Replicated) for e in table)


def vllm_pieces(table: list[Entry], tensor_parallel: int, rank: int) -> list[Piece]:
    """What HF box every parameter of a vLLM tensor-parallel rank holds."""
    rows = [(e.hf_name, e.shape, e.vllm_param, e.vllm_rule) for e in table if e.vllm_param is not None]
    return list(dict.fromkeys(pieces(rows, rank, tensor_parallel)))
