"""Streams of buckets from training ranks to rollout ranks, and on from one engine to the next, while all of them work.

A sender copies slices of its parameters into one of two slots, and says so; the receiver copies them to where they belong,
compares checksums, passes the bucket on where its engine relays, and gives the slot back. What carries the bytes is
chosen per pair of ranks (carriers.py).
"""

from __future__ import annotations

import contextlib
import selectors
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from typing import Protocol

import torch

from megatron_agent.errors import WeightSyncError
from megatron_agent.models.mapping import as_index
from megatron_agent.types import ShardCopy
from megatron_agent.weights.buckets import buckets, checksum, num_elements, views
from megatron_agent.weights.carriers import NUM_SLOTS, Grouped, Hello, Shared, drop, join, open_receiver, open_sender
from megatron_agent.weights.meeting import Door, Meeting

DEADLINE_S = 600.0
CONNECT_POLL_S, OVER_POLL_S = 0.005, 0.5
LONGEST_POLL_S = 0.1
Sums = list[int]


class Outgoing:
    """One sender's stream to one receiver. consumes: buckets. waits for: the receiver's door, then a free slot.
    unblocked by: the receiver, or the end of the round. produces: filled slots with checksums."""

    hello: Hello
    carrier: Shared | Grouped
    connection: Connection

    def __init__(self, meeting: Meeting, copies: Sequence[ShardCopy], dtype: torch.dtype, num_streams: int) -> None:
        self.meeting, self.copies, self.dtype, self.num_streams = meeting, copies, dtype, num_streams
        self.src_rank, self.dst_rank = copies[0].src_rank, copies[0].dst_rank
        self.slot_elements: int | None = None  # as this rank's memory for buckets allows
        self.buckets: list[list[ShardCopy]] = []
        self.next, self.free = 0, list(range(NUM_SLOTS))
        self.is_connected, self.failure = False, ""

    @property
    def is_done(self) -> bool:
        return bool(self.failure) or (self.is_connected and self.next == len(self.buckets) and len(self.free) == NUM_SLOTS)

    @property
    def can_send(self) -> bool:
        return self.is_connected and not self.failure and bool(self.free) and self.next < len(self.buckets)

    def connect(self) -> bool:
        """Whether the receiver is there by now."""
        to = self.meeting.find(self.dst_rank)
        if to is None:
            if self.meeting.is_over:
                self.failure = f"rollout rank {self.dst_rank} did not open its end of the weight sync"
            return False
        pair = (self.src_rank, self.dst_rank)
        try:
            self.carrier, self.hello = open_sender(self.meeting, to, pair, self.dtype, self.num_streams, self.slot_elements)
            self.connection = self.meeting.connect(to)
            self.is_connected = True
            self.connection.send(self.hello)
            join(self.carrier, self.hello, self.meeting)
        except WeightSyncError as error:
            self.failure = str(error)
        except (OSError, EOFError, AuthenticationError, RuntimeError) as error:  # RuntimeError: torch's
            self._fail(error)
        else:
            self.buckets = buckets(self.copies, self.hello.max_elements)
        return not self.failure

    def send(self, fill: Callable[[torch.Tensor, list[ShardCopy]], Sums]) -> None:
        """The next bucket; `fill` writes it into a slot [elements] and returns its checksums."""
        slot, bucket = self.free.pop(), self.buckets[self.next]
        sums = fill(self.carrier.slots[slot], bucket)
        if self.carrier.slots.is_cuda and isinstance(self.carrier, Shared):
            torch.cuda.synchronize()  # the other process reads without knowing our streams
        self.next += 1
        try:
            self.connection.send((slot, sums))
            self.carrier.send(slot, num_elements(bucket))
        except (OSError, RuntimeError) as error:
            self._fail(error)

    def hear(self) -> None:
        """A slot comes back, or the receiver's complaint."""
        try:
            word = self.connection.recv()
        except (OSError, EOFError) as error:
            self._fail(error)
            return
        if isinstance(word, str):
            self.failure = word
        else:
            self.free.append(word)

    def _fail(self, error: Exception) -> None:
        self.failure = f"rollout rank {self.dst_rank} went away in the middle of a weight sync: {error!r}"

    def close(self) -> None:
        if self.is_connected:
            self.connection.close()
        if hasattr(self, "carrier"):
            self.carrier.close()
            if self.failure:
                drop(self.hello)


def send_all(
    meeting: Meeting,
    copies: Sequence[ShardCopy],
    parameters: Mapping[str, torch.Tensor],
    only: frozenset[int] | None = None,
    deadline_s: float = DEADLINE_S,
) -> dict[int, str]:
    """Everything that this rank sends in a round, to all its receivers (of `only`) at once -> rollout rank: why it did not
    get it. One receiver's failure does not keep the bytes from the others."""
    by_target: dict[int, list[ShardCopy]] = {}
    for copy in copies:
        if only is None or copy.dst_rank in only:
            by_target.setdefault(copy.dst_rank, []).append(copy)

    def fill(slot: torch.Tensor, bucket: list[ShardCopy]) -> Sums:
        sums = []
        for copy, view in views(slot, bucket):
            source = parameters[copy.src_param][as_index(copy.src_slice)]
            view.copy_(source)
            sums.append(checksum(source))
        return sums

    with contextlib.ExitStack() as stack, torch.no_grad(), selectors.DefaultSelector() as selector:
        streams = [
            Outgoing(meeting, target, parameters[target[0].src_param].dtype, len(by_target)) for target in by_target.values()
        ]
        for stream in streams:
            stack.callback(stream.close)
        deadline, poll_s = time.monotonic() + deadline_s, CONNECT_POLL_S
        while unfinished := [stream for stream in streams if not stream.is_done]:
            poll_s = _connect(unfinished, selector, poll_s)
            has_sent = False
            for stream in unfinished:  # each gets its bucket, not the first only
                if stream.can_send:
                    stream.send(fill)
                    has_sent = True
            if has_sent or any(stream.is_done for stream in unfinished):
                timeout = 0.0
            else:
                waits_for_door = not all(stream.is_connected for stream in unfinished)
                timeout = poll_s if waits_for_door else max(0.0, deadline - time.monotonic())
            for key, _ in selector.select(timeout):
                key.data.hear()
                if key.data.is_done:  # the receiver closes its end now
                    selector.unregister(key.fileobj)
            if time.monotonic() > deadline:
                for stream in unfinished:
                    stream.failure = stream.failure or f"no answer from rollout rank {stream.dst_rank} in {deadline_s:.0f} s"
        return {stream.dst_rank: stream.failure for stream in streams if stream.failure}


def _connect(streams: Sequence[Outgoing], selector: selectors.BaseSelector, poll_s: float) -> float:
    """Try the doors that were closed -> how long to wait before the next try (many ranks ask one store)."""
    for stream in streams:
        if not stream.is_connected and stream.connect():
            selector.register(stream.connection, selectors.EVENT_READ, stream)
            poll_s = CONNECT_POLL_S
    return min(LONGEST_POLL_S, poll_s * 1.2)


class Sink(Protocol):
    """Where a receiver's shards go."""

    def write(self, copy: ShardCopy, values: torch.Tensor) -> torch.Tensor:
        """Put values where they belong -> the place, as it lies (its checksum is compared with the sender's)."""

    def written(self, copy: ShardCopy) -> None:
        """What was written is right."""


def receive_all(
    meeting: Meeting,
    dst_rank: int,
    copies: Sequence[ShardCopy],
    sink: Sink,
    relay_to: int | None = None,
    deadline_s: float = DEADLINE_S,
) -> None:
    """Everything that this rank gets in a round, from all its senders at once; `relay_to` is a rollout rank that gets the very
    same from this one.

    Raises WeightSyncError naming the parameter whose bytes are not those that were sent, or the senders that are gone.
    That the rank behind is gone is its own engine's error, not this one's.
    """
    by_source: dict[int, list[ShardCopy]] = {}
    for copy in copies:
        by_source.setdefault(copy.src_rank, []).append(copy)
    with contextlib.ExitStack() as stack, torch.no_grad(), selectors.DefaultSelector() as selector:
        door = stack.enter_context(Door(meeting, dst_rank, len(by_source)))
        selector.register(door.socket, selectors.EVENT_READ)
        streams: dict[int, Incoming] = {}
        deadline, poll_s = time.monotonic() + deadline_s, CONNECT_POLL_S
        try:
            while len(streams) < len(by_source) or not all(stream.is_done for stream in streams.values()):
                behind = [s.relay for s in streams.values() if s.relay is not None and not s.relay.failure]
                poll_s = _connect(behind, selector, poll_s)
                waits_for_door = any(not relay.is_connected for relay in behind)
                for key, _ in selector.select(poll_s if waits_for_door else OVER_POLL_S):
                    if key.data is None:
                        with contextlib.suppress(ConnectionError):  # a stranger
                            stream = Incoming(door.accept(), meeting, by_source, relay_to)
                            stack.callback(stream.close)
                            streams[stream.src_rank] = stream
                            selector.register(stream.connection, selectors.EVENT_READ, stream)
                    elif isinstance(key.data, Outgoing):
                        key.data.hear()
                        if key.data.is_done:
                            selector.unregister(key.fileobj)
                    else:
                        key.data.take(sink)
                        if key.data.has_all:
                            selector.unregister(key.fileobj)
                for stream in streams.values():
                    stream.pass_on()
                if time.monotonic() > deadline or (len(streams) < len(by_source) and meeting.is_over):
                    raise ConnectionError("they did not come" if len(streams) < len(by_source) else "too slow")
        except (OSError, EOFError, RuntimeError) as error:
            missing = sorted(rank for rank in by_source if rank not in streams or not streams[rank].has_all)
            for stream in streams.values():
                stream.complain(f"rollout rank {dst_rank} gave up: {error}")
            if isinstance(error, WeightSyncError):
                raise
            raise WeightSyncError(f"training ranks {missing} did not send everything: {error!r}") from None


class Incoming:
    """One receiver's end of a stream. consumes: filled slots. waits for: the rank behind, when it relays: a slot is given
    back only when it was passed on. produces: verified values in the sink, free slots, the same buckets for `relay`."""

    def __init__(
        self, connection: Connection, meeting: Meeting, by_source: Mapping[int, Sequence[ShardCopy]], relay_to: int | None
    ) -> None:
        self.connection = connection
        self.hello: Hello = connection.recv()
        self.src_rank = self.hello.src_rank
        self.carrier = open_receiver(self.hello, meeting)
        self.buckets = buckets(by_source[self.src_rank], self.hello.max_elements)
        self.next, self.is_whole = 0, False
        self.waiting: list[tuple[int, Sums]] = []  # received, to be passed on: slot, checksums
        self.relay: Relay | None = None
        if relay_to is not None:
            self.relay = Relay(meeting, self, relay_to, len(by_source))

    @property
    def has_all(self) -> bool:
        return self.next == len(self.buckets)

    @property
    def is_done(self) -> bool:
        return self.has_all and not self.waiting and (self.relay is None or self.relay.is_done)

    def take(self, sink: Sink) -> None:
        """The next bucket. Raises WeightSyncError when it is not what was sent."""
        slot, sums = self.connection.recv()
        bucket = self.buckets[self.next]
        self.carrier.receive(slot, num_elements(bucket))
        places = [sink.write(copy, values) for copy, values in views(self.carrier.slots[slot], bucket)]
        if self.carrier.slots.is_cuda:
            torch.cuda.synchronize()
        self.next += 1
        self.waiting.append((slot, sums))
        self.pass_on()  # the sender fills it again while what came is looked at
        for copy, place, expected in zip(bucket, places, sums, strict=True):
            if checksum(place) != expected:
                raise WeightSyncError(
                    f"parameter {copy.dst_param} {copy.dst_slice} from training rank {self.src_rank}: wrong bytes arrived"
                )
            sink.written(copy)

    def pass_on(self) -> None:
        """Give slots back, to be filled again, when the rank behind has a copy or is gone."""
        while self.waiting:
            slot, sums = self.waiting[0]
            if self.relay is not None and not self.relay.failure:
                if not self.relay.can_send:
                    return
                self.relay.send_from(self.carrier.slots[slot], sums)
            self.waiting.pop(0)
            self.connection.send(slot)

    def complain(self, why: str) -> None:
        with contextlib.suppress(OSError):
            self.connection.send(why)

    def close(self) -> None:
        self.connection.close()
        self.carrier.close()
        if not self.has_all:
            drop(self.hello)
        if self.relay is not None:
            self.relay.close()


class Relay(Outgoing):
    """The same stream to the rank behind: whole buckets, with the first sender's checksums."""

    def __init__(self, meeting: Meeting, stream: Incoming, dst_rank: int, num_streams: int) -> None:
        copies = [copy for bucket in stream.buckets for copy in bucket]
        super().__init__(meeting, copies, stream.hello.dtype, num_streams)
        self.dst_rank, self.slot_elements = dst_rank, stream.hello.max_elements  # cut as the first sender cut

    def send_from(self, received: torch.Tensor, sums: Sums) -> None:
        def fill(slot: torch.Tensor, bucket: list[ShardCopy]) -> Sums:
            count = num_elements(bucket)
            slot[:count].copy_(received[:count])
            return sums

        self.send(fill)
