"""Megatron-Core on CPU: `install()` stands in for the CUDA calls that megatron-core 0.16 makes unconditionally.

It does nothing where CUDA is available, so one program serves both. Called once per process, before megatron.core is
used; no code of Megatron is changed. Everything here was found by running (each block names what needs it).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable

import torch
from torch.optim.adam import adam

_CPU = torch.device("cpu")
_installed = False


class _Stream:
    """In place of torch.cuda.Stream and Event: on CPU an operation is done when it returns."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, *args: object, **kwargs: object) -> None:
        pass

    wait_event = record_event = record = synchronize = wait = wait_stream


class FusedAdam(torch.optim.Optimizer):
    """AdamW with the state layout of Apex and Transformer Engine: `step` in the group, two moments per parameter.

    DistributedOptimizer cannot reload a checkpoint written over torch.optim.AdamW (whose step is per parameter), and
    this layout makes CPU and GPU checkpoints the same.
    """

    def __init__(self, params, lr, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, bias_correction=True))
        self.decoupled = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            steps = [torch.tensor(float(group.get("step", 0))) for _ in params]
            group["step"] = group.get("step", 0) + 1
            for p in params:
                if not self.state[p]:
                    self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            adam(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                steps,
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                maximize=False,
                decoupled_weight_decay=self.decoupled,
            )


def install() -> bool:
    """Stand in for CUDA in this process; returns False where there is a GPU or it was done already."""
    global _installed
    if torch.cuda.is_available() or _installed:
        return False
    _installed = True
    # megatron.core.jit wraps small functions in torch.compile; there they run as they are.
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    import megatron.core.jit
    import megatron.core.tensor_parallel.random as rng

    megatron.core.jit.disable_jit_fuser()
    torch._dynamo.config.disable = True
    _redirect_devices()
    _redirect_random_state(rng)
    _redirect_streams()
    _redirect_optimizers()
    # There is one generator here, so Megatron's warning that "CPU RNG state changed" is always raised and never true.
    logging.getLogger(rng.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
    return True


def _returns(value: object) -> Callable[..., object]:
    # A new function each time: torch._dynamo refuses one object under two names of torch.
    return lambda *args, **kwargs: value


def _redirect_devices() -> None:
    """device=torch.cuda.current_device() (about 170 places) and device="cuda" (schedules, clip_grads, masks)."""

    def on_cpu(factory: Callable) -> Callable:
        @functools.wraps(factory)
        def wrapped(*args, **kwargs):
            if str(kwargs.get("device")).startswith("cuda"):
                kwargs["device"] = _CPU
            kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        return wrapped

    torch.cuda.current_device = _returns(_CPU)  # type: ignore[assignment]
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like"):
        setattr(torch, name, on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _redirect_random_state(rng) -> None:
    """The CPU generator plays the CUDA one's part (dropout, recompute, initialisation)."""
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    rng._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    rng._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _redirect_streams() -> None:
    for name in ("synchronize", "empty_cache", "set_device"):
        setattr(torch.cuda, name, _returns(None))
    torch.cuda.nvtx.range_push = _returns(None)
    torch.cuda.nvtx.range_pop = _returns(None)
    torch.cuda.Stream = torch.cuda.Event = _Stream  # type: ignore[assignment,misc]
    torch.cuda.current_stream = _returns(_Stream())  # type: ignore[assignment]
    torch.cuda.default_stream = _returns(_Stream())  # type: ignore[assignment]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment,return-value]


def _redirect_optimizers() -> None:
    """Megatron's optimizers sort parameters by tensor.type() == "torch.cuda.FloatTensor" and want Apex or TE Adam."""
    import megatron.core.optimizer as optim
    import megatron.core.optimizer.distrib_optimizer as distrib

    real_type = torch.Tensor.type

    def type_(self, *args, **kwargs):
        out = real_type(self, *args, **kwargs)
        if not args and not kwargs and sys._getframe(1).f_globals["__name__"].startswith("megatron.core."):
            out = out.replace("torch.", "torch.cuda.", 1)
        return out

    torch.Tensor.type = type_  # type: ignore[method-assign]
    optim.Adam = distrib.Adam = FusedAdam
    optim.USING_PYTORCH_OPTIMIZER = False
    distrib.HAVE_APEX_OR_TE = distrib.USING_APEX_OPTIMIZER = True


def guard_collectives() -> None:
    """Refuse non-contiguous tensors as NCCL does: gloo (torch 2.13) silently moves the wrong elements."""
    dist = torch.distributed

    def wrap(function: Callable) -> Callable:
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            for argument in (*args, *kwargs.values()):
                for tensor in argument if isinstance(argument, (list, tuple)) else (argument,):
                    if isinstance(tensor, torch.Tensor) and not tensor.is_contiguous():
                        raise ValueError(f"{function.__name__}: non-contiguous tensor {tuple(tensor.shape)}")
            return function(*args, **kwargs)

        return wrapped

    for name in ("broadcast", "all_reduce", "all_gather", "all_gather_into_tensor", "scatter", "gather"):
        setattr(dist, name, wrap(getattr(dist, name)))
