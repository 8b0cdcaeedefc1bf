"""Transfer plans between hundreds of random layouts, bit for bit against a reference written apart from the rules.

Not covered: that the reference of vLLM is what vLLM does (test_plan_vllm.py), that Megatron computes with such shards
(tests/distributed), real links.
"""

import pickle
import random
from collections import Counter

import numpy as np
import pytest

from megatron_agent.models.mapping import as_index, volume
from megatron_agent.weights.plan import plan_transfer
from megatron_agent.weights.transport import buckets
from tests.unit.weights.plan_reference import draw_case, megatron_shard, random_weights, table_of, vllm_shard

NUM_CASES, NUM_BATCHES = 240, 4


@pytest.mark.parametrize("batch", range(NUM_BATCHES))
def test_every_vllm_shard_is_what_vllm_would_load(batch):
    seen = Counter()
    for seed in range(batch, NUM_CASES, NUM_BATCHES):
        check(seed, seen)
    assert all(seen[what] for what in ("relayed", "local", "cut", "pp", "vision data", "tied copy", "few kv heads")), seen


def check(seed, seen):
    text, vision, layout, rollout, topology = draw_case(random.Random(seed))
    table = table_of(text, vision, layout)
    weights = random_weights(table, seed)
    plan = plan_transfer(table, text.num_layers, layout, rollout, topology)
    shards = [megatron_shard(weights, text, layout, rank) for rank in range(layout.world_size)]
    expected = [vllm_shard(weights, text, rollout, rank) for rank in range(rollout.tensor_parallel)]
    arrived = []
    for replica in range(rollout.replicas):
        for rank, params in enumerate(expected):
            copies = plan.receives(replica, rank)
            received = {name: np.full_like(tensor, -2) for name, tensor in params.items()}
            me = replica * rollout.tensor_parallel + rank
            for c in (c for bucket in buckets(copies, max_elements=1 + seed % 97) for c in bucket):
                assert c.dst_rank == me
                received[c.dst_param][as_index(c.dst_slice)] = shards[c.src_rank][c.src_param][as_index(c.src_slice)]
            for name, tensor in params.items():
                assert np.array_equal(received[name], tensor), (seed, replica, rank, name)
            live = sum(tensor.size for tensor in params.values())
            assert sum(volume(c.dst_slice) for c in copies) == live == plan.template.sizes[rank], (seed, replica, rank)
            plan.check_engine(rank, {name: tensor.shape for name, tensor in params.items()})
            arrived += copies if plan.relayed_from(replica) is None else []
    sent = [copy for rank in range(layout.world_size) for copy in plan.sends(rank)]
    assert all(copy.src_rank == rank for rank in range(layout.world_size) for copy in plan.sends(rank))
    assert Counter(sent) == Counter(arrived), seed
    check_bytes(plan, sent, layout, rollout, seed)
    seen["relayed"] += len(plan.routes.chains) < rollout.replicas
    seen["local"] += plan.routes.traffic.local_bytes > 0
    seen["cut"] += len({(c.src_rank, c.dst_rank, c.dst_param) for c in sent}) < len(sent)
    seen["pp"] += layout.pipeline_parallel > 1
    seen["vision data"] += bool(vision) and rollout.mm_encoder_tp_mode == "data" and rollout.tensor_parallel > 1
    seen["tied copy"] += any(c.src_param.endswith("output_layer.weight") and "embed" in c.dst_param for c in sent)
    seen["few kv heads"] += text.num_kv_heads < min(layout.tensor_parallel, rollout.tensor_parallel)


def check_bytes(plan, sent, layout, rollout, seed):
    """The traffic that the plan counts is that of its copies."""
    wire, local = Counter(), 0
    for c in sent:
        num_bytes = volume(c.src_slice) * plan.element_bytes
        if plan.topology.training[c.src_rank] == plan.topology.rollout[c.dst_rank]:
            local += num_bytes
        else:
            wire[c.src_rank] += num_bytes
    traffic = plan.routes.traffic
    assert wire == traffic.sent and local == traffic.local_bytes, seed
    members = [plan.relayed_from(replica) for replica in range(rollout.replicas)]
    relayed = Counter(before * rollout.tensor_parallel + rank for before in members if before is not None
                      for rank in range(rollout.tensor_parallel))  # fmt: skip
    sizes = plan.template.sizes
    assert traffic.relayed == {r: n * sizes[r % rollout.tensor_parallel] * plan.element_bytes for r, n in relayed.items()}
    assert sum(traffic.links.values()) == 2 * (sum(wire.values()) + sum(traffic.relayed.values())), seed


def test_every_rank_computes_the_same_plan():
    text, vision, layout, rollout, topology = draw_case(random.Random(9))
    table = table_of(text, vision, layout)
    plans = [plan_transfer(table, text.num_layers, layout, rollout, topology) for _ in range(2)]
    one, other = plans[0], pickle.loads(pickle.dumps(plans[1]))
    for rank in reversed(range(layout.world_size)):
        assert one.sends(rank) == other.sends(rank) and one.sends(rank) is one.sends(rank)
    for replica in range(rollout.replicas):
        for rank in range(rollout.tensor_parallel):
            assert one.receives(replica, rank) == other.receives(replica, rank)


def test_both_sides_have_the_copies_of_a_pair_in_one_order():
    for seed in range(40):
        text, vision, layout, rollout, topology = draw_case(random.Random(seed))
        plan = plan_transfer(table_of(text, vision, layout), text.num_layers, layout, rollout, topology)
        by_sender = {(r, c.dst_rank): [] for r in range(layout.world_size) for c in plan.sends(r)}
        for rank in range(layout.world_size):
            for copy in plan.sends(rank):
                by_sender[rank, copy.dst_rank].append(copy)
        for (src, dst), copies in by_sender.items():
            received = plan.receives(*divmod(dst, rollout.tensor_parallel))
            assert [c for c in received if c.src_rank == src] == copies
            order = [c.dst_param for c in received]
            assert order == sorted(order, key=order.index), "a parameter is finished before the next begins"
