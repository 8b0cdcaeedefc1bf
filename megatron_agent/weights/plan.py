"""Who sends which slice to whom: a pure function of the mapping table, the training layout, the rollout layout and, when
several devices could send the same bytes, of where the ranks sit.

Two levels. A Template says which boxes go from a group of training ranks that hold the same bytes to a vLLM
tensor-parallel rank. A TransferPlan deals its lanes to the ranks of the groups and to the replicas; every rank computes
that deal (thousands of numbers) and then the copies of its own part only. Both sides derive the same copies in the same
order, so nothing needs to be exchanged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

from megatron_agent.errors import ConfigError, WeightSyncError
from megatron_agent.models.mapping import Entry, Piece, Rule, Shape
from megatron_agent.training.layout import Layout, megatron_pieces, vllm_pieces
from megatron_agent.types import ShardCopy, Slices
from megatron_agent.weights.template import Lane, Template
from megatron_agent.weights.topology import Topology, Traffic

TOWER = "visual."  # what a family calls its tower for pictures (models/base.py)
MIN_SPLIT_ELEMENTS = 1 << 18  # smaller boxes are not cut to balance senders; of a small model, this fraction of a shard:
MIN_SPLIT_FRACTION = 1 / 256
RELAY_MARGIN = 1.05  # a plan with more relays must be faster by this factor
BALANCING_SWEEPS = 4


@dataclass(frozen=True)
class RolloutLayout:
    """`replicas` vLLM engines of `tensor_parallel` ranks each.

    `mm_encoder_tp_mode`, vLLM's name: "weights" splits the vision tower over the tensor-parallel ranks, "data" keeps it
    whole on each.
    """

    tensor_parallel: int = 1
    replicas: int = 1
    mm_encoder_tp_mode: str = "weights"
    pipeline_parallel: int = 1

    def __post_init__(self) -> None:
        for name in ("tensor_parallel", "replicas"):
            if getattr(self, name) < 1:
                raise ConfigError(f"rollout.{name}={getattr(self, name)}: a degree of parallelism is 1 or more")
        if self.pipeline_parallel != 1:
            raise ConfigError(
                f"rollout.pipeline_parallel={self.pipeline_parallel}: weights go to engines without pipeline stages only; "
                f"raise rollout.tensor_parallel instead"
            )
        if self.mm_encoder_tp_mode not in ("weights", "data"):
            raise ConfigError(f"rollout.mm_encoder_tp_mode={self.mm_encoder_tp_mode!r}: one of weights, data")

    @property
    def world_size(self) -> int:
        return self.replicas * self.tensor_parallel

    def table(self, table: Sequence[Entry]) -> list[Entry]:
        """The mapping table as vLLM lays it out in this mode."""
        if self.mm_encoder_tp_mode == "weights":
            return list(table)
        return [replace(e, vllm_rule=Unsplit(e.vllm_rule)) if e.param.startswith(TOWER) else e for e in table]


@dataclass(frozen=True)
class Unsplit:
    """A rule's layout on one rank, on every rank (vLLM's `disable_tp`)."""

    rule: Rule

    def boxes(self, shape: Shape, rank: int, size: int) -> list[tuple[Slices, Slices]]:
        return self.rule.boxes(shape, 0, 1)


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


class TransferPlan:
    """The copies of every rank, for `replicas` engines; a rollout rank is replica x tensor_parallel + tensor rank.

    Senders. A rank on the receiver's own device comes first (no wire), then ranks on its node, then all: among the
    candidates bytes are dealt so that the wire bytes of each are as equal as they can be (big boxes are cut along their
    first dim). What can be equal: the ranks of a group always; groups of one pipeline stage up to what only one of them
    holds (without padding and with Megatron's tensor-parallel size dividing the KV heads: the whole stage); stages hold
    different numbers of bytes by nature, and only a tied embedding, which the first and the last one hold, moves between.

    Replicas. `chains` are groups of replicas: the trainer sends to the first of each, which relays bucket by bucket. As
    many chains as replicas is a fan-out. Taken is the one with fewest relays among those within 5% of the fastest.
    """

    def __init__(
        self,
        template: Template,
        groups: Sequence[Sequence[int]],
        replicas: int,
        topology: Topology,
        element_bytes: int = 2,
        relay: bool = True,
    ) -> None:
        self.template, self.topology, self.element_bytes = template, topology, element_bytes
        self._min_split = min(MIN_SPLIT_ELEMENTS, int(min(template.sizes) * MIN_SPLIT_FRACTION))
        self.replicas, self.tensor_parallel = replicas, len(template.shapes)
        self.groups = [tuple(ranks) for ranks in groups]
        self._group_of = {rank: group for group, ranks in enumerate(self.groups) for rank in ranks}
        self._check_places()
        fan_out = self._routes(replicas)
        self.limit_s = fan_out.traffic.busiest_s("_in")  # the receivers' own links, whoever sends
        self.candidates = {replicas: fan_out}
        for num_chains in self._chain_counts(fan_out) if relay else []:
            self.candidates[num_chains] = self._routes(num_chains)
        fastest = min(routes.seconds for routes in self.candidates.values())
        self.routes = self.candidates[max(n for n, r in self.candidates.items() if r.seconds <= RELAY_MARGIN * fastest)]
        self._next = dict(pair for chain in self.routes.chains for pair in pairwise(chain))
        self._before = {after: before for before, after in self._next.items()}
        self._first = {replica: chain[0] for chain in self.routes.chains for replica in chain}
        self._cache: dict[object, list[ShardCopy]] = {}

    def _check_places(self) -> None:
        for side, places, count in (
            ("training", self.topology.training, len(self._group_of)),
            ("rollout", self.topology.rollout, self.replicas * self.tensor_parallel),
        ):
            if len(places) != count:
                raise ConfigError(f"the topology places {len(places)} {side} ranks, the layout has {count}")

    def sends(self, rank: int) -> list[ShardCopy]:
        """What a training rank sends, by receiver, in the receiver's order of parameters."""
        if rank not in self._cache:
            self._cache[rank] = self._copies(self._flows_by_rank.get(rank, ()))
        return self._cache[rank]

    def receives(self, replica: int, tensor_rank: int) -> list[ShardCopy]:
        """What a rollout rank gets, parameter by parameter. One whose replica `relayed_from` another gets these very copies
        from the same tensor rank of that one; `src_rank` says who sent them first."""
        key = (replica, tensor_rank)
        if key not in self._cache:
            first = self._first[replica]
            copies = self._copies(self._flows_by_target.get((first, tensor_rank), ()))
            if first != replica:
                copies = [replace(copy, dst_rank=replica * self.tensor_parallel + tensor_rank) for copy in copies]
            self._cache[key] = copies
        return self._cache[key]

    def relayed_from(self, replica: int) -> int | None:
        """The replica that sends on to this one; None: the trainer sends to it."""
        return self._before.get(replica)

    def relays_to(self, replica: int) -> int | None:
        return self._next.get(replica)

    def check_engine(self, tensor_rank: int, shapes: Mapping[str, Shape | None]) -> None:
        """Raise WeightSyncError unless these are the parameters that the plan fills on a vLLM rank.

        `shapes`: live ones, a vocabulary without its padding (vLLM's `num_org_embeddings_per_partition` rows); None: not
        known (emptied by the backend), only the name is checked.
        """
        wanted = self.template.shapes[tensor_rank]
        there = {name: shape for name, shape in shapes.items() if shape is None or 0 not in shape}
        missing, unknown = sorted(wanted.keys() - there.keys()), sorted(there.keys() - wanted.keys())
        if missing or unknown:
            raise WeightSyncError(
                f"the trainer's model fills vLLM's parameters {missing[:3]} that the engine lacks ({len(missing)}), the engine "
                f"has {unknown[:3]} that the trainer does not fill ({len(unknown)}); the two sides are of different models"
            )
        for name, shape in there.items():
            if shape is not None and tuple(shape) != wanted[name]:
                raise WeightSyncError(
                    f"{name} of vLLM rank {tensor_rank}: the engine has {tuple(shape)}, the trainer's model {wanted[name]} "
                    f"(vocabularies without padding); the two sides are of different models or vocabularies"
                )

    def describe(self) -> str:
        """One line for the log: the choice and what it costs."""
        chains, traffic = self.routes.chains, self.routes.traffic
        way = "each from the trainer"
        if len(chains) < self.replicas:
            way = f"{len(chains)} from the trainer, relayed along chains of up to {max(map(len, chains))}"
        wire = sum(traffic.sent.values()) + sum(traffic.relayed.values())
        return (
            f"{self.replicas} engines x {self.tensor_parallel}, {way}: {wire / 1e9:.2f} GB over wires, "
            f"{traffic.local_bytes / 1e9:.2f} GB within devices; bound {self.routes.seconds:.3f} s, busiest {traffic.busiest()}"
        )

    def _copies(self, flows: Iterable[Flow]) -> list[ShardCopy]:
        found = []
        for flow in flows:
            lane = self.template.lanes[flow.lane]
            index = lane.groups.index(self._group_of[flow.rank])
            dst_rank = flow.replica * self.tensor_parallel + lane.tensor_rank
            for part, first, last in lane.cut(flow.start, flow.stop):
                source = part.holdings[index]
                copy = ShardCopy(
                    flow.rank,
                    source.param,
                    part.rows_of(source.box, first, last),
                    dst_rank,
                    part.param,
                    part.rows_of(part.box, first, last),
                )
                found.append((dst_rank, part.position, first, copy))
        found.sort(key=lambda item: item[:3])
        return [copy for *_, copy in found]

    @cached_property
    def _flows_by_rank(self) -> dict[int, list[Flow]]:
        flows = defaultdict(list)
        for flow in self.routes.flows:
            flows[flow.rank].append(flow)
        return flows

    @cached_property
    def _flows_by_target(self) -> dict[tuple[int, int], list[Flow]]:
        flows = defaultdict(list)
        for flow in self.routes.flows:
            flows[flow.replica, self.template.lanes[flow.lane].tensor_rank].append(flow)
        return flows

    def _chain_counts(self, fan_out: Routes) -> list[int]:
        """Numbers of chains worth costing: powers of two, and the most that the senders carry while receivers are busy."""
        counts = {1 << i for i in range(self.replicas.bit_length())}
        busiest_s = fan_out.traffic.busiest_s("_out")
        if busiest_s:
            counts.add(int(self.replicas * self.limit_s / busiest_s))
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
                slowest = min(self.topology.bytes_per_s(*pair) for pair in places)
                chain_s += self.topology.bucket_bytes / slowest + self.topology.hop_latency_s
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
        cache: dict[tuple[int, ...], _Holders] = self.__dict__.setdefault("_holders_cache", {})
        if groups not in cache:
            ranks = sorted(rank for group in groups for rank in self.groups[group])
            cache[groups] = _Holders(tuple(ranks), self.topology)
        return cache[groups]


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


def make_plan(sources: Sequence[Sequence[Piece]], targets: Sequence[Sequence[Piece]]) -> list[ShardCopy]:
    """`sources[rank]`, `targets[rank]`: what every training rank and every rank of one engine holds -> the copies to make.

    Every element that a vLLM rank holds is sent to it exactly once. Raises WeightSyncError naming a vLLM parameter that
    the training side does not fill completely.
    """
    num_ranks = len(sources) + len(targets)
    topology = Topology.regular(len(sources), len(targets), gpus_per_node=num_ranks)
    plan = TransferPlan(Template.build(sources, targets), [(rank,) for rank in range(len(sources))], 1, topology)
    return [copy for rank in range(len(targets)) for copy in plan.receives(0, rank)]


def plan_transfer(
    table: Sequence[Entry],
    num_layers: int,
    training: Layout,
    rollout: RolloutLayout,
    topology: Topology | None = None,
    element_bytes: int = 2,
    relay: bool = True,
) -> TransferPlan:
    """The plan of one model between two layouts. `topology` None: every rank on a device of its own, on one node.

    Raises ConfigError for layouts that cannot be, naming both, and WeightSyncError for sides that do not match.
    """
    if topology is None:
        num_ranks = training.world_size + rollout.world_size
        topology = Topology.regular(training.world_size, rollout.world_size, gpus_per_node=num_ranks)
    template = _template(tuple(table), num_layers, training, replace(rollout, replicas=1))
    groups = groups_of(training).values()
    return TransferPlan(template, list(groups), rollout.replicas, topology, element_bytes, relay)


def groups_of(layout: Layout) -> dict[tuple[int, int], list[int]]:
    """(pipeline, tensor) coordinates -> the training ranks there: data- and context-parallel replicas hold the same."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        groups[at.pipeline, at.tensor].append(rank)
    return groups


@lru_cache(maxsize=4)
def _template(table: tuple[Entry, ...], num_layers: int, training: Layout, rollout: RolloutLayout) -> Template:
    training.check_layers(num_layers)
    rows = rollout.table(table)
    check_splits(rows, training, rollout)
    groups = [megatron_pieces(rows, training, num_layers, ranks[0]) for ranks in groups_of(training).values()]
    return Template.build(groups, [vllm_pieces(rows, rollout.tensor_parallel, rank) for rank in range(rollout.tensor_parallel)])


def check_splits(table: Sequence[Entry], training: Layout, rollout: RolloutLayout) -> None:
    """Raise ConfigError naming the tensor and both layouts when one side cannot split it."""
    sides = f"training.tensor_parallel={training.tensor_parallel} and rollout.tensor_parallel={rollout.tensor_parallel}"
    for entry in table:
        for side, param, rule, size in (
            ("training", entry.param, entry.rule, training.tensor_parallel),
            ("rollout", entry.vllm_param, entry.vllm_rule, rollout.tensor_parallel),
        ):
            try:
                if param is not None:
                    rule.boxes(entry.shape, 0, size)
            except ValueError as error:
                raise ConfigError(
                    f"{entry.hf_name} {entry.shape} cannot lie on the {side} side as {param}: {error} ({sides}); choose a "
                    f"{side}.tensor_parallel that divides it"
                    + (' or rollout.mm_encoder_tp_mode="data"' if side == "rollout" and entry.param.startswith(TOWER) else "")
                ) from error


def to_plain(plan: Sequence[ShardCopy]) -> list[list]:
    """Lists of numbers and names, for messages that carry no classes."""
    return [list(astuple(copy)) for copy in plan]


def from_plain(rows: Sequence[Sequence]) -> list[ShardCopy]:
    def box(bounds: Sequence[Sequence[int]]) -> Slices:
        return tuple((start, stop) for start, stop in bounds)

    return [ShardCopy(r[0], r[1], box(r[2]), r[3], r[4], box(r[5])) for r in rows]
