"""New weights for a quantised engine, through vLLM's own layerwise reload (vllm/model_executor/model_loader/reload).

At the start of a round every layer goes back to the format it loads in: unquantised, split as on this tensor-parallel rank,
without memory. A layer gets memory with its first shard. When its last one is verified vLLM quantises it into the storage
that its kernels (and CUDA graphs) read from, and the memory is free again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import _layerwise_process, get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS, materialize_layer

from megatron_agent.errors import WeightSyncError


def loading_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the model's parameters were before quantisation, on the meta device mostly; of tied ones the first name only, as
    `named_parameters` has it."""
    found: dict[str, torch.Tensor] = {}
    tied: set[int] = set()
    for module_name, layer in model.named_modules():
        recorded = get_layerwise_info(layer).restore_metadata[0]
        never_replaced = {leaf: p for leaf, p in layer._parameters.items() if leaf in SKIP_TENSORS and p is not None}
        for leaf, parameter in {**recorded, **never_replaced}.items():
            live = layer._parameters.get(leaf)
            if live is None or id(live) not in tied:
                found[f"{module_name}.{leaf}" if module_name else leaf] = parameter
            tied.add(id(live))
    return found


class LayerwiseReload:
    """One model's reload, round after round. `shapes`: what the plan fills of each parameter, `dtype` what is sent.

    Layers whose scale is common to several tensor-parallel ranks are quantised at the end, by all ranks in one order: vLLM
    reduces such a scale over the ranks, which would wait for one another in the middle of their streams. Until then they
    take memory unquantised ("fp8_per_block" has no such layers).
    """

    def __init__(self, model: torch.nn.Module, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, num_ranks: int) -> None:
        self._model, self._shapes, self._num_ranks = model, shapes, num_ranks
        self._layers = {name: layer for name, layer in model.named_modules() if any(_is_of(name, of) for of in shapes)}
        loading = loading_parameters(model)
        for name, shape in shapes.items():
            parameter, (layer, _) = loading[name], self._owner(name)
            rows = getattr(layer, "num_org_embeddings_per_partition", parameter.shape[0])  # without padding
            if parameter.dtype != dtype or [rows, *parameter.shape[1:]] != list(shape):
                raise WeightSyncError(
                    f"{name} is loaded as {parameter.dtype} {[rows, *parameter.shape[1:]]} before vLLM quantises it, the "
                    f"trainer sends {dtype} {list(shape)}; rollout.quantization needs a checkpoint that is not quantised, "
                    f"of the trainer's model"
                )

    def start(self) -> None:
        initialize_layerwise_reload(self._model)
        self._missing = {name: {of for of in self._shapes if _is_of(name, of)} for name in self._layers}
        self._begun: set[str] = set()
        self._held: set[str] = set()

    def target(self, name: str) -> torch.Tensor:
        """The parameter before quantisation, to write a shard into."""
        layer, leaf = self._owner(name)
        module_name = name.rpartition(".")[0]
        if module_name not in self._begun:
            self._begun.add(module_name)
            materialize_layer(layer, get_layerwise_info(layer))
            for of in self._missing[module_name]:
                parameter = layer._parameters[of.rpartition(".")[2]]
                if list(parameter.shape) != list(self._shapes[of]):
                    parameter.data.zero_()  # rows of padding, which nobody sends
        return layer._parameters[leaf].data

    def whole(self, name: str) -> None:
        """All of a parameter is there and verified."""
        module_name = name.rpartition(".")[0]
        self._missing[module_name].discard(name)
        if self._missing[module_name]:
            return
        if self._waits_for_others(self._layers[module_name]):
            self._held.add(module_name)
        else:
            self._process(self._layers[module_name])

    def finish(self, model_config: Any) -> None:
        """vLLM's own end of a reload: attention layers, and what nobody sent anything for, are as they were. It warns of those
        ("Failed to load weights"): tied heads, tables of positions."""
        with torch.no_grad():
            for name, layer in self._layers.items():
                if name in self._held:
                    self._process(layer)
            finalize_layerwise_reload(self._model, model_config)
            own = set(self._layers.values())
            modules: list[Any] = [layer for layer in self._model.modules() if layer not in own]
            for layer in modules:
                # On CPU a tied head multiplies by a packed copy of the embedding, which the reload does not know of.
                if hasattr(layer, "cpu_linear") and layer.weight.numel():
                    layer.quant_method.process_weights_after_loading(layer)

    @staticmethod
    def _process(layer: torch.nn.Module) -> None:
        _layerwise_process(layer, get_layerwise_info(layer))  # its parameters are filled already, by `target`

    def _waits_for_others(self, layer: torch.nn.Module) -> bool:
        method = getattr(layer, "quant_method", None)
        is_quantised = isinstance(method, QuantizeMethodBase) and not isinstance(
            method, (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
        )
        return self._num_ranks > 1 and is_quantised and not getattr(method, "block_quant", False)

    def _owner(self, name: str) -> tuple[Any, str]:
        module_name, _, leaf = name.rpartition(".")
        return self._layers[module_name], leaf


def _is_of(module_name: str, parameter: str) -> bool:
    return parameter.rpartition(".")[0] == module_name
