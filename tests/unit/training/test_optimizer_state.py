"""Flat ranges as boxes; the optimizer's state on real ranks is tests/distributed/test_resume.py's."""

import torch

from megatron_agent.models.mapping import as_index
from megatron_agent.training.optimizer_state import flat_boxes


def test_boxes_of_a_range():
    """Every range of a small tensor, cut into boxes, gives back its elements in order."""
    for shape in ((7,), (3, 4), (2, 3, 4), (3, 1, 2), (1, 5)):
        tensor = torch.arange(torch.Size(shape).numel()).view(shape)
        for start in range(tensor.numel() + 1):
            for stop in range(start, tensor.numel() + 1):
                boxes = flat_boxes(start, stop, shape)
                found = [int(x) for box in boxes for x in tensor[as_index(box)].flatten()]
                assert found == list(range(start, stop)) and len(boxes) <= 2 * len(shape) - 1, (shape, start, stop)
