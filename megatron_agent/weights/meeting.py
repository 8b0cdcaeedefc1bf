"""Where senders and receivers of weights find each other, on one host or many.

The driver keeps a key-value store (torch's TCPStore). Every receiver opens a door, a listening socket, and writes into
the store where it is; senders look it up and connect. The connections carry no weights: they order the memory, wake the
other side and end when that dies. Both sides prove that they know the round's key before a message is read
(multiprocessing.connection).
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import socket
import struct
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path

import torch
from torch.distributed import TCPStore

from megatron_agent.errors import ConfigError, WeightSyncError
from megatron_agent.types import TRANSPORTS, SyncRound

STORE_TIMEOUT = timedelta(seconds=60)
SILENCE_S = 30
SHARED_MEMORY = Path("/dev/shm")
PROCESS = uuid.uuid4().hex[:12]  # a restarted engine is another one


@functools.cache
def host_name() -> str:
    """The same for two processes exactly when they share memory: of one boot of a machine and one /dev/shm (two
    containers of one machine have each its own)."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    shared = os.stat(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
    return f"{boot.read_text().strip() if boot.is_file() else socket.gethostname()}/{shared and (shared.st_dev, shared.st_ino)}"


def place() -> tuple[str, str]:
    """(host, device) of this process: a GPU, or the process itself."""
    if torch.cuda.is_available():
        return host_name(), str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    return host_name(), f"process {PROCESS}"


@dataclass(frozen=True)
class Announcement:
    """What a receiver says of itself: its door, its host, and into how many streams its memory for buckets is shared."""

    address: list  # [host name or IP, port]
    host: str
    process: str
    on_gpu: bool
    num_streams: int


class Meeting:
    """A rank's view of a round: who is where, and connections to them."""

    def __init__(self, sync_round: SyncRound) -> None:
        self.round, self.transport = sync_round, sync_round.transport
        self.store = _store(sync_round.host, sync_round.port)
        self._key = sync_round.key.encode()

    def new_store(self) -> TCPStore:
        """One that nobody else waits on."""
        return TCPStore(self.round.host, self.round.port, is_master=False, wait_for_workers=False, timeout=STORE_TIMEOUT)

    def local_address(self) -> str:
        """The address of this process that the driver's host, and so the other ranks, can reach."""
        with socket.create_connection((self.round.host, self.round.port)) as connection:
            return connection.getsockname()[0]

    @property
    def is_over(self) -> bool:
        """Who has not come by now will not come any more."""
        return self.store.check([self._name("over")])

    def announce(self, dst_rank: int, announcement: Announcement) -> None:
        self.store.set(self._name(dst_rank), json.dumps(asdict(announcement)))

    def find(self, dst_rank: int) -> Announcement | None:
        """None: its door is not open yet."""
        name = self._name(dst_rank)
        return Announcement(**json.loads(self.store.get(name))) if self.store.check([name]) else None

    def connect(self, to: Announcement) -> Connection:
        """Raises OSError where nobody answers there any more."""
        connection = _connection(socket.create_connection((to.address[0], to.address[1])))
        answer_challenge(connection, self._key)
        deliver_challenge(connection, self._key)
        return connection

    def welcome(self, connection: Connection) -> None:
        """The other half of `connect`."""
        deliver_challenge(connection, self._key)
        answer_challenge(connection, self._key)

    def _name(self, key: str | int) -> str:
        return f"{self.round.name}/{key}"


class Door:
    """Where one receiver of a round is met."""

    def __init__(self, meeting: Meeting, dst_rank: int, num_streams: int) -> None:
        self.meeting = meeting
        address = meeting.local_address()
        self.socket = socket.create_server((address, 0), backlog=num_streams)
        here = [address, self.socket.getsockname()[1]]
        meeting.announce(dst_rank, Announcement(here, host_name(), PROCESS, torch.cuda.is_available(), num_streams))

    def accept(self) -> Connection:
        """Raises OSError (AuthenticationError is turned into one): who came is gone, or does not know the key."""
        connection = _connection(self.socket.accept()[0])
        try:
            self.meeting.welcome(connection)
        except (AuthenticationError, EOFError, OSError) as error:
            connection.close()
            raise ConnectionError(f"a stranger at the door: {error}") from None
        return connection

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


class MeetingPoint:
    """The driver's store; it lives as long as this object. `host` must be reachable from all ranks.

    Raises WeightSyncError where no port can be opened.
    """

    def __init__(self, host: str = "127.0.0.1", transport: str = "auto") -> None:
        check_transport(transport)
        self.host, self.transport = host, transport
        try:
            self.store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=STORE_TIMEOUT)
        except RuntimeError as error:
            raise WeightSyncError(f"no port for the weight transfer can be opened on {host}: {error}") from error

    def open(self) -> SyncRound:
        return SyncRound(self.host, self.store.port, uuid.uuid4().hex[:12], secrets.token_hex(16), self.transport)

    def over(self, sync_round: SyncRound) -> None:
        """One side has ended: the other must not wait for it any longer."""
        self.store.set(f"{sync_round.name}/over", "1")

    def forget(self, sync_round: SyncRound, dst_ranks: Iterable[int]) -> None:
        """Nobody asks for this round any more."""
        for key in ("over", *dst_ranks):
            self.store.delete_key(f"{sync_round.name}/{key}")


def check_transport(name: str) -> None:
    if name not in TRANSPORTS:
        raise ConfigError(f"rollout.weight_transport={name!r}; allowed: {', '.join(TRANSPORTS)}")


@functools.lru_cache(maxsize=2)
def _store(host: str, port: int) -> TCPStore:
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=STORE_TIMEOUT)


def _connection(opened: socket.socket) -> Connection:
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a message is a question, its answer is waited for
    opened.setblocking(True)
    # Messages are short and read when they are there; a stranger who says nothing must not hold the door.
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", SILENCE_S, 0))
    return Connection(opened.detach())
