"""Which rank and which engine get which GPU, by Ray's own count of GPUs that are only pretended.

Not covered: real GPUs, several nodes.
"""

import json
import subprocess
import sys

import pytest

from megatron_agent.cluster import gpu_shares
from megatron_agent.config import parse
from megatron_agent.errors import ConfigError


def config_of(ranks, engines, per_engine=1):
    training = {"tensor_parallel": ranks, "max_tokens_per_microbatch": 4096}
    return parse({"training": training, "rollout": {"num_engines": engines, "tensor_parallel": per_engine}})


@pytest.mark.parametrize(
    ("ranks", "engines", "per_engine", "num_gpus", "shares"),
    [
        (2, 2, 1, 0, (0.0, 0.0)),
        (2, 2, 1, 4, (1.0, 1.0)),
        (2, 1, 2, 4, (1.0, 2.0)),
        (2, 2, 1, 3, (0.5, 0.5)),
        (2, 1, 1, 2, (0.5, 0.5)),
        (1, 2, 1, 2, (0.5, 0.5)),
    ],
)
def test_shares(ranks, engines, per_engine, num_gpus, shares):
    assert gpu_shares(config_of(ranks, engines, per_engine), num_gpus) == shares


def test_a_critic_and_a_teacher_share_the_policys_gpus():
    training = {"tensor_parallel": 2, "max_tokens_per_microbatch": 4096}
    ppo = parse({"training": training, "algorithm": "ppo"})
    taught = parse({"training": training, "algorithm": {"name": "distillation", "teacher_path": "somewhere"}})
    for config in (ppo, taught):
        assert config.num_models == 2
        assert gpu_shares(config, 3) == (0.5, 1.0) and gpu_shares(config, 2) == (0.25, 0.5)


@pytest.mark.parametrize(("ranks", "engines", "per_engine", "num_gpus"), [(2, 2, 1, 1), (2, 1, 2, 2), (1, 3, 1, 2)])
def test_too_few_gpus(ranks, engines, per_engine, num_gpus):
    with pytest.raises(ConfigError, match=f"needs {ranks} GPUs and the rollout engines {engines * per_engine}, but there are"):
        gpu_shares(config_of(ranks, engines, per_engine), num_gpus)


PROGRAM = """
import json, sys
import ray
from megatron_agent import cluster
from megatron_agent.config import parse

ranks, engines, num_gpus = map(int, sys.argv[1:])
training = {"tensor_parallel": ranks, "max_tokens_per_microbatch": 4096}
config = parse({"training": training, "rollout": {"num_engines": engines}})
ray.init(num_cpus=4, num_gpus=num_gpus, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)

@ray.remote(num_cpus=0)
class Actor:
    def devices(self):
        return ray.get_gpu_ids()

sides = []
for share, count in zip(cluster.gpu_shares(config, num_gpus), (ranks, engines)):
    sides.append([Actor.options(**options).remote() for options in cluster.placements(config, share, count)])
print(json.dumps([ray.get([actor.devices.remote() for actor in side], timeout=60) for side in sides]))
ray.shutdown()
"""


def devices(*numbers):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, numbers)], capture_output=True, text=True, timeout=120, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.integration
def test_colocated_sides_meet_one_to_a_device():
    """Ray alone packs two halves of one side on a device."""
    ranks, engines = devices(2, 2, 2)
    assert ranks == engines and sorted(ranks) == [[0], [1]]


@pytest.mark.integration
def test_split_sides_share_nothing():
    ranks, engines = devices(2, 1, 3)
    assert sorted(ranks + engines) == [[0], [1], [2]]


PICTURES = """
import sys
import ray
from PIL import Image
from megatron_agent import cluster
from megatron_agent.data.images import ImageStore, PixelLimits
from megatron_agent.errors import DataError

here, there = sys.argv[1:]
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
store = ImageStore(here, PixelLimits(784, 1 << 20))
ref = store.put_picture(Image.linear_gradient("L").resize((84, 56)))
assert cluster.serve_pictures(store) is store  # one node: one folder

@ray.remote(num_cpus=0)
def look(far, ref):
    far.root = type(far.root)(there)  # a folder of another node
    try:
        far.pixels(type(ref)("0" * 64, 28, 28))
    except DataError as error:
        return far.pixel_hash(ref), str(error)

pixels, error = ray.get(look.remote(cluster.fetching(store), ref), timeout=60)
assert pixels == store.pixel_hash(ref) and "0000 is not in the image store" in error, error
print("ok")
ray.shutdown()
"""


@pytest.mark.integration
def test_another_node_fetches_pictures_from_the_drivers(tmp_path):
    folders = [str(tmp_path / "here"), str(tmp_path / "there")]
    done = subprocess.run([sys.executable, "-c", PICTURES, *folders], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "ok", done.stderr[-2000:]
    assert [p.name for p in (tmp_path / "there").rglob("*") if len(p.name) == 64]
