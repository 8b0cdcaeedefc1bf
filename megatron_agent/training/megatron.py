"""One rank of a Megatron-Core model: process groups, model, DDP, optimizer, and the pipeline schedule around them.

Never `megatron.training`, no global arguments. Written to the API that megatron-core 0.16 to 0.19 share.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_agent.algorithms.base import Algorithm
from megatron_agent.errors import TrainingError
from megatron_agent.models.attention import context_index
from megatron_agent.models.base import ModelFamily, StageSpec
from megatron_agent.training import cpu
from megatron_agent.training.checkpoint import load_hf_shards
from megatron_agent.training.critic import ValueObjective
from megatron_agent.training.layout import Layout, is_tensor_parallel, megatron_pieces
from megatron_agent.training.loss import LossStats, PolicyOutput, add_gap, microbatch_loss
from megatron_agent.training.norms import block_norms
from megatron_agent.training.offload import check_on_device
from megatron_agent.training.options import ModelOptions, OptimizerOptions
from megatron_agent.training.packing import Pixels, build_microbatch, keep_targets, padded_length
from megatron_agent.training.reference import Reference
from megatron_agent.types import BatchSize, MicroBatch, ReferenceHead, TrainSample

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class MegatronModel:
    """The stage of the model that this rank holds. Construct after torch.distributed is initialised; collective."""

    def __init__(self, family: ModelFamily, layout: Layout, options: ModelOptions) -> None:
        cpu.install()
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        self.family, self.layout, self.head, self.temperature = family, layout, options.head, 1.0
        self.rank, self.seed, self.support, self.own_support = dist.get_rank(), options.seed, options.support, options.support
        parallel_state.initialize_model_parallel(
            layout.tensor_parallel,
            layout.pipeline_parallel,
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
            context_parallel_size=layout.context_parallel,
        )
        model_parallel_cuda_manual_seed(options.seed)
        self.at = layout.coordinates(self.rank)
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.cp_group = parallel_state.get_context_parallel_group()
        self.config = self._megatron_config(options)
        chunks = range(layout.virtual_pipeline)
        interleaved = layout.virtual_pipeline > 1
        self.stages = [layout.stage(self.at.pipeline, family.num_layers, chunk) for chunk in chunks]
        self.chunks: list[Any] = [
            family.build(self.config, stage, chunk if interleaved else None, self.head)
            for chunk, stage in zip(chunks, self.stages)
        ]
        self.visual: Any = getattr(self.chunks[0], "visual", None)
        if self.visual is not None:
            self.visual.replicate = options.replicate_vision
        # Whose parameters bear the names of the mapping table's pieces.
        self.module: Any = torch.nn.ModuleList(self.chunks) if interleaved else self.chunks[0]
        if torch.cuda.is_available():
            self.module.cuda(torch.cuda.current_device())
        table = family.table(layout, torch.cuda.is_available(), self.head)
        self.pieces = megatron_pieces(table, layout, family.num_layers, self.rank)
        load_hf_shards(self.module, self.pieces, family.path, table)
        freeze(self.chunks, options.frozen)
        mark_tensor_parallel(self.module, {p.param for p in self.pieces if is_tensor_parallel(p, table)})
        self.ddp = self._data_parallel()
        self.reference = Reference(self.module)
        self.reset_optimizer(OptimizerOptions(lr=0.0, weight_decay=0.0, betas=(0.9, 0.999), clip_grad=1.0))

    def _megatron_config(self, options: ModelOptions) -> TransformerConfig:
        from megatron.core.distributed import finalize_model_grads

        config = self.family.transformer_config(self.layout, DTYPES[options.dtype])
        if options.recompute != "none":
            config.recompute_granularity = options.recompute
            if options.recompute == "full":
                config.recompute_method, config.recompute_num_layers = "uniform", 1
        # Losses arrive divided by the mini-batch's size (loss.py): sum over ranks and micro-batches, no averages.
        config.calculate_per_token_loss = True

        def finalize(model: list, num_tokens: object, **kwargs: Any) -> None:
            finalize_model_grads(model, None, **kwargs)
            self._sum_vision_gradients()

        config.finalize_model_grads_func = finalize
        return config

    def _data_parallel(self) -> list[Any]:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

        options = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True, check_for_nan_in_grad=False
        )
        return [
            DistributedDataParallel(self.config, options, self._in_dtype(chunk), disable_bucketing=index > 0)
            for index, chunk in enumerate(self.chunks)
        ]

    def _in_dtype(self, chunk: torch.nn.Module) -> torch.nn.Module:
        if not self.config.bf16:
            return chunk
        from megatron.core.transformer.module import Float16Module

        return Float16Module(self.config, chunk)

    def reset_optimizer(self, options: OptimizerOptions) -> None:
        """A fresh Adam (no moments), as at the start of every training phase."""
        from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer, get_standard_config_overrides

        self.weight_decay = options.weight_decay
        config = OptimizerConfig(
            optimizer="adam",
            lr=options.lr,
            weight_decay=options.weight_decay,
            adam_beta1=options.betas[0],
            adam_beta2=options.betas[1],
            adam_eps=1e-8,
            clip_grad=options.clip_grad,
            bf16=self.config.bf16,
            params_dtype=self.config.params_dtype,
            use_distributed_optimizer=True,
        )
        groups = get_standard_config_overrides(config)
        if options.vision_lr_scale != 1.0:
            groups[ParamKey(name="*visual.*")] = {"lr_mult": options.vision_lr_scale}  # type: ignore[typeddict-unknown-key]
        self.optimizer = get_megatron_optimizer(config, self.ddp, groups, use_gloo_process_groups=not torch.cuda.is_available())
        self.config.grad_scale_func = self.optimizer.scale_loss

    @property
    def is_reporter(self) -> bool:
        """The ranks that hold a share of the losses: last stage, first tensor rank, every context and data rank."""
        return self.stages[-1].is_last and self.at.tensor == 0

    def update(
        self,
        samples: list[TrainSample],
        microbatches: list[list[int]],
        pixels: Pixels,
        algorithm: Algorithm | ValueObjective,
        size: BatchSize,
        lr: float,
        temperature: float,
    ) -> tuple[LossStats, dict[str, float]]:
        """One optimizer step on this rank's micro-batches -> (loss statistics, "grad_norm" and norms of blocks). Collective.

        `algorithm`: what gives the loss of action tokens; a critic's is a ValueObjective. `size`: of the whole mini-batch.

        Raises TrainingError when the loss or the gradient is not finite; no parameter has changed then.
        """
        check_on_device(self, "all")
        self.temperature = temperature
        self.support = self.own_support if algorithm.on_samples else replace(self.own_support, top_k=0, top_p=1.0)
        for chunk in self.ddp:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        stats = LossStats()
        loss = partial(self._loss, algorithm=algorithm, size=size, stats=stats)
        heads = self._reference_heads(samples, microbatches, pixels) if getattr(algorithm, "needs_full_kl", False) else None
        self._run(samples, microbatches, pixels, loss, heads=heads)
        if self.visual is not None:
            stats.maxima["vision_imbalance"] = self.visual.take_imbalance()
        self._refuse_nan(stats)
        for group in self.optimizer.param_groups:
            # wd_mult is 0 for norms and biases; Megatron applies both in its scheduler, which is not used here.
            group["lr"], group["weight_decay"] = lr * group["lr_mult"], self.weight_decay * group["wd_mult"]
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())  # over all ranks, so that all of them decide alike
        if not math.isfinite(grad_norm):
            raise TrainingError(f"rank {self.rank}: the gradient norm is {grad_norm}; the step was not taken")
        norms = {"grad_norm": grad_norm, **block_norms(self)}
        self.optimizer.step()
        return stats, norms

    def logprobs(
        self, samples: list[TrainSample], microbatches: list[list[int]], pixels: Pixels, temperature: float
    ) -> tuple[dict[int, list[float]], LossStats]:
        """Sample index -> log-probs of its action tokens under the current weights, or a critic's values of them (empty
        but on reporters)."""
        check_on_device(self, "parameters")
        self.temperature, self.support = temperature, self.own_support
        for chunk in self.ddp:
            chunk.eval()
        stats = LossStats()
        found: dict[int, list[float]] = {}

        def collect(output: torch.Tensor, batch: MicroBatch, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
            mine = output
            if self.head == "policy":
                mine = output[0]
                add_gap(stats, mine, batch)
            per_token, sample_index = mine.new_zeros(len(kept)), kept.new_zeros(len(kept), dtype=torch.long)
            per_token[kept], sample_index[kept] = mine, batch.sample_index_R
            if self.layout.context_parallel > 1:
                for values in (per_token, sample_index):
                    dist.all_reduce(values, group=self.cp_group)
            for position, sample in enumerate(batch.sample_ids):
                found[sample] = per_token[sample_index == position].tolist()
            return per_token.sum(), torch.tensor(1, dtype=torch.int), {}

        with torch.no_grad():
            self._run(samples, microbatches, pixels, collect)
        if not self.is_reporter:
            return {}, LossStats()
        return (found if self.at.context == 0 else {}), stats

    @torch.no_grad()
    def _reference_heads(
        self, samples: list[TrainSample], microbatches: list[list[int]], pixels: Pixels
    ) -> list[ReferenceHead | None]:
        """The reference's of every micro-batch, hidden states in host memory; None but on the last stage."""
        found: list[torch.Tensor] = []

        def collect(output: torch.Tensor, batch: MicroBatch, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
            found.append(output.cpu())
            return output.sum(), torch.tensor(1, dtype=torch.int), {}

        with self.reference.in_place():
            self._run(samples, microbatches, pixels, collect, wants_hidden=True)
            weight = self.chunks[-1].output_weight().detach().clone() if self.stages[-1].is_last else None
        if weight is None:
            return [None] * len(microbatches)
        return [ReferenceHead(hidden, weight) for hidden in found]

    def _loss(
        self,
        output: torch.Tensor,
        batch: MicroBatch,
        kept: torch.Tensor,
        *,
        algorithm: Algorithm | ValueObjective,
        size: BatchSize,
        stats: LossStats,
    ) -> tuple[torch.Tensor, torch.Tensor, dict]:
        if isinstance(algorithm, ValueObjective):
            return algorithm.loss(output, batch, size, stats), torch.tensor(1, dtype=torch.int), {}
        loss = microbatch_loss(PolicyOutput(*output), batch, algorithm, size, stats, self.cp_group)
        return loss, torch.tensor(1, dtype=torch.int), {}

    def _run(
        self,
        samples: list[TrainSample],
        microbatches: list[list[int]],
        pixels: Pixels,
        loss: Callable,
        heads: list[ReferenceHead | None] | None = None,
        wants_hidden: bool = False,
    ) -> None:
        """Forward over all micro-batches and, where gradients are enabled, backward."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        layout = self.layout
        multiple = layout.segment_multiple
        rows = [max(1, sum(padded_length(samples[i].num_tokens, multiple) for i in ids)) for ids in microbatches]
        longest = padded_length(max(rows), layout.row_multiple)
        # The stages of a pipeline exchange tensors of one agreed length.
        pad_to = [longest if layout.pipeline_parallel > 1 else padded_length(row, layout.row_multiple) for row in rows]

        def batches(stage: StageSpec) -> Iterator[MicroBatch]:
            of_stage = pixels if stage.is_first else None
            for ids, length, head in zip(microbatches, pad_to, heads or [None] * len(pad_to)):
                batch = build_microbatch(samples, ids, self.family, of_stage, length, multiple)
                yield to_device(
                    replace(
                        batch,
                        temperature=self.temperature,
                        support=self.support,
                        reference=head,
                        wants_hidden=wants_hidden,
                    )
                )

        def step(iterator: Iterator[MicroBatch], model: torch.nn.Module):
            batch, kept = self._own_targets(next(iterator))
            return model(batch), partial(loss, batch=batch, kept=kept)

        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[batches(stage) for stage in self.stages] if len(self.ddp) > 1 else batches(self.stages[0]),
            model=self.ddp,
            num_microbatches=len(microbatches),
            seq_length=longest,  # of the whole row; Megatron divides by the context and sequence parallel degrees
            micro_batch_size=1,
            forward_only=not torch.is_grad_enabled(),
        )

    def _own_targets(self, batch: MicroBatch) -> tuple[MicroBatch, torch.Tensor]:
        """The batch with the targets that this context-parallel rank predicts, and which of all they are (bool [R])."""
        if self.layout.context_parallel == 1:
            return batch, torch.ones_like(batch.target_ids_R, dtype=torch.bool)
        mine = context_index(batch.cu_seqlens.tolist(), self.at.context, self.layout.context_parallel)
        held = torch.zeros(batch.num_tokens, dtype=torch.bool, device=batch.token_ids_T.device)
        held[mine.to(held.device)] = True
        kept = held[batch.target_positions_R]
        return keep_targets(batch, kept), kept

    def _sum_vision_gradients(self) -> None:
        """Tensor ranks encoded different pictures: their gradients of the tower add up (context ranks' do so in DDP)."""
        if self.visual is None or not self.visual.is_split or self.layout.tensor_parallel == 1:
            return
        grads = [parameter.main_grad for parameter in self.visual.parameters() if parameter.requires_grad]
        if not grads:  # a frozen tower
            return
        flat = torch.cat([grad.view(-1) for grad in grads])
        dist.all_reduce(flat, group=self.tp_group)
        for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.view(-1).copy_(summed)

    def _refuse_nan(self, stats: LossStats) -> None:
        bad = torch.tensor(float(any(v != v or abs(v) == float("inf") for v in stats.sums.values())))
        if torch.cuda.is_available():
            bad = bad.cuda()
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)  # all ranks stop together, none waits in the next collective
        if bad.item():
            raise TrainingError(f"rank {self.rank}: the loss is not a number ({stats.means()}); the step was not taken")


def freeze(chunks: list[Any], frozen: str) -> None:
    """No gradient for the vision tower ("vision"), for everything in the language model ("language"), or at all ("all")."""
    prefix = {"vision": "visual.", "language": "language.", "all": ""}.get(frozen, "-")
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.startswith(prefix):
                parameter.requires_grad = False


def mark_tensor_parallel(module: torch.nn.Module, names: set[str]) -> None:
    """Say which parameters are shards: Megatron's gradient norm counts every other one on tensor rank 0 only.

    Megatron marks them while it initialises weights, which is skipped here (perform_initialization=False).
    """
    for name, parameter in module.named_parameters():
        parameter.tensor_model_parallel = name in names  # type: ignore[attr-defined]


def to_device(batch: MicroBatch) -> MicroBatch:
    if torch.cuda.is_available():
        for name, value in vars(batch).items():
            if isinstance(value, torch.Tensor):
                setattr(batch, name, value.cuda(non_blocking=True))
        if batch.reference is not None:
            batch.reference = replace(batch.reference, hidden_Rh=batch.reference.hidden_Rh.cuda(non_blocking=True))
    return batch
