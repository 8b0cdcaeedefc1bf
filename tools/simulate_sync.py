"""What a weight sync costs on a cluster that is not here: the real transfer plan, counted on every link.

    python tools/simulate_sync.py --model qwen2.5-vl-32b --train tp=8,pp=2,dp=4 --rollout tp=4,replicas=16 \\
        [--gpus-per-node 8] [--link-gbps 400] [--nvlink-gbps 3600] [--bucket-mib 64] [--colocated] \\
        [--json FILE]
    python tools/simulate_sync.py --model qwen2.5-vl-32b --run examples/deepeyes/qwen2_5_vl_32b.yaml
    python tools/simulate_sync.py --table                                  the table of the README

--model: qwen2.5-vl-3b, -7b, -32b, -72b, or a folder with a config.json. --train: tp, pp, dp, cp, vpp; --rollout: tp,
replicas, vision (weights or data). Rates are of one GPU and one direction; every GPU has its own NIC.

The bound is the time of the busiest link plus the filling of relay chains; "in turns" is the plan's own schedule, in which a
rank has one bucket on its way out and one on its way in at a time, run bucket by bucket. Software, checksums and contention
of the network beyond the NICs are not in them. The limit is what the receivers' own links need, whoever sends: no plan can
be faster, except by relays within a node where it would have sent to each. Nothing is sent: these times are simulated.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from megatron_agent import config as run_config
from megatron_agent import registry
from megatron_agent.errors import ConfigError, MegatronAgentError
from megatron_agent.models.base import ModelFamily
from megatron_agent.models.mapping import volume
from megatron_agent.training.layout import Layout
from megatron_agent.weights.plan import RolloutLayout, TransferPlan, plan_transfer
from megatron_agent.weights.topology import Topology

CONFIGS = Path(__file__).parents[1] / "tests" / "data"
TRAIN_KEYS = {"tp": "tensor_parallel", "pp": "pipeline_parallel", "dp": "data_parallel", "cp": "context_parallel",
              "vpp": "virtual_pipeline"}  # fmt: skip
ROLLOUT_KEYS = {"tp": "tensor_parallel", "replicas": "replicas", "vision": "mm_encoder_tp_mode", "pp": "pipeline_parallel"}
TABLE = (  # model, training, rollout, whether they share the GPUs
    ("7b", "tp=4,dp=1", "tp=1,replicas=4", False),
    ("7b", "tp=4,dp=2", "tp=1,replicas=8", True),
    ("7b", "tp=4,cp=2,dp=2", "tp=1,replicas=16", False),
    ("7b", "tp=4,dp=16", "tp=2,replicas=32", True),
    ("7b", "tp=4,dp=8", "tp=1,replicas=224", False),
    ("7b", "tp=4,dp=128", "tp=1,replicas=512", False),
    ("32b", "tp=8,pp=2", "tp=4,replicas=4", True),
    ("32b", "tp=8,pp=2,cp=2", "tp=4,replicas=8", False),
    ("32b", "tp=8,pp=2,dp=4", "tp=4,replicas=16", False),
    ("32b", "tp=8,pp=2,dp=16", "tp=4,replicas=64", True),
    ("32b", "tp=8,pp=2,dp=4", "tp=4,replicas=48", False),
    ("32b", "tp=8,pp=2,dp=32", "tp=4,replicas=128", False),
    ("72b", "tp=8,pp=4", "tp=8,replicas=4", True),
    ("72b", "tp=8,pp=4,vpp=2,cp=2", "tp=8,replicas=8", False),
    ("72b", "tp=8,pp=4,dp=8", "tp=8,replicas=32", True),
    ("72b", "tp=8,pp=8,dp=2", "tp=8,replicas=48", False),
    ("72b", "tp=8,pp=4,dp=16", "tp=8,replicas=64", False),
    ("72b", "tp=8,pp=4,dp=32", "tp=8,replicas=128", True),
)


def parse_degrees(text: str, keys: dict[str, str]) -> dict[str, int | str]:
    """Text such as tp=8,pp=2 -> degrees by the names of the dataclass. Raises ConfigError."""
    found: dict[str, int | str] = {}
    for item in text.split(","):
        key, _, value = item.partition("=")
        if key not in keys or not value or (key != "vision" and not value.isdecimal()):
            raise ConfigError(f"{item!r} in {text!r}: give KEY=NUMBER, comma-separated, of {', '.join(keys)}")
        found[keys[key]] = value if key == "vision" else int(value)
    return found


def load_family(name: str, folder: Path) -> ModelFamily:
    """A model's sizes; `folder` takes the config.json of one that is known by name. Raises ConfigError."""
    path = Path(name)
    if not path.is_dir():
        known = {file.stem.replace("qwen2_5_vl_", "qwen2.5-vl-"): file for file in CONFIGS.glob("qwen2_5_vl_*.json")}
        if name not in known:
            raise ConfigError(f"--model {name}: no such folder; known by name: {', '.join(sorted(known))}")
        shutil.copy(known[name], folder / "config.json")
        path = folder
    model_type = json.loads((path / "config.json").read_text())["model_type"]
    return registry.resolve("models", model_type)(path)


def make_plan(family: ModelFamily, training: Layout, rollout: RolloutLayout, topology: Topology) -> TransferPlan:
    training = family.balanced(training)
    family.check(training, rollout.tensor_parallel, rollout.mm_encoder_tp_mode == "data")
    table = family.table(training, transformer_engine=True)
    return plan_transfer(table, family.num_layers, training, rollout, topology)


def simulate(family: ModelFamily, training: Layout, rollout: RolloutLayout, topology: Topology) -> dict:
    """The plan's figures; bytes, seconds. Planning: all that one rank computes (here the one that sends most)."""
    began, cpu = time.perf_counter(), time.process_time()
    plan = make_plan(family, training, rollout, topology)
    traffic = plan.routes.traffic
    busiest_sender = max(range(training.world_size), key=lambda rank: traffic.sent[rank])
    num_copies = len(plan.sends(busiest_sender))
    received = sum(volume(copy.dst_slice) for copy in plan.receives(0, 0)) * plan.element_bytes
    planning = {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}
    planning["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds, busiest = plan.routes.seconds, traffic.busiest()
    sent = [traffic.sent[rank] for rank in range(training.world_size)]
    return {
        "gpus": topology.num_devices,
        "training": _degrees(training, TRAIN_KEYS),
        "rollout": _degrees(rollout, ROLLOUT_KEYS),
        "colocated": topology.training[0] == topology.rollout[0],
        "choice": plan.describe(),
        "chains": [list(chain) for chain in plan.routes.chains],
        "bound_s": seconds,
        "limit_s": plan.limit_s,
        "ratio": seconds / plan.limit_s if plan.limit_s else 1.0,
        "scheduled_s": plan.scheduled_s,
        "scheduled_ratio": plan.scheduled_s / plan.limit_s if plan.limit_s else 1.0,
        "busiest_link": str(busiest) if busiest else None,
        "received_bytes_of_a_rank": received,
        "received_over_live": received / (plan.template.sizes[0] * plan.element_bytes),
        "sent_bytes_of_training_ranks": sent,
        "sent_max_over_mean": max(sent) * len(sent) / sum(sent) if sum(sent) else 1.0,
        "relayed_bytes_of_rollout_ranks": [traffic.relayed[rank] for rank in range(rollout.world_size)],
        "bytes_within_devices": traffic.local_bytes,
        "bytes_of_links": {str(link): traffic.links[link] for link in sorted(traffic.links)},
        "seconds_of_other_numbers_of_chains": {n: routes.seconds for n, routes in sorted(plan.candidates.items())},
        "copies_of_busiest_sender": num_copies,
        "planning": planning,
    }


def _degrees(layout: Layout | RolloutLayout, keys: dict[str, str]) -> str:
    given = {key: getattr(layout, name) for key, name in keys.items()}
    return ",".join(f"{key}={value}" for key, value in given.items() if key == "tp" or value not in (1, "weights"))


def report(result: dict, topology: Topology) -> str:
    def gb(num_bytes: float) -> str:
        return f"{num_bytes / 1e9:.3f} GB"

    sent, planning = result["sent_bytes_of_training_ranks"], result["planning"]
    by_kind: dict[str, list[int]] = {}
    for link, num_bytes in result["bytes_of_links"].items():
        by_kind.setdefault(link.split()[0], []).append(num_bytes)
    lines = [
        f"{result['gpus']} GPUs{', colocated' if result['colocated'] else ''}: training {result['training']} -> "
        f"rollout {result['rollout']}; NIC {topology.nic_gbps:g}, NVLink {topology.nvlink_gbps:g} Gbit/s",
        f"plan      {result['choice']}",
        f"a rollout rank receives {gb(result['received_bytes_of_a_rank'])}, "
        f"{result['received_over_live']:.2f} of its live parameters",
        f"a training rank sends {gb(min(sent))} to {gb(max(sent))} over wires, max/mean {result['sent_max_over_mean']:.3f}; "
        f"within devices {gb(result['bytes_within_devices'])} in all",
        *(f"{kind:<10} {len(v)} links used, {gb(max(v))} at most, {gb(sum(v))} in all" for kind, v in sorted(by_kind.items())),
        f"time bound {result['bound_s']:.4f} s (simulated), limit {result['limit_s']:.4f} s, ratio {result['ratio']:.3f}; "
        f"busiest: {result['busiest_link']}",
        f"in turns, bucket by bucket, {result['scheduled_s']:.4f} s (simulated), ratio {result['scheduled_ratio']:.3f}",
        f"planning  {planning['seconds']:.2f} s ({planning['cpu_s']:.2f} s of CPU), peak {planning['peak_mib']:.0f} MiB, "
        f"{result['copies_of_busiest_sender']} copies at the busiest sender",
    ]
    return "\n".join(lines)


def print_table(options: argparse.Namespace) -> list[dict]:
    print(
        "| model | GPUs | training | rollout | way | a rank receives | bound, in turns (simulated) | of the limit | planning |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    results = []
    for size, train, rollout, colocated in TABLE:
        layouts = Layout(**parse_degrees(train, TRAIN_KEYS)), RolloutLayout(**parse_degrees(rollout, ROLLOUT_KEYS))
        with tempfile.TemporaryDirectory() as folder:
            family = load_family(f"qwen2.5-vl-{size}", Path(folder))
            r = simulate(family, *layouts, topology_of(options, *layouts, colocated))
        chains = len(r["chains"])
        way = "fan-out" if chains == layouts[1].replicas else f"{chains} chains"
        print(
            f"| {size.upper()} | {r['gpus']}{' colocated' if colocated else ''} | {r['training']} | {r['rollout']} | {way} | "
            f"{r['received_bytes_of_a_rank'] / 1e9:.1f} GB | {r['bound_s']:.3f}, {r['scheduled_s']:.3f} s | "
            f"{r['ratio']:.2f}, {r['scheduled_ratio']:.2f} | "
            f"{r['planning']['cpu_s']:.1f} s, {r['planning']['peak_mib']:.0f} MiB |",
            flush=True,
        )
        results.append({"model": f"qwen2.5-vl-{size}", **r})
    return results


def topology_of(options: argparse.Namespace, training: Layout, rollout: RolloutLayout, colocated: bool) -> Topology:
    topology = Topology.regular(
        training.world_size, rollout.world_size, options.gpus_per_node, colocated, options.link_gbps, options.nvlink_gbps
    )
    return replace(topology, bucket_bytes=options.bucket_mib << 20)


def layouts_of(options: argparse.Namespace) -> tuple[Layout, RolloutLayout]:
    if options.run:
        config = run_config.load(options.run)
        return config.training.layout, RolloutLayout(config.rollout.tensor_parallel, config.rollout.num_engines)
    if not options.train or not options.rollout:
        raise ConfigError("give --train and --rollout, or --run FILE")
    return Layout(**parse_degrees(options.train, TRAIN_KEYS)), RolloutLayout(**parse_degrees(options.rollout, ROLLOUT_KEYS))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-vl-7b")
    parser.add_argument("--train")
    parser.add_argument("--rollout")
    parser.add_argument("--run", help="a run.yaml, for both layouts")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--link-gbps", type=float, default=400.0)
    parser.add_argument("--nvlink-gbps", type=float, default=3600.0)
    parser.add_argument("--bucket-mib", type=int, default=64)
    parser.add_argument("--colocated", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)
    try:
        if options.table:
            result: object = print_table(options)
        else:
            training, rollout = layouts_of(options)
            topology = topology_of(options, training, rollout, options.colocated)
            with tempfile.TemporaryDirectory() as folder:
                result = simulate(load_family(options.model, Path(folder)), training, rollout, topology)
            print(report(result, topology))
    except MegatronAgentError as error:
        print(f"simulate_sync: {error}", file=sys.stderr)
        return 2
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
