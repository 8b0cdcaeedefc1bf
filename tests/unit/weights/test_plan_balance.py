"""Which of several ranks sends, who relays, and what cannot be planned. Sizes of the real models; no bytes move.

Not covered: that a bound is reached (no such cluster here).
"""

import itertools
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_agent.errors import ConfigError, WeightSyncError
from megatron_agent.models.mapping import Piece, Split, pieces, volume
from megatron_agent.models.qwen2_5_vl import Qwen2_5_VL
from megatron_agent.training.layout import Layout
from megatron_agent.types import ShardCopy
from megatron_agent.weights.plan import RolloutLayout, TransferPlan, plan_transfer
from megatron_agent.weights.routes import water_fill
from megatron_agent.weights.template import Lane, Part, Template
from megatron_agent.weights.topology import Link, Place, Topology, Traffic

CONFIGS = Path(__file__).parents[2] / "data"


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    found = {}
    for size in ("3b", "7b", "32b", "72b"):
        folder = tmp_path_factory.mktemp(size)
        (folder / "config.json").write_bytes((CONFIGS / f"qwen2_5_vl_{size}.json").read_bytes())
        found[size] = Qwen2_5_VL(folder)
    return found


def plan_of(family, training, rollout, gpus_per_node=8, colocated=False, **options):
    training = family.balanced(training)
    topology = Topology.regular(training.world_size, rollout.world_size, gpus_per_node, colocated)
    return plan_transfer(family.table(training, True), family.num_layers, training, rollout, topology, **options)


def max_over_mean(counts):
    return max(counts) * len(counts) / sum(counts)


@pytest.mark.parametrize(
    ("size", "training", "rollout", "whole"),
    [
        ("3b", Layout(2, 1, 2), RolloutLayout(1, 4), 1.01),
        ("7b", Layout(4, 1, 2, 2), RolloutLayout(1, 16), 1.01),
        ("7b", Layout(2, 1, 8), RolloutLayout(4, 3), 1.01),
        ("32b", Layout(8, 2, 4), RolloutLayout(4, 16), 1.02),
        ("32b", Layout(2, 4, 3), RolloutLayout(8, 5), 1.1),
        ("72b", Layout(8, 4, 2, 2, virtual_pipeline=2), RolloutLayout(8, 16), 1.1),
        ("3b", Layout(8, 1, 2), RolloutLayout(4, 4), 1.1),  # 2 KV heads: Megatron cuts rows, vLLM repeats heads
    ],
)
def test_senders_are_balanced(families, size, training, rollout, whole):
    """Within a pipeline stage, and over all where the stages hold about the same."""
    plan = plan_of(families[size], training, rollout)
    sent = [sum(volume(c.src_slice) for c in plan.sends(rank)) for rank in range(training.world_size)]
    assert sum(sent) == len(plan.routes.chains) * sum(plan.template.sizes)
    assert max_over_mean(sent) <= whole
    for stage in range(training.pipeline_parallel):
        assert max_over_mean([n for r, n in enumerate(sent) if training.coordinates(r).pipeline == stage]) <= min(whole, 1.05)


@pytest.mark.parametrize("tp", [2, 4])
def test_the_tied_embedding_comes_from_both_stages(families, tp):
    """The first stage sends the tower, which only it holds; the embedding, which both hold, evens them out."""
    training = Layout(tp, 2, 1, stage_layers=(15, 21))
    plan = plan_of(families["3b"], training, RolloutLayout(2, 1))
    params = {(training.coordinates(c.src_rank).pipeline, c.src_param) for rank in range(2 * tp) for c in plan.sends(rank)
              if c.dst_param.endswith("embed_tokens.weight")}  # fmt: skip
    assert params == {(0, "language.embedding.word_embeddings.weight"), (1, "language.output_layer.weight")}
    assert max_over_mean([plan.routes.traffic.sent[rank] for rank in range(2 * tp)]) <= 1.02


def test_the_limit_is_reached_with_few_senders(families):
    """8 senders cannot feed 24 engines of 8: the bytes go along chains, and every member gets them once."""
    plan = plan_of(families["72b"], Layout(8, 1, 1), RolloutLayout(8, 24))
    assert 1 <= len(plan.routes.chains) < 24
    assert plan.routes.seconds <= 1.2 * plan.limit_s < plan.candidates[24].seconds / 10
    assert [replica for chain in plan.routes.chains for replica in chain] == list(range(24))
    for chain in plan.routes.chains:
        assert [plan.relayed_from(replica) for replica in chain] == [None, *chain[:-1]]
        assert [plan.relays_to(replica) for replica in chain] == [*chain[1:], None]
    assert (
        plan_of(families["72b"], Layout(8, 1, 1), RolloutLayout(8, 24), relay=False).routes.chains == plan.candidates[24].chains
    )


def test_colocated_ranks_send_to_themselves_first(families):
    """Same tensor-parallel size: a quarter lies on the very device, three come from the nodes of the other stages."""
    training, rollout = Layout(8, 4, 2), RolloutLayout(8, 8)
    plan = plan_of(families["72b"], training, rollout, colocated=True)
    local = Counter()
    for rank in range(training.world_size):
        at_home = {c.dst_param for c in plan.sends(rank) if c.dst_rank == rank}
        for c in plan.sends(rank):
            local[rank] += volume(c.src_slice) * (c.dst_rank == rank)
            assert ".layers." not in c.dst_param or (c.dst_param in at_home) or c.dst_rank != rank
    assert plan.routes.traffic.local_bytes == 2 * sum(local.values())
    assert 0.22 < sum(local.values()) / (8 * sum(plan.template.sizes)) < 0.28
    assert plan.routes.seconds <= 1.2 * plan.limit_s
    one = plan_of(families["7b"], Layout(1), RolloutLayout(1), colocated=True)
    assert one.routes.seconds == one.limit_s == 0 and not one.routes.traffic.links
    assert "busiest None" in one.describe()


def tiny_plan(places, rollout_places, replicas, rows=8, **options):
    """`rows` numbers that every training rank holds, for engines of one rank."""
    template = Template.build([[Piece("w", ((0, rows),), "m", ((0, rows),))]], [[Piece("w", ((0, rows),), "v", ((0, rows),))]])
    topology = Topology(tuple(places), tuple(rollout_places), bucket_bytes=1, hop_latency_s=0)
    return TransferPlan(template, [tuple(range(len(places)))], replicas, topology, **options)


def test_the_nearest_holders_send_drawn_by_hand():
    """Two nodes of two devices: a rank on the receiver's device sends all, else those on its node share it."""
    places = [Place(0, 0), Place(0, 1), Place(1, 0)]
    plan = tiny_plan(places, [Place(0, 1), Place(0, 2), Place(2, 0)], 3, rows=12, relay=False)
    whole = ((0, 12),)
    assert plan.receives(0, 0) == [ShardCopy(1, "m", whole, 0, "v", whole)]
    assert [(c.src_rank, c.src_slice) for c in plan.receives(1, 0)] == [(0, ((0, 6),)), (1, ((6, 12),))]
    assert [(c.src_rank, c.src_slice) for c in plan.receives(2, 0)] == [(r, ((4 * r, 4 * r + 4),)) for r in range(3)]
    assert plan.routes.traffic.local_bytes == 24
    assert list(dict.fromkeys((t.rank, t.rollout_rank) for t in plan.turns)) == [(1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (2, 2)]
    assert [t.round for t in plan.turns] == sorted(t.round for t in plan.turns)
    assert plan.routes.traffic.links == {
        Link("nvlink_out", Place(0, 0)): 12, Link("nvlink_out", Place(0, 1)): 12, Link("nvlink_in", Place(0, 2)): 24,
        Link("nic_out", Place(0, 0)): 8, Link("nic_out", Place(0, 1)): 8, Link("nic_out", Place(1, 0)): 8,
        Link("nic_in", Place(2, 0)): 24,
    }  # fmt: skip


def test_a_relay_drawn_by_hand():
    """One sender, two replicas on other nodes: relaying halves what leaves the sender."""
    plan = tiny_plan([Place(0, 0)], [Place(1, 0), Place(2, 0)], 2)
    whole = ((0, 8),)
    assert plan.routes.chains == ((0, 1),) and plan.relayed_from(1) == 0 and plan.relays_to(0) == 1
    assert plan.sends(0) == [ShardCopy(0, "m", whole, 0, "v", whole)] == plan.receives(0, 0)
    assert plan.receives(1, 0) == [ShardCopy(0, "m", whole, 1, "v", whole)]
    assert plan.candidates[2].seconds == 2 * plan.limit_s == 32 / 50e9
    assert plan.routes.seconds == plan.scheduled_s == pytest.approx(17 / 50e9)  # a bucket of one byte later
    assert len(plan.turns) == 16
    assert "1 from the trainer, relayed along chains of up to 2" in plan.describe()
    two_senders = tiny_plan([Place(0, 0), Place(0, 1)], [Place(1, 0), Place(2, 0)], 2, rows=80)
    assert two_senders.routes.chains == ((0,), (1,)), "no relay where the senders are as fast"
    slow = replace(plan.topology, hop_latency_s=1.0)
    assert len(TransferPlan(plan.template, [(0,)], 2, slow).routes.chains) == 2


def test_water_fill_by_brute_force():
    rng = random.Random(0)
    for _ in range(200):
        loads, amount = [rng.randint(0, 5) for _ in range(rng.randint(1, 3))], rng.randint(0, 6)
        shares = water_fill(loads, amount)
        every = (s for s in itertools.product(range(amount + 1), repeat=len(loads)) if sum(s) == amount)
        best = min(max(load + share for load, share in zip(loads, s)) for s in every)
        assert sum(shares) == amount and min(shares) >= 0
        assert max(load + share for load, share in zip(loads, shares)) == best


def test_a_lane_is_cut_between_parts_and_rows():
    """A vector of 3, then 4 rows of 5; `min_split` 10 keeps the vector whole."""
    lane = Lane((0,), 0, (Part("a", ((0, 3),), ()), Part("b", ((2, 6), (0, 5)), ())))
    assert lane.size == 23
    assert [lane.snap(n, 10) for n in (-1, 0, 1, 2, 3, 5, 6, 14, 22, 23, 99)] == [0, 0, 0, 3, 3, 3, 8, 13, 23, 23, 23]
    assert [lane.snap(n, 1) for n in (1, 2)] == [1, 2]
    assert [(p.param, first, last) for p, first, last in lane.cut(0, 8)] == [("a", 0, 3), ("b", 0, 1)]
    assert [(p.param, first, last) for p, first, last in lane.cut(8, 23)] == [("b", 1, 4)]
    assert lane.parts[1].rows_of(((7, 11), (1, 6)), 1, 3) == ((8, 10), (1, 6))


def test_boxes_side_by_side_are_one_part():
    whole = pieces([("w", (4, 6), "v", Split(0))], 0, 1)
    halves = [Piece("w", ((0, 4), (i, i + 2)), "m", ((0, 4), (i, i + 2))) for i in (0, 2, 4)]
    assert [len(lane.parts) for lane in Template.build([halves], [whole]).lanes] == [1]
    apart = [replace(half, param_slice=((0, 4), (3 * i, 3 * i + 2))) for i, half in enumerate(halves)]
    assert [len(lane.parts) for lane in Template.build([apart], [whole]).lanes] == [3]


@pytest.mark.parametrize(
    ("size", "training", "rollout", "message"),
    [
        ("7b", Layout(8), RolloutLayout(4), r"q_proj.* on the training side as language.*28 .* 8 .*rollout.tensor_parallel=4"),
        (
            "7b",
            Layout(4),
            RolloutLayout(8),
            r"q_proj.* on the rollout side as language_model.* 28 .*training.tensor_parallel=4",
        ),
        ("3b", Layout(2), RolloutLayout(8), r"visual.blocks.0.mlp.* 3420 .* 8 .*mm_encoder_tp_mode=\"data\""),
        ("32b", Layout(2, 65), RolloutLayout(8), r"pipeline_parallel=65 .* more than the model's 64 layers"),
    ],
)
def test_layouts_that_cannot_be(families, size, training, rollout, message):
    with pytest.raises(ConfigError, match=message):
        plan_of(families[size], training, rollout)


def test_a_vocabulary_that_vllm_cannot_split(families, monkeypatch):
    """Of 151,936 rows, padded to a multiple of 64, none of 5 ranks gets a whole number."""
    family = families["3b"]
    monkeypatch.setattr(family, "text", replace(family.text, num_heads=20, num_kv_heads=5, intermediate_size=10240))
    with pytest.raises(ConfigError, match=r"embed_tokens.* padded vocabulary of 151936 does not split over 5"):
        plan_of(family, Layout(1), RolloutLayout(5, mm_encoder_tp_mode="data"))


def test_rollout_layouts_that_cannot_be():
    for given, message in (
        (dict(tensor_parallel=0), "rollout.tensor_parallel=0"),
        (dict(replicas=0), "rollout.replicas=0"),
        (dict(pipeline_parallel=2), "rollout.pipeline_parallel=2.* raise rollout.tensor_parallel"),
        (dict(mm_encoder_tp_mode="both"), "'both': one of weights, data"),
    ):
        with pytest.raises(ConfigError, match=message):
            RolloutLayout(**given)


def test_engines_of_another_model(families):
    plan = plan_of(families["3b"], Layout(2), RolloutLayout(2))
    shapes = dict(plan.template.shapes[1])
    plan.check_engine(1, shapes)
    plan.check_engine(1, dict.fromkeys(shapes))  # emptied by the backend: only names
    plan.check_engine(1, {**shapes, "nothing.but.padding": (0, 2048)})
    with pytest.raises(WeightSyncError, match=r"engine has \['lm_head.weight'\] that the trainer does not fill \(1\)"):
        plan.check_engine(1, {**shapes, "lm_head.weight": (8, 8)})
    norm = "language_model.model.norm.weight"
    with pytest.raises(WeightSyncError, match=rf"fills vLLM's parameters \['{norm}'\] that the engine lacks \(1\)"):
        plan.check_engine(1, {name: shape for name, shape in shapes.items() if name != norm})
    with pytest.raises(
        WeightSyncError, match=rf"{norm} of vLLM rank 1: the engine has \(3584,\), the trainer's model \(2048,\)"
    ):
        plan.check_engine(1, {**shapes, norm: (3584,)})


def test_topologies_that_cannot_be():
    with pytest.raises(ConfigError, match="nic_gbps=0: give a number above 0"):
        Topology.regular(1, 1, nic_gbps=0)
    with pytest.raises(ConfigError, match="gpus_per_node=0"):
        Topology.regular(1, 1, gpus_per_node=0)
    with pytest.raises(ConfigError, match="two rollout ranks sit on node 1 device 0"):
        Topology((Place(0, 0),), (Place(1, 0), Place(1, 0)))
    with pytest.raises(ConfigError, match="places 2 rollout ranks, the layout has 3"):
        tiny_plan([Place(0, 0)], [Place(1, 0), Place(2, 0)], 3)


def test_places_and_links():
    topology = Topology.regular(3, 2, gpus_per_node=2)
    assert topology.training == ((0, 0), (0, 1), (1, 0)) and topology.rollout == ((1, 1), (2, 0))
    assert Topology.regular(3, 2, 2, colocated=True).rollout == ((0, 0), (0, 1)) and topology.num_devices == 5
    traffic = Traffic(topology)
    assert traffic.busiest() is None and traffic.busiest_s() == 0
    traffic.send(2, 0, 900)  # on its node
    traffic.send(0, 0, 100)
    traffic.relay(0, 1, 99)
    assert traffic.busiest() == Link("nic_in", Place(1, 1)) and str(traffic.busiest("_out")) == "nic_out of node 0 device 0"
    assert traffic.busiest_s() == 100 / 50e9 and traffic.seconds(Link("nvlink_in", Place(1, 1))) == 900 / 450e9
    assert traffic.sent == {2: 900, 0: 100} and traffic.relayed == {0: 99}


def test_the_real_models_have_their_published_sizes(families):
    """Parameters in billions, counted from what one vLLM rank receives: 3.75, 8.29, 33.5, 73.4."""
    for size, billions in (("3b", 3.75), ("7b", 8.29), ("32b", 33.45), ("72b", 73.41)):
        config = json.loads((families[size].path / "config.json").read_text())
        plan = plan_of(families[size], Layout(1), RolloutLayout(1))
        assert plan.template.sizes[0] / 1e9 == pytest.approx(billions, abs=0.01), config["hidden_size"]
