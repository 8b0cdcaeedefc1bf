"""A decoder from Megatron-Core's GPT parts, one pipeline stage of it, with the vision tower where there is one.

The only file that chooses between Transformer Engine layers (GPU) and local ones (CPU).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_agent.models.attention import context_index, context_parallel_attention, packed_attention
from megatron_agent.models.base import StageSpec
from megatron_agent.models.head import ValueHead, VocabularyShard, divergence, target_logprobs
from megatron_agent.types import MicroBatch


class PackedCoreAttention(MegatronModule):
    """Core attention of the local spec on packed rows [T, heads, head_dim]; Transformer Engine does the same on GPUs."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type, attention_type, attention_dropout=None,
        softmax_scale=None, cp_comm_type=None, pg_collection=None,
    ) -> None:  # fmt: skip
        super().__init__(config=config)
        self.scale = softmax_scale

    def forward(self, q, k, v, attention_mask, attn_mask_type=None, attention_bias=None, packed_seq_params=None):
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        if self.config.context_parallel_size > 1:
            group = parallel_state.get_context_parallel_group()
            return context_parallel_attention(q, k, v, bounds, group, self.scale).flatten(1)
        return packed_attention(q, k, v, bounds, causal=True, scale=self.scale).flatten(1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        return {}


class LocalRMSNorm(torch.nn.RMSNorm):
    """RMSNorm of the local spec; Megatron's own wrapper refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # finalize_model_grads sums it over the TP ranks


def block_spec(config: TransformerConfig, num_layers: int) -> ModuleSpec | TransformerBlockSubmodules:
    if torch.cuda.is_available():
        return get_gpt_layer_with_transformer_engine_spec()
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = PackedCoreAttention
    spec.submodules.input_layernorm = LocalRMSNorm
    spec.submodules.pre_mlp_layernorm = LocalRMSNorm
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=LocalRMSNorm)


@dataclass(frozen=True)
class DecoderConfig:
    """What a stage needs beyond Megatron's config. `head`: "policy" (vocabulary) or "value" (a critic)."""

    vocab_size: int
    padded_vocab_size: int
    rope_theta: float
    max_positions: int
    tied: bool
    image_token_id: int | None = None
    head: str = "policy"

    @property
    def shares_embedding(self) -> bool:
        return self.tied and self.head == "policy"


class DecoderStage(MegatronModule):
    """One pipeline stage. forward(batch) -> hidden states [T, 1, h]; on the last stage, of the targets only (a prompt's
    and an observation's positions never meet the head): log-probs and entropy fp32 [2, R] (a reference's divergence
    besides: [3, R]), or a critic's values [R]."""

    def __init__(
        self,
        config: TransformerConfig,
        stage: StageSpec,
        decoder: DecoderConfig,
        visual: torch.nn.Module | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__(config=config)
        self.pre_process, self.post_process, self.options = stage.is_first, stage.is_last, decoder
        self.model_type = ModelType.encoder_or_decoder  # the pipeline schedules ask for it
        self.share_embeddings_and_output_weights = decoder.shares_embedding
        if stage.is_first and visual is not None:
            self.visual = visual.to(config.params_dtype)
        self.language = GPTModel(
            config=config,
            transformer_layer_spec=block_spec(config, stage.last_layer - stage.first_layer),
            vocab_size=decoder.padded_vocab_size,
            max_sequence_length=decoder.max_positions,
            pre_process=stage.is_first,
            post_process=stage.is_last,
            parallel_output=True,
            share_embeddings_and_output_weights=decoder.shares_embedding,
            position_embedding_type="none",  # mrope_frequencies: Megatron's would slice packed rows wrongly under CP
            scatter_embedding_sequence_parallel=False,  # pictures go in first
            vp_stage=chunk,
        )
        if stage.is_last and decoder.head == "value":
            del self.language.output_layer
            self.language.post_process = False  # its state for checkpoints would look for the layer
            self.value_head = ValueHead(config.hidden_size, config.params_dtype)

    def set_input_tensor(self, input_tensor: torch.Tensor) -> None:
        self.language.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> torch.Tensor:
        return self.language.shared_embedding_or_output_weight()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        state = self.language.sharded_state_dict(f"{prefix}language.", sharded_offsets, metadata)
        for name in ("visual", "value_head"):
            if hasattr(self, name):
                state.update(replicated_sharded_state_dict(getattr(self, name), f"{prefix}{name}."))
        return state

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        language, config = self.language, self.config
        mine = self._context_index(batch)
        hidden = self._embed(batch, mine) if self.pre_process else None  # else: the tensor of the stage before
        theta, sections = self.options.rope_theta, config.mrope_section
        hidden = language.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=mrope_frequencies(batch.position_ids_3T, config.kv_channels, theta, sections),
            packed_seq_params=packed_seq_params(batch.cu_seqlens),
        )
        if not self.post_process:
            return hidden
        if config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return self._head(hidden[target_rows(batch, mine), 0], batch)

    def _head(self, hidden_Rh: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        if self.options.head == "value":
            return self.value_head(hidden_Rh)
        if batch.wants_hidden:
            return hidden_Rh
        group, rank = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_tensor_model_parallel_rank()
        shard = VocabularyShard(self.options.vocab_size, rank, group, support=batch.support)
        weight = self.output_weight()
        found = [*target_logprobs(hidden_Rh, weight, batch.target_ids_R, shard, batch.temperature)]
        if batch.reference is not None:
            found.append(divergence(hidden_Rh, weight, batch.reference, shard, batch.temperature))
        return torch.stack(found)

    def output_weight(self) -> torch.Tensor:
        """This rank's shard of the vocabulary head, on the last stage."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.language.output_layer.weight

    def _context_index(self, batch: MicroBatch) -> torch.Tensor | None:
        """Which tokens of the row this rank holds; None: all."""
        if self.config.context_parallel_size == 1:
            return None
        rank, size = parallel_state.get_context_parallel_rank(), self.config.context_parallel_size
        return context_index(batch.cu_seqlens.tolist(), rank, size).to(batch.token_ids_T.device)

    def _embed(self, batch: MicroBatch, mine: torch.Tensor | None) -> torch.Tensor:
        tokens = batch.token_ids_T if mine is None else batch.token_ids_T[mine]
        hidden = self.language.embedding(input_ids=tokens[None], position_ids=None)
        if batch.patches_NP is not None and batch.grids_I3 is not None:
            features = self.visual(batch.patches_NP, tuple(map(tuple, batch.grids_I3.tolist())))
            assert self.options.image_token_id is not None
            is_image = torch.eq(batch.token_ids_T, self.options.image_token_id)
            if int(is_image.sum()) != len(features):
                raise ValueError(f"the row has {int(is_image.sum())} image tokens, the pictures {len(features)} features")
            feature_of = is_image.cumsum(0) - 1
            if mine is not None:
                is_image, feature_of = is_image[mine], feature_of[mine]
            index = is_image.nonzero()[:, 0]
            hidden = hidden.index_copy(0, index, features[feature_of[index]].to(hidden.dtype)[:, None])
        if torch.is_grad_enabled() and not hidden.requires_grad:
            hidden.requires_grad_()  # everything below may be frozen and the row without pictures: backward starts anyway
        return scatter_to_sequence_parallel_region(hidden) if self.config.sequence_parallel else hidden


def target_rows(batch: MicroBatch, mine: torch.Tensor | None) -> torch.Tensor:
    """Where the batch's targets lie in the tokens that this rank holds."""
    if mine is None:
        return batch.target_positions_R
    row_of = torch.full((batch.num_tokens,), -1, device=mine.device)
    row_of[mine] = torch.arange(len(mine), device=mine.device)
    return row_of[batch.target_positions_R]


def mrope_frequencies(position_ids_3T: torch.Tensor, head_dim: int, theta: float, sections: list[int]) -> torch.Tensor:
    """Rotary angles float32 [T, 1, 1, head_dim] of the whole row; `sections` pairs turn with time, height and width.

    arXiv 2409.12191, section 2.1; transformers' `apply_multimodal_rotary_pos_emb` splits the same way.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids_3T.device) / head_dim
    angles_3TF = position_ids_3T.float()[:, :, None] * (1.0 / theta**exponent)
    parts = torch.split(angles_3TF, list(sections), dim=-1)
    angles = torch.cat([part[axis % 3] for axis, part in enumerate(parts)], dim=-1)
    return torch.cat((angles, angles), dim=-1)[:, None, None]


def packed_seq_params(cu_seqlens: torch.Tensor) -> PackedSeqParams:
    longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def replicated_sharded_state_dict(module: torch.nn.Module, prefix: str) -> dict:
    """State of a module that every TP and DP rank holds whole, for dist_checkpointing (one replica writes)."""
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    return make_sharded_tensors_for_checkpoint(module.state_dict(prefix="", keep_vars=True), prefix)
