"""When each bucket goes: turns in which every rank sends to at most one rank and receives from at most one.

Without an order all senders begin with the same receiver, which takes them one after another while the others wait. It is
what tools/simulate_sync.py costs; on one host the slots of transport.py give the order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megatron_agent.weights.topology import Topology

Pair = tuple[int, int]  # (training rank, rollout rank)


class Turn(NamedTuple):
    """In `round`, a training rank sends bucket `bucket` (of `num_buckets` of this pair) to a rollout rank."""

    round: int
    rank: int
    rollout_rank: int
    bucket: int
    num_buckets: int


def num_buckets(num_bytes: int, bucket_bytes: int) -> int:
    return max(1, -(-num_bytes // bucket_bytes))


def take_turns(pair_bytes: Mapping[Pair, int], bucket_bytes: int) -> list[Turn]:
    """Turns of all ranks, round by round. A rank that blocks on each of its own turns, in this order, never deadlocks.

    Greedy colouring of the edges of a bipartite graph, one bucket of every pair in turn: on the layouts of
    tools/simulate_sync.py 1.00 to 1.01 of the fewest rounds there can be (the most buckets of one rank).
    """
    counts = {pair: num_buckets(num_bytes, bucket_bytes) for pair, num_bytes in pair_bytes.items()}
    sending: dict[int, int] = defaultdict(int)  # rounds taken, as bits
    receiving: dict[int, int] = defaultdict(int)
    waiting, turns, bucket = list(counts), [], 0
    while waiting:
        for rank, rollout_rank in waiting:
            taken = sending[rank] | receiving[rollout_rank]
            free = ~taken & (taken + 1)
            sending[rank] |= free
            receiving[rollout_rank] |= free
            turns.append([free.bit_length() - 1, rank, rollout_rank])
        bucket += 1
        waiting = [pair for pair in waiting if counts[pair] > bucket]
    turns.sort()
    done: dict[Pair, int] = defaultdict(int)
    found = []
    for at, rank, rollout_rank in turns:
        pair = rank, rollout_rank
        found.append(Turn(at, rank, rollout_rank, done[pair], counts[pair]))
        done[pair] += 1
    return found


def scheduled_s(turns: Sequence[Turn], pair_bytes: Mapping[Pair, int], topology: Topology) -> float:
    """Seconds when every rank takes its turns one after the other, each at the full speed of its link."""
    sender_free, receiver_free = [0.0] * len(topology.training), [0.0] * len(topology.rollout)
    for turn in turns:
        source, target = topology.training[turn.rank], topology.rollout[turn.rollout_rank]
        num_bytes = pair_bytes[turn.rank, turn.rollout_rank] / turn.num_buckets
        begins = max(sender_free[turn.rank], receiver_free[turn.rollout_rank])
        ends = begins + topology.seconds(num_bytes, source, target)
        sender_free[turn.rank] = receiver_free[turn.rollout_rank] = ends
    return max([*sender_free, *receiver_free], default=0.0)
