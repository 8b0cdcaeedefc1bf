"""Which rank of a group serves which replica: nearest holders first, balanced, with relays where those are faster."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from megatron_agent.weights.template import Lane, Template
from megatron_agent.weights.topology import Topology, Traffic

MIN_SPLIT_ELEMENTS = 1 << 18  # smaller boxes are not cut to balance senders; of a small model, this fraction of a shard:
MIN_SPLIT_FRACTION = 1 / 256
RELAY_MARGIN = 1.05  # a plan with more relays must be faster by this factor
BALANCING_SWEEPS = 4


class Flow(NamedTuple):
    """A stretch of a lane that one training rank sends to one replica."""

    rank: int
    lane: int
    replica: int
    start: int
    stop: int


@dataclass(frozen=True)
class Routes:
    """One way to deal the lanes: the first replica of every chain is sent to, each next one gets it from the one before."""

    chains: tuple[tuple[int, ...], ...]
    flows: tuple[Flow, ...]
    traffic: Traffic
    fill_s: float  # until the last replica of the longest chain has its first bucket

    @property
    def seconds(self) -> float:
        """Lower bound of a sync: the busiest link, and the filling of the chains."""
        return self.traffic.busiest_s() + self.fill_s


class Router:
    """Deals the lanes of a template to the ranks of `groups` (training ranks that hold the same) and to `replicas`."""

    def __init__(
        self, template: Template, groups: Sequence[Sequence[int]], replicas: int, topology: Topology, element_bytes: int
    ) -> None:
        self.template, self.groups, self.replicas = template, groups, replicas
        self.topology, self.element_bytes = topology, element_bytes
        self.tensor_parallel = len(template.shapes)
        self._min_split = min(MIN_SPLIT_ELEMENTS, int(min(template.sizes) * MIN_SPLIT_FRACTION))
        self._of_groups: dict[tuple[int, ...], _Holders] = {}

    def candidates(self, relay: bool) -> dict[int, Routes]:
        """By number of chains: the fan-out, and with `relay` those worth costing."""
        fan_out = self._routes(self.replicas)
        return {self.replicas: fan_out} | {n: self._routes(n) for n in (self._chain_counts(fan_out) if relay else [])}

    def _chain_counts(self, fan_out: Routes) -> list[int]:
        """Numbers of chains worth costing: powers of two, and the most that the senders carry while receivers are busy."""
        counts = {1 << i for i in range(self.replicas.bit_length())}
        busiest_s = fan_out.traffic.busiest_s("_out")
        if busiest_s:
            counts.add(int(self.replicas * fan_out.traffic.busiest_s("_in") / busiest_s))
        return sorted(n for n in counts if 0 < n < self.replicas)

    def _routes(self, num_chains: int) -> Routes:
        bounds = [self.replicas * i // num_chains for i in range(num_chains + 1)]
        chains = tuple(tuple(range(first, last)) for first, last in pairwise(bounds))
        flows = self._deal([chain[0] for chain in chains])
        traffic, tp, fill_s = Traffic(self.topology), self.tensor_parallel, 0.0
        for flow in flows:
            target = flow.replica * tp + self.template.lanes[flow.lane].tensor_rank
            traffic.send(flow.rank, target, (flow.stop - flow.start) * self.element_bytes)
        for chain in chains:
            chain_s = 0.0
            for before, after in pairwise(chain):
                hops = [(before * tp + rank, after * tp + rank) for rank in range(tp)]
                for rank, hop in enumerate(hops):
                    traffic.relay(*hop, self.template.sizes[rank] * self.element_bytes)
                places = [(self.topology.rollout[a], self.topology.rollout[b]) for a, b in hops]
                chain_s += max(self.topology.seconds(self.topology.bucket_bytes, *pair) for pair in places)
                chain_s += self.topology.hop_latency_s
            fill_s = max(fill_s, chain_s)
        return Routes(chains, tuple(flows), traffic, fill_s)

    def _deal(self, heads: Sequence[int]) -> list[Flow]:
        """Every lane to every head, over the ranks that are nearest, balanced among those."""
        pools: dict[tuple[tuple[int, ...], int | None], _Pool] = {}
        flows = []
        for replica in heads:
            for index, lane in enumerate(self.template.lanes):
                holders = self._holders(lane.groups)
                place = self.topology.rollout[replica * self.tensor_parallel + lane.tensor_rank]
                if place in holders.at:
                    flows.append(Flow(holders.at[place], index, replica, 0, lane.size))
                    continue
                node = place.node if place.node in holders.on_node else None
                key = (lane.groups, node)
                if key not in pools:
                    ranks = holders.ranks if node is None else holders.on_node[node]
                    pools[key] = _Pool(ranks, "nic" if node is None else "nvlink")
                pools[key].units.append((replica, index))
                pools[key].size += lane.size
        balance([pools[key] for key in sorted(pools, key=lambda k: (len(pools[k].ranks), k[0], -1 if k[1] is None else k[1]))])
        for pool in pools.values():
            flows += pool.flows(self.template.lanes, self._min_split)
        return flows

    def _holders(self, groups: tuple[int, ...]) -> _Holders:
        if groups not in self._of_groups:
            ranks = sorted(rank for group in groups for rank in self.groups[group])
            self._of_groups[groups] = _Holders(tuple(ranks), self.topology)
        return self._of_groups[groups]


def cheapest(candidates: dict[int, Routes]) -> Routes:
    """The one with fewest relays among those nearly as fast as the fastest."""
    fastest = min(routes.seconds for routes in candidates.values())
    return candidates[max(n for n, routes in candidates.items() if routes.seconds <= RELAY_MARGIN * fastest)]


class _Holders:
    """The ranks of a set of groups, and where they sit."""

    def __init__(self, ranks: tuple[int, ...], topology: Topology) -> None:
        self.ranks = ranks
        self.at = {topology.training[rank]: rank for rank in ranks}
        on_node = defaultdict(list)
        for rank in ranks:
            on_node[topology.training[rank].node].append(rank)
        self.on_node = {node: tuple(members) for node, members in on_node.items()}


class _Pool:
    """Whole lanes to be sent to some replicas by some ranks, each of which holds all of it; sizes in elements."""

    def __init__(self, ranks: tuple[int, ...], link: str) -> None:
        self.ranks, self.link, self.size = ranks, link, 0
        self.units: list[tuple[int, int]] = []  # (replica, lane)
        self.shares = [0] * len(ranks)

    def flows(self, lanes: Sequence[Lane], min_split: int) -> list[Flow]:
        """The units laid end to end and cut by the shares: a rank sends to few receivers."""
        found, dealt, sender = [], 0, 0
        stop_of_sender = self.shares[0]
        for replica, index in self.units:
            size, start = lanes[index].size, 0
            while start < size:
                while dealt + start >= stop_of_sender and sender + 1 < len(self.ranks):
                    sender += 1
                    stop_of_sender += self.shares[sender]
                last = sender + 1 == len(self.ranks)
                stop = size if last else lanes[index].snap(min(size, stop_of_sender - dealt), min_split)
                if stop > start:
                    found.append(Flow(self.ranks[sender], index, replica, start, stop))
                    start = stop
                elif not last:  # the cut was moved back to where this stretch begins
                    sender += 1
                    stop_of_sender += self.shares[sender]
            dealt += size
        return found


def balance(pools: Sequence[_Pool]) -> None:
    """Set the shares of all pools so that the load of every rank is as equal as can be, for each kind of link.

    Pools share ranks (a rank sends its own shards and some of what is replicated), so each is refilled in turn, given
    the others, until that settles.
    """
    loads: dict[tuple[str, int], int] = defaultdict(int)
    for _ in range(BALANCING_SWEEPS):
        for pool in pools:
            keys = [(pool.link, rank) for rank in pool.ranks]
            for key, share in zip(keys, pool.shares):
                loads[key] -= share
            pool.shares = water_fill([loads[key] for key in keys], pool.size)
            for key, share in zip(keys, pool.shares):
                loads[key] += share


def water_fill(loads: Sequence[int], amount: int) -> list[int]:
    """Shares of `amount` that leave the highest of loads + shares as low as it can be."""
    order = sorted(range(len(loads)), key=lambda i: (loads[i], i))
    total = 0
    for count, index in enumerate(order, 1):
        total += loads[index]
        if count == len(order) or loads[order[count]] * count - total >= amount:
            break
    level, rest = divmod(amount + total, count)
    shares = [0] * len(loads)
    for at, index in enumerate(order[:count]):
        shares[index] = level - loads[index] + (at < rest)
    return shares
