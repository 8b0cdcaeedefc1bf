"""Where training ranks and rollout ranks sit, and how many bytes a set of transfers puts on every link between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_agent.errors import ConfigError

BYTES_PER_S = 1e9 / 8  # of one Gbit/s


class Place(NamedTuple):
    """One device (a GPU, or a process on a machine without); two ranks at the same place are colocated."""

    node: int
    device: int


class Link(NamedTuple):
    """One direction of one port of a device: "nic_out", "nic_in", "nvlink_out" or "nvlink_in"."""

    kind: str
    place: Place

    def __str__(self) -> str:
        return f"{self.kind} of node {self.place.node} device {self.place.device}"


@dataclass(frozen=True)
class Topology:
    """The place of every rank and the speed of the links, in Gbit/s of one device and one direction.

    A rollout rank is numbered replica x tensor_parallel + tensor-parallel rank.
    """

    training: tuple[Place, ...]
    rollout: tuple[Place, ...]
    nic_gbps: float = 400.0
    nvlink_gbps: float = 3600.0
    bucket_bytes: int = 64 << 20  # what a relay must have received before it sends it on
    hop_latency_s: float = 5e-5  # of a bucket on its way over one relay, besides its transfer

    def __post_init__(self) -> None:
        for name in ("nic_gbps", "nvlink_gbps", "bucket_bytes"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)}: give a number above 0")
        for side in ("training", "rollout"):
            twice = [place for place, count in Counter(getattr(self, side)).items() if count > 1]
            if twice:
                raise ConfigError(f"two {side} ranks sit on node {twice[0].node} device {twice[0].device}: one per device")

    @classmethod
    def regular(
        cls,
        num_training: int,
        num_rollout: int,
        gpus_per_node: int = 8,
        colocated: bool = False,
        nic_gbps: float = 400.0,
        nvlink_gbps: float = 3600.0,
    ) -> Topology:
        """Ranks fill the nodes in order; rollout ranks begin at the first GPU (colocated) or after the last trainer."""
        if gpus_per_node < 1:
            raise ConfigError(f"gpus_per_node={gpus_per_node}: a node has 1 GPU or more")
        first = 0 if colocated else num_training
        training = tuple(Place(*divmod(i, gpus_per_node)) for i in range(num_training))
        rollout = tuple(Place(*divmod(first + i, gpus_per_node)) for i in range(num_rollout))
        return cls(training, rollout, nic_gbps, nvlink_gbps)

    @property
    def num_devices(self) -> int:
        return len({*self.training, *self.rollout})

    def link(self, source: Place, target: Place) -> str:
        """What carries bytes between two devices: "local", "nvlink" or "nic"."""
        if source == target:
            return "local"
        return "nvlink" if source.node == target.node else "nic"

    def seconds(self, num_bytes: float, source: Place, target: Place) -> float:
        """At the full speed of the link; within a device it takes none."""
        kind = self.link(source, target)
        return 0.0 if kind == "local" else num_bytes / ((self.nvlink_gbps if kind == "nvlink" else self.nic_gbps) * BYTES_PER_S)


def place_ranks(training: Sequence[tuple[str, str]], rollout: Sequence[tuple[str, str]]) -> Topology:
    """From (host, device) of every rank, as the ranks themselves say it; hosts and devices are numbered as they appear."""
    hosts: dict[str, int] = {}
    devices: dict[tuple[str, str], int] = {}

    def place(host: str, device: str) -> Place:
        node = hosts.setdefault(host, len(hosts))
        return Place(node, devices.setdefault((host, device), sum(known == host for known, _ in devices)))

    return Topology(tuple(place(*rank) for rank in training), tuple(place(*rank) for rank in rollout))


@dataclass
class Traffic:
    """Bytes on every link. Copies within a device take no link and are counted apart."""

    topology: Topology
    links: Counter[Link] = field(default_factory=Counter)
    sent: Counter[int] = field(default_factory=Counter)  # wire bytes by training rank
    relayed: Counter[int] = field(default_factory=Counter)  # wire bytes by rollout rank
    local_bytes: int = 0

    def send(self, rank: int, rollout_rank: int, num_bytes: int) -> None:
        """From a training rank."""
        if self._carry(self.topology.training[rank], self.topology.rollout[rollout_rank], num_bytes):
            self.sent[rank] += num_bytes

    def relay(self, from_rank: int, to_rank: int, num_bytes: int) -> None:
        """From one rollout rank to the next."""
        if self._carry(self.topology.rollout[from_rank], self.topology.rollout[to_rank], num_bytes):
            self.relayed[from_rank] += num_bytes

    def _carry(self, source: Place, target: Place, num_bytes: int) -> bool:
        kind = self.topology.link(source, target)
        if kind == "local":
            self.local_bytes += num_bytes
            return False
        self.links[Link(f"{kind}_out", source)] += num_bytes
        self.links[Link(f"{kind}_in", target)] += num_bytes
        return True

    def seconds(self, link: Link) -> float:
        gbps = self.topology.nic_gbps if link.kind.startswith("nic") else self.topology.nvlink_gbps
        return self.links[link] / (gbps * BYTES_PER_S)

    def busiest(self, suffix: str = "") -> Link | None:
        """The link that takes longest, of those whose kind ends so ("_in", "_out"); the first of equals. None: no wire."""
        links = [link for link, num_bytes in self.links.items() if num_bytes and link.kind.endswith(suffix)]
        return min(links, key=lambda link: (-self.seconds(link), link), default=None)

    def busiest_s(self, suffix: str = "") -> float:
        link = self.busiest(suffix)
        return self.seconds(link) if link else 0.0
