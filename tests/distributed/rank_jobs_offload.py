"""What the ranks of test_offload_steps.py run."""

import gc
from pathlib import Path

from rank_jobs import BETAS, BUDGET_TOKENS, CLIP, LR, WEIGHT_DECAY, Steps, make_samples, pixels, plan_for

from megatron_agent.models.qwen2_5_vl import Qwen2_5_VL
from megatron_agent.training.layout import Layout
from megatron_agent.training.options import ModelOptions, OptimizerOptions
from megatron_agent.types import BatchSize


class OffloadSteps(Steps):
    """The same steps with a model of any dtype, and its Offload."""

    def __init__(self, path, layout, dtype, what):
        from megatron_agent.training.megatron import MegatronModel
        from megatron_agent.training.offload import Offload

        self.model = MegatronModel(Qwen2_5_VL(path), layout, ModelOptions(dtype))
        self.samples = make_samples(self.model.family)
        self.plan = plan_for(self.samples, layout, BUDGET_TOKENS)[self.model.at.data]
        self.size = BatchSize.of(self.samples)
        self.model.reset_optimizer(OptimizerOptions(LR, WEIGHT_DECAY, BETAS, CLIP))
        self.offload = Offload(self.model, what)

    def logprobs(self):
        return self.model.logprobs(self.samples, self.plan, pixels, 1.0)[0]

    def nbytes(self):
        from megatron_agent.training.offload import storages_of

        return {kind: sum(s.nbytes() for s in storages) for kind, storages in storages_of(self.model).items()}

    def contents(self):
        """Copies of all parameters, buffers, masters and moments."""
        model = self.model
        tensors = [*model.module.parameters(), *model.module.buffers()]
        tensors += [buffer.param_data for chunk in model.ddp for buffer in chunk.buffers]
        for optimizer in model.optimizer.chained_optimizers:
            tensors += [p for group in optimizer.optimizer.param_groups for p in group["params"]]
            tensors += [state[name] for state in optimizer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        return [tensor.detach().clone() for tensor in tensors]


def stay_and_leave(path, layout, dtype, what):
    """-> the rounds of a model that stays, and, from the same weights, of one that leaves."""
    import torch

    steps = OffloadSteps(path, layout, dtype, "none")
    start = [parameter.detach().clone() for parameter in steps.model.module.parameters()]
    stays = take_rounds(steps)
    with torch.no_grad():
        for parameter, value in zip(steps.model.module.parameters(), start, strict=True):
            parameter.copy_(value)
    steps.model.reset_optimizer(OptimizerOptions(LR, WEIGHT_DECAY, BETAS, CLIP))
    steps.offload.what = what
    return stays, take_rounds(steps)


def take_rounds(steps):
    """Three rounds: all away, log-probs with the parameters alone on the device, a step with everything."""
    import torch

    offload, found = steps.offload, []
    for _ in range(3):
        before, full = steps.contents(), steps.nbytes()
        freed, twice = offload.to_host(), offload.to_host()
        left = steps.nbytes()
        with offload.on_device("parameters"):
            logprobs = steps.logprobs()
            between = steps.nbytes()
        after = steps.nbytes()
        with offload.on_device("all"):
            same = all(torch.equal(a, b) for a, b in zip(before, steps.contents(), strict=True))
            zeros = not any(buffer.grad_data.any() for chunk in steps.model.ddp for buffer in chunk.buffers)
            step = steps.take(1)
            gradients = [buffer.grad_data.abs().sum().item() for chunk in steps.model.ddp for buffer in chunk.buffers]
        offload.to_device()
        offload.to_device()
        found.append(
            dict(full=full, freed=freed, twice=twice, left=left, between=between, after=after, same=same, zeros=zeros)
            | dict(logprobs=logprobs, step=step, gradients=gradients)
        )
    return found


def checkpoint_and_new_optimizer(path, layout, folder):
    """Save, load and reset of an offloaded model -> the steps after each, and what the same gives without offload."""
    from megatron_agent.training.checkpoint import load_megatron, save_megatron

    steps = OffloadSteps(path, layout, "bfloat16", "all")
    steps.take(1)
    steps.offload.to_host()
    with steps.offload.on_device("all"):
        save_megatron(steps.model, Path(folder))
    steps.offload.to_device()
    went_on = steps.take(2)
    steps.offload.to_host()
    with steps.offload.on_device("all"):
        load_megatron(steps.model, Path(folder))
    left = sum(steps.nbytes().values())
    with steps.offload.on_device("all"):
        again = steps.take(2)
    results = []
    for away in (False, True):
        if away:
            steps.offload.to_host()
        with steps.offload.on_device("all"):
            load_megatron(steps.model, Path(folder))
            steps.model.reset_optimizer(OptimizerOptions(LR, WEIGHT_DECAY, BETAS, CLIP))
        left += sum(steps.nbytes().values()) if away else 0
        with steps.offload.on_device("all"):
            results.append(steps.take(2))
    return {"went_on": went_on, "again": again, "left": left, "reset": results}


def live_bytes():
    """Of all tensors in this process, each storage once."""
    import torch

    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.layout == torch.strided and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def forgotten_bytes(path, layout, dtype):
    """-> bytes that the model takes, and those that its tensors, known to Offload or not, still take when it is away."""
    before = live_bytes()
    steps = OffloadSteps(path, layout, dtype, "all")
    steps.take(1)
    takes = live_bytes() - before
    freed = steps.offload.to_host()
    host = sum(chunk.nbytes for emptied in steps.offload.emptied.values() for chunk in emptied.chunks)
    return takes, freed, live_bytes() - before - host


def use_while_away(path, layout):
    """-> {(what is away, what is needed): the error's text, empty where there is none}."""
    from megatron_agent.errors import TrainingError
    from megatron_agent.training.offload import check_on_device

    steps = OffloadSteps(path, layout, "bfloat16", "all")
    steps.take(1)
    texts = {}
    for away in ("none", "optimizer", "all"):
        steps.offload.to_host(away)
        for needs in ("parameters", "all"):
            try:
                check_on_device(steps.model, needs)
                texts[away, needs] = ""
            except TrainingError as error:
                texts[away, needs] = str(error)
    return texts


def step_while_away(path):
    """-> what an update and log-probs of an offloaded model say."""
    from megatron_agent.errors import TrainingError

    steps, said = OffloadSteps(path, Layout(), "float32", "all"), []
    steps.offload.to_host()
    for work in (lambda: steps.take(1), steps.logprobs):
        try:
            work()
        except TrainingError as error:
            said.append(str(error))
    steps.offload.to_device()
    steps.take(1)
    return said
