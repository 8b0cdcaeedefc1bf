"""Storages emptied in place and refilled. Not covered: pinned memory and CUDA's allocator (no GPU here)."""

import pytest
import torch

from megatron_agent.errors import ConfigError, TrainingError
from megatron_agent.training.offload import Emptied, Offload


def make():
    """Two tensors and a view of the first, in sizes that are no multiple of the chunk's."""
    first = torch.randn(1001)
    return first, first[7:].view(2, -1), torch.arange(333, dtype=torch.bfloat16)


def storages(*tensors):
    return [tensor.untyped_storage() for tensor in tensors]


def test_views_see_the_bytes_again_over_chunk_borders():
    first, view, second = make()
    copies = [tensor.clone() for tensor in (first, view, second)]
    emptied = Emptied(chunk_bytes=512)
    assert emptied.empty(storages(first, second)) == 4 * 1001 + 2 * 333
    assert [s.nbytes() for s in storages(first, view, second)] == [0, 0, 0] and len(emptied.chunks) == 10
    emptied.refill()
    assert all(torch.equal(a, b) for a, b in zip(copies, (first, view, second)))


def test_emptied_twice_and_refilled_twice():
    first, _, second = make()
    copy = first.clone()
    emptied = Emptied(chunk_bytes=512)
    assert emptied.empty(storages(first)) == 4 * 1001
    assert emptied.empty(storages(first)) == 0
    assert emptied.empty(storages(first, second)) == 2 * 333  # added behind the first
    for _ in range(2):
        emptied.refill()
        assert torch.equal(first, copy) and torch.equal(second, torch.arange(333, dtype=torch.bfloat16))


def test_the_host_memory_is_taken_once():
    emptied = Emptied(chunk_bytes=512)
    addresses = []
    for _ in range(3):
        first = torch.randn(1001)
        copy = first.clone()
        emptied.empty(storages(first))
        addresses.append([chunk.data_ptr() for chunk in emptied.chunks])
        emptied.refill()
        assert torch.equal(first, copy)
    assert addresses[0] == addresses[1] == addresses[2]


def test_gradients_come_back_as_zeros():
    grads = torch.randn(1001)
    emptied = Emptied(keep_bytes=False)
    assert emptied.empty(storages(grads)) == 4 * 1001 and not emptied.chunks
    emptied.refill()
    assert torch.equal(grads, torch.zeros(1001))


def test_without_room_all_stay_empty_and_a_second_try_works():
    first, _, second = make()
    copy = first.clone()
    emptied = Emptied(chunk_bytes=512)
    emptied.empty(storages(first, second))
    held = emptied.storages[1]
    emptied.storages[1] = (held[0], 2**60)
    with pytest.raises(TrainingError, match="no room on the device for 1152921504606850980 bytes"):
        emptied.refill()
    assert [s.nbytes() for s in storages(first, second)] == [0, 0]
    emptied.storages[1] = held
    emptied.refill()
    assert torch.equal(first, copy) and torch.equal(second, torch.arange(333, dtype=torch.bfloat16))


def test_an_unknown_choice_is_refused():
    with pytest.raises(ConfigError, match="offload='params'; allowed: none, optimizer, all"):
        Offload(None, "params")
