"""One vLLM engine: token rows and pictures in, tokens with log-probs and weight versions out; new weights in between.

`Engine` is a plain class; `cluster.py` makes a Ray actor of it. vLLM runs its scheduler and model in a child process of
that actor, so preparing requests and stepping the model overlap. The configuration part imports nothing heavy.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from megatron_agent.errors import ConfigError, EngineError, RequestLostError, WeightSyncError
from megatron_agent.rollout.generation import Generation, Sampling, first_difference, versions_of
from megatron_agent.types import BANNED_LOGIT_BIAS, TRANSPORTS, ImageRef

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    from megatron_agent.data.images import ImageStore

logger = logging.getLogger(__name__)

RECEIVER_MODULE = "megatron_agent.weights.receiver"
KV_BLOCK_TOKENS = 32  # the prefix cache shares whole blocks only; vLLM's 128 on CPU exceeds many a prompt
WORKER_EXTENSION = "megatron_agent.rollout.worker_extension.WorkerExtension"
DTYPES = ("auto", "float32", "bfloat16", "float16")
ENCODER_BUDGET_FACTOR = 16
CACHE_MISS_ATTEMPTS = 3  # a sync that clears vLLM's picture caches can overtake a request that was already prepared
LOOK_EVERY_S = 2.0


@dataclass
class EnvSampling:
    """What the episodes of one env do otherwise than `rollout` and `agent` say; None: as they say. `stop` comes on top."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    single_response_max_tokens: int | None = None
    max_turns: int | None = None
    stop: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _check_distribution("rollout.per_env", self.temperature, self.top_p, self.top_k)


@dataclass
class ValidationSampling:
    """How evaluations sample; `num_samples` episodes a task, over which the metrics are means."""

    temperature: float = 0.0  # greedy
    top_p: float = 1.0
    top_k: int = 0
    num_samples: int = 1

    def __post_init__(self) -> None:
        _check_distribution("rollout.validation", self.temperature, self.top_p, self.top_k)
        _require(self.num_samples >= 1, f"rollout.validation.num_samples={self.num_samples} must be 1 or more")


@dataclass
class RolloutConfig:
    """Engines and how they sample. Sizes are tokens; `gpu_memory_utilization` is a share of the device (GPU only).

    `ban_special_tokens` keeps the model from writing image placeholders and all special tokens but those that end a turn;
    the trainer's log-probs are then taken under the same ban. Off by default: a placeholder has a status of its own.
    `per_env` gives the episodes of an env (by its name) settings of their own, `validation` those of evaluations.
    `oversample` is the share of groups that a step starts beyond those that it waits for: the slowest are cancelled (a bias
    towards short episodes) or, with `carry_over`, go on during the update and are part of a later step.
    """

    num_engines: int = 1
    tensor_parallel: int = 1
    group_size: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    max_model_len: int = 2048
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 4096
    dtype: str = "float32"
    quantization: str = ""  # vLLM's name of one that it does itself while it loads, e.g. fp8; "": none
    gpu_memory_utilization: float = 0.6
    cpu_kvcache_gib: int = 1
    num_cpu_threads: int = 1
    enforce_eager: bool = True
    mm_encoder_tp_mode: str = "weights"  # vLLM's: the vision tower split over the tensor ranks, or "data": whole on each
    weight_transport: str = "auto"  # shared_memory, cuda_ipc, nccl, gloo; auto: by where the two ranks sit
    weight_relay: str = "auto"  # engines pass weights on where that is faster: auto (on GPUs), always, never
    max_restarts: int = 3  # of an engine that died; beyond that the run goes on without it
    ban_special_tokens: bool = False
    oversample: float = 0.0
    carry_over: bool = False
    per_env: dict[str, EnvSampling] = field(default_factory=dict)
    validation: ValidationSampling = field(default_factory=ValidationSampling)

    def __post_init__(self) -> None:
        counts = ("num_engines", "tensor_parallel", "group_size", "max_num_seqs", "cpu_kvcache_gib", "num_cpu_threads")
        for name in counts:
            _require(getattr(self, name) >= 1, f"rollout.{name}={getattr(self, name)} must be 1 or more")
        _require(self.max_model_len >= 16, f"rollout.max_model_len={self.max_model_len} must be 16 tokens or more")
        _require(
            self.max_num_batched_tokens >= self.max_num_seqs,
            f"rollout.max_num_batched_tokens={self.max_num_batched_tokens} must be at least rollout.max_num_seqs="
            f"{self.max_num_seqs}: every running sequence needs a token of each step",
        )
        _require(0 <= self.oversample < math.inf, f"rollout.oversample={self.oversample} must be 0 (off) or more")
        _require(not self.carry_over or self.oversample > 0, "rollout.carry_over needs rollout.oversample above 0")
        _check_distribution("rollout", self.temperature, self.top_p, self.top_k)
        _require(self.dtype in DTYPES, f"rollout.dtype={self.dtype!r}; allowed: {', '.join(DTYPES)}")
        _require(self.mm_encoder_tp_mode in ("weights", "data"),
                 f"rollout.mm_encoder_tp_mode={self.mm_encoder_tp_mode!r}; allowed: weights, data")  # fmt: skip
        _require(self.weight_transport in TRANSPORTS,
                 f"rollout.weight_transport={self.weight_transport!r}; allowed: {', '.join(TRANSPORTS)}")  # fmt: skip
        _require(self.weight_relay in ("auto", "always", "never"),
                 f"rollout.weight_relay={self.weight_relay!r}; allowed: auto, always, never")  # fmt: skip
        _require(self.max_restarts >= 0, f"rollout.max_restarts={self.max_restarts} must be 0 (never) or more")
        _require(0 < self.gpu_memory_utilization <= 1, "rollout.gpu_memory_utilization must be above 0 and at most 1")


def _check_distribution(where: str, temperature: float | None, top_p: float | None, top_k: int | None) -> None:
    _require(temperature is None or temperature >= 0, f"{where}.temperature={temperature} must be 0 (greedy) or more")
    _require(top_p is None or 0 < top_p <= 1, f"{where}.top_p={top_p} must be above 0 and at most 1 (1: off)")
    _require(top_k is None or top_k >= 0, f"{where}.top_k={top_k} must be 0 (off) or more")


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


class Engine:
    """One AsyncLLM with prefix and picture caches on. All calls are made on the event loop that first calls `generate`.

    consumes: token rows, ImageRefs that `store` can open, weights from the receiver in the worker processes.
    waits for: vLLM's child process, in every coroutine here.
    unblocked by: the end of the turn (`generate`), the last shard received (`sync_weights`).
    produces: Generations; weight versions that later Generations are stamped with.

    `weight_transfer` names the receiver's backend; empty for an engine that keeps its checkpoint (evaluation).
    Raises EngineError when vLLM does not start.
    """

    def __init__(
        self,
        model_path: str,
        config: RolloutConfig,
        store: ImageStore,
        max_images: int = 8,
        seed: int = 0,
        weight_transfer: str = "megatron_agent",
        worker_extension: str = WORKER_EXTENSION,
    ) -> None:
        from transformers import AutoConfig

        self.model_path, self.config, self.store = model_path, config, store
        self.image_pad_id: int | None = getattr(AutoConfig.from_pretrained(model_path), "image_token_id", None)
        self._request_ids = itertools.count()
        self._num_requests = self._num_tokens = self._num_prompt_tokens = self._num_cached_tokens = 0
        self._seed, self._max_images = seed, max_images
        self._weight_transfer, self._worker_extension = weight_transfer, worker_extension
        if weight_transfer == "megatron_agent":
            importlib.import_module(RECEIVER_MODULE).register()
        self.llm: AsyncLLM = self._start()

    def _start(self) -> AsyncLLM:
        set_environment(self.config)
        from vllm import AsyncEngineArgs
        from vllm.config import WeightTransferConfig
        from vllm.v1.engine.async_llm import AsyncLLM

        config = self.config
        dtype: Any = config.dtype  # checked against DTYPES, which vLLM spells as a Literal
        transfer: dict[str, Any] = {}
        if self._weight_transfer:
            transfer["weight_transfer_config"] = WeightTransferConfig(backend=self._weight_transfer)
            transfer["worker_extension_cls"] = self._worker_extension
        try:
            vllm_config = AsyncEngineArgs(
                model=self.model_path,
                dtype=dtype,
                quantization=config.quantization or None,
                seed=self._seed,
                tensor_parallel_size=config.tensor_parallel,
                max_model_len=config.max_model_len,
                max_num_seqs=config.max_num_seqs,
                gpu_memory_utilization=config.gpu_memory_utilization,
                enforce_eager=config.enforce_eager,
                enable_prefix_caching=True,
                block_size=KV_BLOCK_TOKENS,
                limit_mm_per_prompt={"image": self._max_images, "video": 0},
                logprobs_mode="processed_logprobs",
                mm_encoder_tp_mode=config.mm_encoder_tp_mode,  # type: ignore[arg-type]
                **self._prefill_options(),
                **transfer,
            ).create_engine_config()
            scheduler = vllm_config.scheduler_config
            if not scheduler.enable_chunked_prefill:
                # Pictures beyond the encoder's budget of a step would split a prompt too.
                scheduler.max_num_encoder_input_tokens *= ENCODER_BUDGET_FACTOR
                scheduler.encoder_cache_size *= ENCODER_BUDGET_FACTOR
            return AsyncLLM.from_vllm_config(vllm_config, disable_log_stats=True)
        except (RuntimeError, ValueError) as error:
            raise EngineError(f"vLLM did not start with {self.model_path}: {error}") from error

    def _prefill_options(self) -> dict[str, Any]:
        """Prompts may be split over steps, except on CPU, where vLLM 0.32 dies when a prompt with a seed of its own is.

        It rewinds the random generator of such a request, which torch's CPU generator cannot do.
        """
        import torch

        budget_tokens = self.config.max_num_batched_tokens
        if torch.cuda.is_available():
            return {"max_num_batched_tokens": budget_tokens}
        return {"max_num_batched_tokens": max(budget_tokens, self.config.max_model_len), "enable_chunked_prefill": False}

    async def generate(self, row: list[int], images: list[ImageRef], sampling: Sampling) -> Generation:
        """Sample one turn behind `row` (one image token per merged patch; `images` in row order).

        A weight update cuts it: what was sampled so far stays, with the version that sampled it, and the rest is sampled
        behind it from the new weights. The tokens that might begin a stop string are sampled again.
        Raises RequestLostError when vLLM fails on this request again and again, EngineError when it refuses it or expands
        its pictures into another row than `row`: the trainer would train on tokens that the model never saw.
        """
        turn = await self._sampled(row, images, sampling)
        # Behind a placeholder that the model wrote there is nothing to go on from: the row has no picture for it.
        while turn.stop_reason == "aborted" and self.image_pad_id not in turn.token_ids:
            partial_stop = max((len(stop.encode()) for stop in sampling.stop), default=1) - 1
            turn = turn.first(len(turn.token_ids) - partial_stop)
            num_tokens = len(turn.token_ids)
            seed = None if sampling.seed is None else (sampling.seed + num_tokens) % 2**31  # other random numbers
            rest = replace(sampling, max_tokens=sampling.max_tokens - num_tokens, seed=seed)
            turn = turn.then(await self._sampled(row + turn.token_ids, images, rest))
        return turn

    async def _sampled(self, row: list[int], images: list[ImageRef], sampling: Sampling) -> Generation:
        prompt = self._prompt(row, images)
        for _ in range(CACHE_MISS_ATTEMPTS):
            final = await self._request(prompt, self._parameters(sampling))
            if isinstance(final, str):
                logger.warning("vLLM failed on a request of %d tokens: %s", len(row), final)
            elif final.outputs[0].finish_reason != "error":
                break
        else:
            why = final if isinstance(final, str) else "see its log"
            raise RequestLostError(f"vLLM failed {CACHE_MISS_ATTEMPTS} times on one request: {why}")
        if final.prompt_token_ids != row:
            raise EngineError(
                f"vLLM expanded the prompt to another row, {first_difference(row, final.prompt_token_ids or [])}; "
                f"pictures must have sides that its processor keeps (multiples of 28 px, within its pixel limits)"
            )
        return self._finished(final)

    def _prompt(self, row: list[int], images: list[ImageRef]) -> dict[str, Any]:
        """vLLM's: one placeholder a picture, which it expands again."""
        prompt: dict[str, Any] = {"prompt_token_ids": _collapse(row, self.image_pad_id)}
        if images:
            prompt["multi_modal_data"] = {"image": [self.store.picture(ref) for ref in images]}
            prompt["multi_modal_uuids"] = {"image": [ref.key for ref in images]}
        return prompt

    async def _request(self, prompt: dict[str, Any], parameters: SamplingParams) -> RequestOutput | str:
        """A text says what went wrong with this request alone, such as a picture that left the cache on its way."""
        from vllm.v1.engine.exceptions import EngineGenerateError

        final: RequestOutput | None = None
        try:
            async for output in self.llm.generate(prompt, parameters, request_id=str(next(self._request_ids))):  # type: ignore[arg-type]
                final = output
        except EngineGenerateError as error:
            return repr(error.__cause__ or error)
        except Exception as error:  # noqa: BLE001 - vLLM's errors have no common root and do not all unpickle in the driver
            raise EngineError(f"vLLM failed on a request of {len(prompt['prompt_token_ids'])} tokens: {error!r}") from None
        if final is None:
            raise EngineError("vLLM ended a request without any output")
        return final

    def _finished(self, final: RequestOutput) -> Generation:
        output = final.outputs[0]
        token_ids = list(output.token_ids)
        logprobs = [(at or {})[token_id].logprob for token_id, at in zip(token_ids, output.logprobs or (), strict=True)]
        self._num_requests += 1
        self._num_tokens += len(token_ids)
        self._num_prompt_tokens += len(final.prompt_token_ids or ())
        num_cached_tokens = final.num_cached_tokens or 0
        self._num_cached_tokens += num_cached_tokens
        reason = output.finish_reason if output.finish_reason in ("stop", "length") else "aborted"
        return Generation(token_ids, logprobs, versions_of(output, len(token_ids)), str(reason), num_cached_tokens)

    def _parameters(self, sampling: Sampling) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            stop=list(sampling.stop) or None,
            seed=sampling.seed,
            logprobs=0,
            detokenize=bool(sampling.stop),  # text is only needed to find stop strings
            include_stop_str_in_output=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            logit_bias=dict.fromkeys(sampling.banned_token_ids, BANNED_LOGIT_BIAS) or None,
            skip_clone=True,
        )

    async def init_weight_transfer(self, info: dict[str, Any]) -> None:
        """Give the receivers in the worker processes what they need to meet the senders."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self.llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info))

    async def sync_weights(self, update: dict[str, Any], version: int) -> None:
        """Replace the weights by what the receivers get for `update`; tokens from now on carry `version`.

        waits for: the running step, then the receivers. Turns in flight are cut and go on afterwards (`generate`); what was
        computed under the old weights is computed anew, so that every new token follows from the new weights alone.
        Raises WeightSyncError and leaves the engine paused: nothing may be sampled from weights that are half old.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        try:
            # Not "keep": where the prefix cache had a picture, vLLM 0.32's worker has no pixels to encode it anew from.
            await self.llm.pause_generation(mode="abort", clear_cache=False)
            await self.llm.start_weight_update()
            await self.llm.update_weights(WeightTransferUpdateRequest(update_info=update))
            await self.llm.finish_weight_update(weight_version=str(version))
            await self.llm.reset_prefix_cache()
            # Pictures stay encoded by the old vision tower unless these go too.
            await self.llm.reset_mm_cache()
            await self.llm.reset_encoder_cache()
        except Exception as error:  # noqa: BLE001 - whatever it was, the weights are not known to be whole
            raise WeightSyncError(f"weights of version {version} did not arrive: {error!r}; generation stays paused") from None
        await self.llm.resume_generation()

    async def describe(self) -> list[dict[str, tuple[int, ...] | None]]:
        """Parameter name -> shape of every worker, as vLLM holds them (needs the worker extension).

        None: packed, or quantised perhaps, and then in a layout of vLLM's choice. The receiver looks at the shapes that
        quantised ones are loaded in (weights/reload.py).
        """
        workers = await self.llm.collective_rpc("describe_parameters")

        def known(shape: Sequence[int] | None) -> tuple[int, ...] | None:
            if shape is None or (self.config.quantization and len(shape) > 1 and 0 not in shape):
                return None
            return tuple(shape)

        return [{name: known(shape) for name, shape in worker.items()} for worker in workers]

    async def places(self) -> list[tuple[str, str]]:
        """(host, device) of every worker (needs the worker extension)."""
        return [(host, device) for host, device in await self.llm.collective_rpc("place")]

    async def checksums(self) -> list[dict[str, str]]:
        """Checksum of every parameter, per worker."""
        return await self.llm.compute_weight_checksums()

    async def is_alive(self) -> bool:
        """Whether vLLM's processes still serve; after False every request would fail."""
        return not self.llm.errored

    async def until_dead(self) -> None:
        """Returns when vLLM's processes do not serve any more; where this process itself dies, Ray tells the caller."""
        while await self.is_alive():
            await asyncio.sleep(LOOK_EVERY_S)

    async def pid(self) -> int:
        return os.getpid()

    async def stats(self) -> dict[str, float]:
        """Counts since the start, requests under way, and the share of prompt tokens that the prefix cache had."""
        return {
            "num_requests": float(self._num_requests),
            "num_unfinished_requests": float(self.llm.get_num_unfinished_requests()),
            "num_generated_tokens": float(self._num_tokens),
            "num_prompt_tokens": float(self._num_prompt_tokens),
            "prefix_cache_hit_rate": self._num_cached_tokens / max(1, self._num_prompt_tokens),
        }

    def shutdown(self) -> None:
        """Stop vLLM's processes; the engine is of no use afterwards. May be called twice."""
        llm = self.__dict__.pop("llm", None)
        if llm is not None:
            llm.shutdown()


def set_environment(config: RolloutConfig) -> None:
    """What vLLM reads from the environment of this process and its children. On a GPU nearly nothing."""
    import torch

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if torch.cuda.is_available():
        return
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(config.cpu_kvcache_gib)
    # Every new length of a row is a new primitive. vLLM keeps 128 of each layer's; oneDNN's own cache of 1,024 on top of them
    # only grows the process, by hundreds of MiB over hundreds of steps.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    # The model then runs in the scheduler's process: one process less to feed and to wake.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # Trainer ranks share the cores: no thread may own one, nor spin while it waits.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ["OMP_NUM_THREADS"] = str(config.num_cpu_threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if config.enforce_eager:
        # Even eager vLLM compiles one little function (ranks of log-probs), for seconds, within the first request.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")


def _collapse(row: Sequence[int], image_pad_id: int | None) -> list[int]:
    from megatron_agent.models.renderer import collapse_runs

    return list(row) if image_pad_id is None else collapse_runs(row, image_pad_id)
