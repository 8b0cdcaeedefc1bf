"""Runs inside vLLM's worker processes only, which import it by name before they build the weight-transfer engine.

Those processes are spawned and know nothing of what their parent registered; an installed package reaches them through
vLLM's plugin entry point, a source checkout only through this import. Hence the registration at import time.
"""

from __future__ import annotations

import importlib
from typing import Any

importlib.import_module("megatron_agent.weights.receiver").register()


class WorkerExtension:
    """Methods that vLLM mixes into its worker; called by name through `collective_rpc`."""

    model_runner: Any  # vLLM's, of the worker this is mixed into

    def describe_parameters(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of this worker's parameters; packed ones (CPU backend) have no elements left."""
        return {name: tuple(parameter.shape) for name, parameter in self.model_runner.get_model().named_parameters()}

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
