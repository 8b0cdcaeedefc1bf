"""Trainer ranks without a model: what they write is what real ones write (a file and a part), of one tiny tensor."""

import asyncio
import json

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron_agent.training.layout import Layout
from megatron_agent.training.snapshot import Part, _write

NUM_RANKS = 2


def write_part(folder, rank, value):
    """Row `rank` of a tensor [NUM_RANKS, 3] full of `value`."""
    at = ChunkStorageMetadata(torch.Size([rank, 0]), torch.Size([1, 3]))
    data = TensorWriteData(at, TensorProperties(dtype=torch.float32), torch.Size([NUM_RANKS, 3]))
    item = WriteItem(MetadataIndex("weight", at.offsets), WriteItemType.SHARD, tensor_data=data)
    part = Part(Layout(NUM_RANKS), SavePlan([item]), [], [], 1, {"torch": torch.zeros(1)})
    _write(folder, rank, [(item, torch.full((1, 3), float(value)))], part)


class FakeRanks:
    """The saving half of Actor. Files appear when `go_on` is set; `error` is what a rank raises when it is asked."""

    def __init__(self):
        self.value, self.error, self.go_on = 0, None, asyncio.Event()
        self.go_on.set()
        self.folders, self._writing = [], None

    async def save(self, folder):
        self.folders.append(folder)
        self._writing = asyncio.ensure_future(self._write(folder, self.value))

    async def _write(self, folder, value):
        await self.go_on.wait()
        if self.error is None:
            for rank in range(NUM_RANKS):
                write_part(folder, rank, value)

    async def check_save(self):
        if self.error is not None:
            raise self.error

    async def finish_save(self):
        await self._writing
        await self.check_save()


def write_hf_folder(folder):
    folder.mkdir()
    save_file({"weight": torch.zeros(NUM_RANKS, 3)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny"}))
    (folder / "tokenizer.json").write_text("{}")
    return folder
