"""Buckets between senders and receivers that are threads here, and what happens when one of them fails.

Not covered: CUDA IPC, NCCL; receivers in other processes (tests/distributed/test_checkpoints.py, tests/integration).
"""

import threading
from dataclasses import replace
from math import prod
from multiprocessing import AuthenticationError
from pathlib import Path

import pytest
import torch

from megatron_agent.errors import ConfigError, WeightSyncError
from megatron_agent.models.mapping import as_index
from megatron_agent.types import ShardCopy
from megatron_agent.weights import carriers
from megatron_agent.weights.buckets import buckets, checksum, cut
from megatron_agent.weights.meeting import Meeting, MeetingPoint
from megatron_agent.weights.transport import receive_all, send_all

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


@pytest.fixture(scope="module")
def point():
    return MeetingPoint()


@pytest.fixture
def sync_round(point):
    return point.open()


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr(carriers, "CPU_BUCKET_BYTES", 800)
    monkeypatch.setattr(carriers, "SMALLEST_SLOT_BYTES", 400)


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


def copies_of(rank):
    """Rollout ranks 0 and 1 get theirs from the trainer; 2 and 4 the same as 0, 3 the same as 1, when they are relayed to."""
    return [replace(copy, dst_rank=rank) for copy in COPIES if copy.dst_rank == rank % 2]


def run(sync_round, sinks, dtype=torch.float32, senders=(0, 1), deadline_s=20.0, relays=None):
    """-> each sender's failures, and each receiver's error. `relays`: rank -> the rank behind."""
    params = [{name: torch.randn(shape).to(dtype) for name, shape in of_rank.items()} for of_rank in PARAMETERS]
    lost, errors = {}, {}

    def send(rank):
        mine = [copy for copy in COPIES if copy.src_rank == rank]
        lost[rank] = send_all(Meeting(sync_round), mine, params[rank], deadline_s=deadline_s)

    def receive(rank):
        try:
            behind = (relays or {}).get(rank)
            receive_all(Meeting(sync_round), rank, copies_of(rank), sinks[rank], behind, deadline_s)
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
@pytest.mark.parametrize("kind", ["shared_memory", "gloo"])
def test_everything_arrives(sync_round, dtype, kind):
    sinks = {rank: Shards(copies_of(rank), dtype) for rank in (0, 1)}
    params, lost, errors = run(replace(sync_round, transport=kind), sinks, dtype)
    assert lost == {0: {}, 1: {}} and errors == {}
    for copy in COPIES:
        found = sinks[copy.dst_rank].tensors[copy.dst_param][as_index(copy.dst_slice)]
        assert torch.equal(found, params[copy.src_rank][copy.src_param][as_index(copy.src_slice)])
    sizes = {rank: sum(prod(c.shape) for c in COPIES if c.dst_rank == rank) for rank in (0, 1)}
    assert {rank: sink.num_written for rank, sink in sinks.items()} == sizes


def test_wrong_bytes_are_named_on_both_sides_and_the_other_receiver_gets_its_own(sync_round):
    class Broken(Shards):
        def write(self, copy, values):
            place = super().write(copy, values)
            if copy.dst_param == "y" and copy.dst_slice[0][0] > 30:
                place[0, 0] += 1e-6
            return place

    sinks = {rank: (Broken if rank else Shards)([c for c in COPIES if c.dst_rank == rank], torch.float32) for rank in (0, 1)}
    _, lost, errors = run(sync_round, sinks)
    assert set(errors) == {1} and "parameter y ((" in errors[1] and "from training rank 1: wrong bytes" in errors[1]
    assert "wrong bytes arrived" in lost[1][1] and 0 not in lost[0] and 0 not in lost[1]
    assert sinks[0].num_written == sum(prod(c.shape) for c in COPIES if c.dst_rank == 0)


@pytest.mark.fault
def test_a_receiver_that_dies_in_the_middle(sync_round):
    class Dying(Shards):
        def write(self, copy, values):
            if self.num_written > 500:
                raise ConnectionResetError("killed")
            return super().write(copy, values)

    sinks = {rank: (Dying if rank else Shards)([c for c in COPIES if c.dst_rank == rank], torch.float32) for rank in (0, 1)}
    _, lost, errors = run(sync_round, sinks)
    assert set(errors) == {1} and any("rollout rank 1 gave up: killed" in why for of in lost.values() for why in of.values())
    assert all(set(of) <= {1} for of in lost.values())


def test_who_never_comes(point, sync_round):
    """The driver says that it is over: a sender whose receiver died before the round, and receivers without a sender."""
    point.over(sync_round)
    _, lost, _ = run(sync_round, {})
    assert lost[0].keys() == lost[1].keys() == {0, 1} and "did not open its end" in lost[0][1]
    sinks = {0: Shards([c for c in COPIES if c.dst_rank == 0], torch.float32)}
    _, _, errors = run(sync_round, sinks, senders=())
    assert "training ranks [0, 1] did not send everything" in errors[0]


def test_a_deadline(sync_round):
    _, lost, _ = run(sync_round, {}, deadline_s=0.2)
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


@pytest.mark.parametrize("kind", ["shared_memory", "gloo"])
def test_engines_pass_on_what_they_get(sync_round, kind):
    sinks = {rank: Shards(copies_of(rank), torch.float32) for rank in range(5)}
    _, lost, errors = run(replace(sync_round, transport=kind), sinks, relays={0: 2, 2: 4, 1: 3})
    assert lost == {0: {}, 1: {}} and errors == {}
    for rank in (2, 3, 4):
        assert sinks[rank].num_written == sinks[rank % 2].num_written > 0
        for name, tensor in sinks[rank % 2].tensors.items():
            assert torch.equal(sinks[rank].tensors[name], tensor) and tensor.any()


@pytest.mark.fault
def test_a_relay_says_who_wrote_wrong_bytes_and_who_is_behind_a_dead_one_learns_it(sync_round):
    class Dying(Shards):
        def write(self, copy, values):
            if self.num_written > 300:
                raise ConnectionResetError("killed")
            return super().write(copy, values)

    sinks = {rank: (Dying if rank == 2 else Shards)(copies_of(rank), torch.float32) for rank in (0, 2, 4, 1)}
    _, lost, errors = run(sync_round, sinks, relays={0: 2, 2: 4})
    assert lost == {0: {}, 1: {}} and set(errors) == {2, 4} and "did not send everything" in errors[4]
    for rank in (0, 1):  # those before it are whole
        assert sinks[rank].num_written == sum(prod(c.shape) for c in copies_of(rank))


def test_a_sender_that_is_gone_is_not_a_file_of_zeros(sync_round):
    file = carriers.shared_file(1024)
    hello = carriers.Hello(0, torch.float32, 128, "shared_memory", file)
    carrier = carriers.open_receiver(hello, Meeting(sync_round))
    carrier.slots[1, 127] = 7.0
    assert torch.from_file(file, shared=True, size=256)[255] == 7.0
    Path(file).unlink()
    with pytest.raises(FileNotFoundError):
        carriers.open_receiver(hello, Meeting(sync_round))
    assert not Path(file).exists()


def test_groups_are_made_once_per_pair_and_anew_after_a_failure(point):
    class Broken(Shards):
        def write(self, copy, values):
            place = super().write(copy, values)
            return place + 1 if copy.dst_param == "y" else place

    kinds = (Shards, Shards, Broken, Shards)
    names = []
    carriers._group_names.clear()
    for kind in kinds:
        run(replace(point.open(), transport="gloo"), {rank: kind(copies_of(rank), torch.float32) for rank in (0, 1)})
        names.append(dict(carriers._group_names))
    assert names[0] == names[1] and len(names[0]) == 4
    changed = {pair[:2] for pair in names[0] if names[3].get(pair) != names[0][pair]}
    assert (1, 1) in changed and (0, 0) not in changed


def test_slots_of_all_streams_together_are_two_buckets():
    assert carriers.slot_elements("gloo", 1, torch.float32) * 4 == 800
    assert carriers.slot_elements("gloo", 2, torch.bfloat16) * 2 == 400
    assert carriers.slot_elements("gloo", 5, torch.float32) * 4 == 400  # but no slot is too small to be worth its message
    assert carriers.slot_elements("nccl", 4, torch.bfloat16) * 2 == carriers.GPU_BUCKET_BYTES // 4


def test_a_transport_that_cannot_be_is_refused(sync_round):
    with pytest.raises(ConfigError, match="allowed: auto, shared_memory"):
        MeetingPoint(transport="carrier_pigeon")
    sinks = {rank: Shards(copies_of(rank), torch.float32) for rank in (0, 1)}
    _, lost, _ = run(replace(sync_round, transport="nccl"), sinks, deadline_s=0.5)
    assert "rollout.weight_transport='nccl' cannot reach" in lost[0][0] and "shared_memory, gloo" in lost[0][0]


def test_a_stranger_does_not_stop_a_round(sync_round):
    """One who connects without the key is sent away; the senders are served."""
    sinks = {rank: Shards(copies_of(rank), torch.float32) for rank in (0, 1)}
    found = []

    def knock():
        meeting = Meeting(replace(sync_round, key="wrong"))
        while (to := meeting.find(0)) is None:
            pass
        with pytest.raises((AuthenticationError, OSError, EOFError)):
            meeting.connect(to)
        found.append(to)

    stranger = threading.Thread(target=knock)
    stranger.start()
    _, lost, errors = run(sync_round, sinks)
    stranger.join(20)
    assert found and lost == {0: {}, 1: {}} and errors == {}
