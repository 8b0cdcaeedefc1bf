"""Buckets between senders and receivers that are threads here, and what happens when one of them fails.

Not covered: CUDA IPC; receivers in other processes (tests/distributed/test_checkpoints.py, tests/integration).
"""

import threading
from math import prod

import pytest
import torch

from megatron_agent.errors import WeightSyncError
from megatron_agent.models.mapping import as_index
from megatron_agent.types import ShardCopy
from megatron_agent.weights import transport
from megatron_agent.weights.transport import ABORTED, buckets, checksum, cut, receive_all, send_all, shared_folder

PARAMETERS = [  # of two senders
    {"a": (40, 30), "b": (17,), "c": (3, 5, 7)},
    {"a": (40, 30), "d": (64, 9)},
]
COPIES = [
    ShardCopy(0, "a", ((0, 20), (1, 30)), 0, "x", ((0, 20), (0, 29))),
    ShardCopy(1, "a", ((20, 40), (0, 29)), 0, "x", ((20, 40), (0, 29))),
    ShardCopy(0, "b", ((1, 17),), 0, "z", ((0, 16),)),
    ShardCopy(0, "c", ((0, 3), (0, 5), (0, 7)), 1, "c", ((0, 3), (0, 5), (0, 7))),
    ShardCopy(1, "d", ((0, 64), (0, 9)), 1, "y", ((0, 64), (9, 18))),
    ShardCopy(0, "a", ((0, 40), (0, 9)), 1, "v", ((0, 40), (0, 9))),
]


@pytest.fixture
def folder():
    found = shared_folder()  # a socket's path must be short
    yield found
    for file in found.iterdir():
        file.unlink()
    found.rmdir()


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr(transport, "CPU_BUCKET_BYTES", 800)


class Shards:
    """A receiver's parameters."""

    def __init__(self, copies, dtype):
        self.tensors, self.num_written = {}, 0
        for copy in copies:
            old = self.tensors.get(copy.dst_param, torch.zeros([0] * len(copy.dst_slice)))
            shape = [max(n, stop) for n, (_, stop) in zip(old.shape, copy.dst_slice)]
            self.tensors[copy.dst_param] = torch.zeros(shape, dtype=dtype)

    def write(self, copy, values):
        place = self.tensors[copy.dst_param][as_index(copy.dst_slice)]
        place.copy_(values)
        return place

    def written(self, copy):
        self.num_written += prod(copy.shape)


def run(folder, sinks, dtype=torch.float32, senders=(0, 1), deadline_s=20.0):
    """-> each sender's failures, and each receiver's error."""
    params = [{name: torch.randn(shape).to(dtype) for name, shape in of_rank.items()} for of_rank in PARAMETERS]
    lost, errors = {}, {}

    def send(rank):
        mine = [copy for copy in COPIES if copy.src_rank == rank]
        lost[rank] = send_all(folder, mine, params[rank], deadline_s)

    def receive(rank):
        try:
            receive_all(folder, rank, [copy for copy in COPIES if copy.dst_rank == rank], sinks[rank], deadline_s)
        except WeightSyncError as error:
            errors[rank] = str(error)

    threads = [threading.Thread(target=send, args=(rank,)) for rank in senders]
    threads += [threading.Thread(target=receive, args=(rank,)) for rank in sinks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return params, lost, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_arrives(folder, dtype):
    sinks = {rank: Shards([c for c in COPIES if c.dst_rank == rank], dtype) for rank in (0, 1)}
    params, lost, errors = run(folder, sinks, dtype)
    assert lost == {0: {}, 1: {}} and errors == {}
    for copy in COPIES:
        found = sinks[copy.dst_rank].tensors[copy.dst_param][as_index(copy.dst_slice)]
        assert torch.equal(found, params[copy.src_rank][copy.src_param][as_index(copy.src_slice)])
    sizes = {rank: sum(prod(c.shape) for c in COPIES if c.dst_rank == rank) for rank in (0, 1)}
    assert {rank: sink.num_written for rank, sink in sinks.items()} == sizes


def test_wrong_bytes_are_named_on_both_sides_and_the_other_receiver_gets_its_own(folder):
    class Broken(Shards):
        def write(self, copy, values):
            place = super().write(copy, values)
            if copy.dst_param == "y" and copy.dst_slice[0][0] > 30:
                place[0, 0] += 1e-6
            return place

    sinks = {rank: (Broken if rank else Shards)([c for c in COPIES if c.dst_rank == rank], torch.float32) for rank in (0, 1)}
    _, lost, errors = run(folder, sinks)
    assert set(errors) == {1} and "parameter y ((" in errors[1] and "from training rank 1: wrong bytes" in errors[1]
    assert "wrong bytes arrived" in lost[1][1] and 0 not in lost[0] and 0 not in lost[1]
    assert sinks[0].num_written == sum(prod(c.shape) for c in COPIES if c.dst_rank == 0)


def test_a_receiver_that_dies_in_the_middle(folder):
    class Dying(Shards):
        def write(self, copy, values):
            if self.num_written > 500:
                raise ConnectionResetError("killed")
            return super().write(copy, values)

    sinks = {rank: (Dying if rank else Shards)([c for c in COPIES if c.dst_rank == rank], torch.float32) for rank in (0, 1)}
    _, lost, errors = run(folder, sinks)
    assert set(errors) == {1} and any("rollout rank 1 went away" in why for of in lost.values() for why in of.values())
    assert all(set(of) <= {1} for of in lost.values())


def test_who_never_comes(folder):
    """The driver says that it is over: a sender whose receiver died before the round, and receivers without a sender."""
    (folder / ABORTED).touch()
    _, lost, _ = run(folder, {})
    assert lost[0].keys() == lost[1].keys() == {0, 1} and "did not open its end" in lost[0][1]
    sinks = {0: Shards([c for c in COPIES if c.dst_rank == 0], torch.float32)}
    _, _, errors = run(folder, sinks, senders=())
    assert "training ranks [0, 1] did not send everything" in errors[0]


def test_a_deadline(folder):
    _, lost, _ = run(folder, {}, deadline_s=0.2)
    assert "no answer from rollout rank 1" in lost[0][1]


@pytest.mark.parametrize("max_elements", [1, 7, 29, 100, 10_000])
def test_buckets_are_bounded_and_cover_everything(max_elements):
    found = buckets(COPIES[:1] + COPIES[5:], max_elements)
    assert all(0 < sum(prod(c.shape) for c in bucket) <= max_elements for bucket in found)
    seen = torch.zeros(2, 40, 30)
    for copy in (copy for bucket in found for copy in bucket):
        assert [b - a for a, b in copy.src_slice] == [b - a for a, b in copy.dst_slice]
        seen[int(copy.dst_param == "v")][as_index(copy.src_slice)] += 1
    expected = torch.zeros(2, 40, 30)
    expected[0, 0:20, 1:30] = 1
    expected[1, 0:40, 0:9] = 1
    assert torch.equal(seen, expected)


def test_a_copy_that_fits_is_not_cut():
    assert list(cut(COPIES[0], 580)) == [COPIES[0]]
    assert [copy.dst_slice for copy in cut(COPIES[0], 300)] == [((0, 10), (0, 29)), ((10, 20), (0, 29))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (3, 5), (2, 3, 8)])
def test_checksum_sees_the_values_not_where_they_lie(shape, dtype):
    tensor = torch.randn(shape).to(dtype)
    wide = torch.zeros([n + 2 for n in shape], dtype=dtype)
    place = wide[tuple(slice(1, n + 1) for n in shape)]
    place.copy_(tensor)
    assert checksum(place) == checksum(tensor) == checksum(tensor.clone())
    turned = tensor.flip(0)
    assert checksum(turned) != checksum(tensor)
    for index in range(tensor.numel()):
        changed = tensor.clone().flatten()
        changed[index] = torch.nextafter(changed[index].float(), torch.tensor(1e9)).to(dtype) if dtype == torch.float32 else 9
        assert checksum(changed.view(shape)) != checksum(tensor)


def test_shared_folders_are_fresh():
    a, b = shared_folder(), shared_folder()
    try:
        assert a != b and a.is_dir() and not list(a.iterdir())
    finally:
        a.rmdir()
        b.rmdir()
