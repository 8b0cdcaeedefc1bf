"""Which parameters of a vLLM rank a plan must fill. Writing into a live model: tests/integration."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_agent.errors import WeightSyncError
from megatron_agent.types import ShardCopy
from megatron_agent.weights.plan import is_added, to_plain

pytestmark = pytest.mark.integration  # imports vLLM

ROW = ((0, 2),)
PLAN = [  # rank 1 holds nothing but padding of the vocabulary
    ShardCopy(0, "a", ROW, 0, "embed", ROW),
    ShardCopy(0, "b", ROW, 0, "w", ROW),
    ShardCopy(0, "b", ROW, 1, "w", ROW),
]


def receiver(names, rank):
    from megatron_agent.weights.receiver import InitInfo, ShardReceiver

    made = object.__new__(ShardReceiver)
    made.parallel_config = SimpleNamespace(rank=rank, tensor_parallel_size=2)
    made.vllm_config = SimpleNamespace(quant_config=None)
    made.model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.zeros(2)) for name in names})
    copies = [to_plain([copy for copy in PLAN if copy.dst_rank == to]) for to in (0, 1)]
    made.init_transfer_engine(InitInfo(copies=copies, dtype="float32", first_rank=0))
    return made


def test_a_rank_of_padding_only_is_sent_less():
    assert receiver(["embed", "w"], 0)._mine == PLAN[:2]
    assert receiver(["embed", "w"], 1)._mine == PLAN[2:]


def test_shards_that_did_not_come_are_named():
    made = receiver(["embed", "w"], 0)
    made.start_weight_update()
    for copy in PLAN[:2]:
        with pytest.raises(WeightSyncError, match=copy.dst_param):
            made.finish_weight_update()
        made.write(copy, torch.ones(2))
        made.written(copy)
    made.finish_weight_update()
    assert all(parameter.tolist() == [1.0, 1.0] for parameter in made.model.parameters())


def test_models_that_the_plan_does_not_fit():
    with pytest.raises(WeightSyncError, match=r"does not fill vLLM's parameters \['x'\]"):
        receiver(["embed", "w", "x"], 0)
    with pytest.raises(WeightSyncError, match=r"no parameters \['embed'\]: another model family"):
        receiver(["w"], 0)


def test_what_quantisation_adds():
    names = ["a.weight_scale", "a.weight_scale_inv", "attn.k_scale", "a.input_scale", "a.weight_zero_point"]
    assert all(is_added(name) for name in names)
    assert not any(is_added(name) for name in ["a.weight", "a.bias", "scale", "rescale", "k_scale.weight"])


FAULTS = """
import resource
import torch
from megatron_agent.weights.receiver import reused_memory

def faults_of_the_second():
    torch.ones(16 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = faults_of_the_second()
with reused_memory():
    faults_of_the_second()  # the heap may first have to grow to a place where the block fits
    print(min(faults_of_the_second() for _ in range(5)) * 10 < usual)
"""


def test_memory_that_old_weights_leave_serves_new_ones():
    """Page faults in touching 64 MiB, of which another tensor has just gone; in a process whose heap nobody else has cut up."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split()[-1:] == ["True"], done.stderr[-2000:]
