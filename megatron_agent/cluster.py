"""Ray: where trainer ranks and rollout engines run. The only file that asks for resources."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_agent.errors import ConfigError, DataError, cause_of
from megatron_agent.reaper import MARK_VARIABLE

if TYPE_CHECKING:
    from megatron_agent.config import RunConfig
    from megatron_agent.data.images import ImageStore
    from megatron_agent.training.layout import Layout

log = logging.getLogger(__name__)
DEVICES = "megatron_agent_devices"  # the placement group of a colocated run
_reaper: subprocess.Popen | None = None


def start_ray() -> None:
    """Join the cluster of RAY_ADDRESS, or start one in this process that ends with it."""
    import ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    start_reaper()
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    if not os.environ.get("RAY_ADDRESS"):
        # Actors ask for no CPUs: threads are assigned by the config, and two cores must hold four processes.
        options |= {"num_cpus": max(4, os.cpu_count() or 1), "object_store_memory": 512 << 20}
    ray.init(**options)


def start_reaper() -> None:
    """A process that outlives this one just long enough to end whatever this one leaves behind (reaper.py)."""
    mark = uuid.uuid4().hex[:12]
    environment = {name: value for name, value in os.environ.items() if name != MARK_VARIABLE}
    global _reaper  # its standard input must stay open as long as this process lives
    _reaper = subprocess.Popen(
        [sys.executable, "-m", "megatron_agent.reaper", mark, str(os.getpid())],
        stdin=subprocess.PIPE,  # held open, never written to: it ends when this process does
        start_new_session=True,  # Ctrl-C goes to the whole foreground group
        env=environment,
    )
    os.environ[MARK_VARIABLE] = mark


def num_gpus() -> int:
    """GPUs of the whole cluster; the node of the driver may have none. 0: everything runs on CPUs."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def gpu_shares(config: RunConfig, num_gpus: int) -> tuple[float, float]:
    """GPUs of one rank of one of the trainer's models (policy, critic, teacher: they share devices) and of one engine;
    fractions when the two sides share them too (colocated).

    Raises ConfigError when the degrees do not fit the GPUs that there are.
    """
    ranks, per_engine = config.training.layout.world_size, config.rollout.tensor_parallel
    engines = config.rollout.num_engines * per_engine
    if num_gpus == 0:
        return 0.0, 0.0
    if num_gpus >= ranks + engines:
        return 1.0 / config.num_models, float(per_engine)
    if num_gpus >= max(ranks, engines) and per_engine == 1:
        return 0.5 / config.num_models, 0.5
    raise ConfigError(
        f"the trainer needs {ranks} GPUs and the rollout engines {engines}, but there are {num_gpus}; lower "
        f"training.*_parallel, rollout.num_engines or rollout.tensor_parallel"
    )


def is_colocated(config: RunConfig) -> bool:
    """Whether trainer ranks and engines share devices. Without Ray (tools/bench_async.py) there are none."""
    import ray

    return ray.is_initialized() and gpu_shares(config, num_gpus())[1] == 0.5


def placements(config: RunConfig, share: float, count: int) -> list[dict[str, Any]]:
    """Ray options of `count` trainer ranks or engines that take `share` GPUs each.

    Shared devices: the ranks i of all models, and engine i if colocated, go into bundle i of one placement group that all
    know by name, one device per bundle. Left to itself, Ray puts two shares of the same side on one device.
    Written to Ray's documentation and tried with pretended GPUs; never run on real ones.
    """
    if not 0 < share < 1:
        return [{"num_gpus": share}] * count
    from ray.util import get_placement_group, placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    try:
        devices = get_placement_group(DEVICES)
    except ValueError:  # the first of the two sides makes it
        num_devices = max(config.training.layout.world_size, config.rollout.num_engines * is_colocated(config))
        devices = placement_group([{"GPU": 1, "CPU": 0}] * num_devices, strategy="PACK", name=DEVICES)
    return [
        {"num_gpus": share, "scheduling_strategy": PlacementGroupSchedulingStrategy(devices, placement_group_bundle_index=i)}
        for i in range(count)
    ]


def start_workers(config: RunConfig, store: ImageStore, layout: Layout | None = None) -> list[Any]:
    """One Ray actor per Megatron rank of one model, in rank order. `layout`: another of the same ranks than the policy's."""
    import ray

    from megatron_agent.training.worker import Worker

    share, _ = gpu_shares(config, num_gpus())
    remote = ray.remote(num_cpus=0)(Worker)
    layout = layout or config.training.layout
    return [
        remote.options(**options).remote(rank, layout, store, config.training.num_cpu_threads)
        for rank, options in enumerate(placements(config, share, layout.world_size))
    ]


def start_engines(config: RunConfig, store: ImageStore) -> list[Any]:
    """One Ray actor per vLLM engine; construction returns at once, the engine starts behind it."""
    return [start_engine(config, store, index) for index in range(config.rollout.num_engines)]


def start_engine(config: RunConfig, store: ImageStore, index: int) -> Any:
    """One of them, at its place."""
    import ray

    from megatron_agent.rollout.engine import Engine

    _, share = gpu_shares(config, num_gpus())
    options = placements(config, share, config.rollout.num_engines)[index]
    remote = ray.remote(num_cpus=0, max_concurrency=4096)(Engine).options(**options)
    return remote.remote(config.model.path, config.rollout, store, config.agent.max_vllm_images, config.seed + index)


@dataclass(frozen=True)
class RemotePictures:
    """Bytes of pictures that the driver's node holds; a store on another node fetches with it."""

    server: Any
    timeout_s: float = 60.0

    def __call__(self, source: str) -> bytes:
        """Raises DataError where the driver's node has no such picture, or does not answer."""
        import ray

        try:
            return ray.get(self.server.bytes_of.remote(source), timeout=self.timeout_s)
        except ray.exceptions.RayError as error:
            raise cause_of(error, DataError) from None


def serve_pictures(store: ImageStore) -> ImageStore:
    """The store for trainer ranks and engines, whose folder may lie on another node: each fetches a picture once."""
    import ray

    return store if len(ray.nodes()) == 1 else fetching(store)


def fetching(store: ImageStore) -> ImageStore:
    """A store that asks this node for what its own lacks."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, max_concurrency=16)(type(store)).options(scheduling_strategy=here)
    return store.fetching(RemotePictures(actor.remote(store.root, store.limits)))


def node_address() -> str:
    """Where this host is reached by the others of the cluster."""
    import ray

    return ray.util.get_node_ip_address()


def stop_ray() -> None:
    """Every actor and every Ray process that this run started goes with it."""
    import ray

    ray.shutdown()
