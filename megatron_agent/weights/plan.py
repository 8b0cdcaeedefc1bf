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

from megatron_agent.errors import ConfigError, WeightSyncError
from megatron_agent.models.mapping import Entry, Piece, Rule, Shape
from megatron_agent.training.layout import Layout, megatron_pieces, vllm_pieces
from megatron_agent.types import ShardCopy, Slices
from megatron_agent.weights.routes import Flow, Router, cheapest
from megatron_agent.weights.schedule import Turn, scheduled_s, take_turns
from megatron_agent.weights.template import Template
from megatron_agent.weights.topology import Place, Topology

TOWER = "visual."  # what a family calls its tower for pictures (models/base.py)
ADDED = ("scale", "scale_inv", "zero_point", "global_scale")  # how vLLM calls what its quantisation adds: weight_scale, k_scale


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
        self.replicas, self.tensor_parallel = replicas, len(template.shapes)
        self._group_of = {rank: group for group, ranks in enumerate(groups) for rank in ranks}
        self._check_places()
        self.candidates = Router(template, groups, replicas, topology, element_bytes).candidates(relay)
        self.limit_s = self.candidates[replicas].traffic.busiest_s("_in")  # the receivers' own links, whoever sends
        self.routes = cheapest(self.candidates)
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

    @cached_property
    def pair_bytes(self) -> dict[tuple[int, int], int]:
        """What each training rank sends to each rollout rank (those that the trainer sends to)."""
        found: dict[tuple[int, int], int] = defaultdict(int)
        for flow in self.routes.flows:
            target = flow.replica * self.tensor_parallel + self.template.lanes[flow.lane].tensor_rank
            found[flow.rank, target] += (flow.stop - flow.start) * self.element_bytes
        return dict(found)

    @cached_property
    def turns(self) -> list[Turn]:
        """The order of all buckets that training ranks send, those within a device and a node first; a relay passes a bucket
        on when it has it."""
        turns: list[Turn] = []
        for link in ("local", "nvlink", "nic"):
            pairs = {pair: n for pair, n in self.pair_bytes.items() if self.topology.link(*self._places(pair)) == link}
            first = turns[-1].round + 1 if turns else 0
            turns += [t._replace(round=t.round + first) for t in take_turns(pairs, self.topology.bucket_bytes)]
        return turns

    def _places(self, pair: tuple[int, int]) -> tuple[Place, Place]:
        return self.topology.training[pair[0]], self.topology.rollout[pair[1]]

    @property
    def scheduled_s(self) -> float:
        """Seconds when ranks take their turns one after the other (`bound`: all links busy at once)."""
        return scheduled_s(self.turns, self.pair_bytes, self.topology) + self.routes.fill_s

    def check_engine(self, tensor_rank: int, shapes: Mapping[str, Shape | None]) -> None:
        """Raise WeightSyncError unless these are the parameters that the plan fills on a vLLM rank.

        `shapes`: live ones, a vocabulary without its padding (vLLM's `num_org_embeddings_per_partition` rows); None: not
        known (emptied by the backend, or quantised), only the name is checked. What quantisation adds is left out.
        """
        wanted = self.template.shapes[tensor_rank]
        there = {name: shape for name, shape in shapes.items() if shape is None or 0 not in shape}
        there = {name: shape for name, shape in there.items() if name in wanted or not is_added(name)}
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


def is_added(name: str) -> bool:
    """Whether a parameter of vLLM comes from quantisation, not from a checkpoint."""
    leaf = name.rpartition(".")[2]
    return any(leaf.endswith(f"_{ending}") for ending in ADDED)


def to_plain(plan: Sequence[ShardCopy]) -> list[list]:
    """Lists of numbers and names, for messages that carry no classes."""
    return [list(astuple(copy)) for copy in plan]


def from_plain(rows: Sequence[Sequence]) -> list[ShardCopy]:
    def box(bounds: Sequence[Sequence[int]]) -> Slices:
        return tuple((start, stop) for start, stop in bounds)

    return [ShardCopy(r[0], r[1], box(r[2]), r[3], r[4], box(r[5])) for r in rows]
