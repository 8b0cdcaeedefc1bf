"""Runs inside vLLM's worker processes only, which import it by name before they build the weight-transfer engine.

Those processes are spawned and know nothing of what their parent registered; an installed package reaches them through
vLLM's plugin entry point, a source checkout only through this import. Hence the registration at import time.
"""

from __future__ import annotations

import importlib
from typing import Any

receiver: Any = importlib.import_module("megatron_agent.weights.receiver")
receiver.register()


class WorkerExtension:
    """Methods that vLLM mixes into its worker; called by name through `collective_rpc`."""

    model_runner: Any  # vLLM's, of the worker this is mixed into

    def describe_parameters(self) -> dict[str, tuple[int, ...] | None]:
        """Name -> shape of this worker's parameters, vocabularies without their padding; None: packed by the CPU backend."""
        model = self.model_runner.get_model()
        modules, shapes = dict(model.named_modules()), {}
        for name, parameter in model.named_parameters():
            owner = modules[name.rpartition(".")[0]]
            rows = getattr(owner, "num_org_embeddings_per_partition", None)
            shape = tuple(parameter.shape) if rows is None else (rows, *parameter.shape[1:])
            shapes[name] = shape if parameter.numel() or rows == 0 else None
        return shapes

    def place(self) -> tuple[str, str]:
        """(host, device), as weights/topology.py counts them."""
        return receiver.place()

    def encoded_pictures(self) -> int:
        """How many pictures the vision tower has encoded since the last call; the first call starts the count."""
        model = self.model_runner.get_model()
        if "num_encoded" not in vars(model):
            model.num_encoded, embed = 0, model.embed_multimodal

            def counting(**arguments: Any) -> Any:
                model.num_encoded += len(arguments["image_grid_thw"])
                return embed(**arguments)

            model.embed_multimodal = counting
        found, model.num_encoded = model.num_encoded, 0
        return found
