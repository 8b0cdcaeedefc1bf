"""The order of buckets.

Not covered: that real links carry several turns at once as assumed.
"""

import random
from collections import Counter

import pytest

from megatron_agent.weights.schedule import Turn, num_buckets, scheduled_s, take_turns
from megatron_agent.weights.topology import Topology


def test_turns_drawn_by_hand():
    """Two senders, two receivers, two buckets each way: they swap receivers instead of queueing for the first."""
    turns = take_turns({(0, 0): 2, (0, 1): 2, (1, 0): 2, (1, 1): 2}, bucket_bytes=1)
    assert [(t.round, t.rank, t.rollout_rank, t.bucket) for t in turns] == [
        (0, 0, 0, 0), (0, 1, 1, 0), (1, 0, 1, 0), (1, 1, 0, 0),
        (2, 0, 0, 1), (2, 1, 1, 1), (3, 0, 1, 1), (3, 1, 0, 1),
    ]  # fmt: skip
    assert turns[0] == Turn(0, 0, 0, 0, 2)


@pytest.mark.parametrize("seed", range(20))
def test_every_rank_has_one_partner_a_round(seed):
    rng = random.Random(seed)
    pairs = {(rng.randrange(8), rng.randrange(6)): rng.randint(1, 90) for _ in range(rng.randint(1, 40))}
    turns, most = take_turns(pairs, bucket_bytes=10), Counter()
    for (rank, rollout_rank), num_bytes in pairs.items():
        buckets = [t.bucket for t in turns if (t.rank, t.rollout_rank) == (rank, rollout_rank)]
        assert buckets == list(range(num_buckets(num_bytes, 10))) and len(buckets) == -(-num_bytes // 10)
        most["send", rank] += len(buckets)
        most["receive", rollout_rank] += len(buckets)
    assert max(Counter((t.round, t.rank) for t in turns).values()) == 1
    assert max(Counter((t.round, t.rollout_rank) for t in turns).values()) == 1
    assert [t.round for t in turns] == sorted(t.round for t in turns)
    assert max(most.values()) <= turns[-1].round + 1 <= 1.5 * max(most.values())


def test_the_time_of_turns():
    """On one node at 8 bytes a second: ranks 0 and 1 send 16 bytes each to one receiver, in four turns of a second."""
    topology = Topology.regular(2, 2, gpus_per_node=4, nvlink_gbps=64e-9)
    pairs = {(0, 0): 16, (1, 0): 16}
    assert scheduled_s(take_turns(pairs, 8), pairs, topology) == pytest.approx(4.0)
    apart = {(0, 0): 16, (1, 1): 16}
    assert scheduled_s(take_turns(apart, 8), apart, topology) == pytest.approx(2.0)
    colocated = Topology.regular(2, 2, gpus_per_node=4, colocated=True)
    assert scheduled_s(take_turns(apart, 8), apart, colocated) == 0.0
