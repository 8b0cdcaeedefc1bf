"""Syncs through vLLM's reload, the engine and its receiver in this very process; test_reload.py runs it.

    python reload_in_one_process.py MODEL OTHER_MODEL DTYPE QUANTIZATION

Shards are cut from the checkpoint on disk and handed to the receiver as the transport would.
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from megatron_agent.models.mapping import as_index
from megatron_agent.rollout.engine import RolloutConfig, set_environment
from megatron_agent.training.hf_export import read_family
from megatron_agent.training.layout import Layout
from megatron_agent.weights.buckets import checksum
from megatron_agent.weights.plan import RolloutLayout, plan_transfer, to_plain
from tests.unit.weights.plan_reference import megatron_shard

HF, OTHER = Path(sys.argv[1]), Path(sys.argv[2])
DTYPE, QUANTIZATION = sys.argv[3:5]


def shards_of(folder, family):
    dtype = getattr(torch, DTYPE)
    weights = {name: tensor.to(dtype).float().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    shard = megatron_shard(weights, family.text, Layout(), 0)
    return {name: torch.from_numpy(tensor.copy()).to(dtype) for name, tensor in shard.items()}


def main():
    set_environment(RolloutConfig())
    from vllm import LLM, SamplingParams
    from vllm.config import WeightTransferConfig

    from megatron_agent.weights.receiver import BACKEND, ShardReceiver, register
    from megatron_agent.weights.reload import LayerwiseReload

    register()
    family = read_family(HF)
    plan = plan_transfer(family.table(Layout(), False), family.num_layers, Layout(), RolloutLayout())
    copies = plan.receives(0, 0)

    def make(folder):
        transfer = WeightTransferConfig(backend=BACKEND)
        return LLM(
            str(folder), dtype=DTYPE, quantization=QUANTIZATION or None, max_model_len=256, max_num_seqs=4, enforce_eager=True,
            limit_mm_per_prompt={"image": 1, "video": 0}, weight_transfer_config=transfer, logprobs_mode="processed_logprobs",
            enable_prefix_caching=False,
        )  # fmt: skip

    picture = Image.effect_noise((112, 84), 80).convert("RGB")

    def answers(llm):
        llm.llm_engine.reset_mm_cache()
        llm.llm_engine.reset_encoder_cache()
        text = "<|vision_start|><|image_pad|><|vision_end|>what color is it ?"
        row = llm.get_tokenizer().encode(text)
        prompts = [{"prompt_token_ids": row, "multi_modal_data": {"image": [picture]}}, {"prompt_token_ids": row[3:]}]
        sampling = SamplingParams(max_tokens=16, temperature=0, logprobs=0, ignore_eos=True)
        outputs = [llm.generate([prompt], sampling, use_tqdm=False)[0].outputs[0] for prompt in prompts]
        return [(list(o.token_ids), [next(iter(at.values())).logprob for at in o.logprobs]) for o in outputs]

    def model_of(llm):
        return llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()

    def parameters(llm):
        return {name: parameter.data.clone() for name, parameter in model_of(llm).named_parameters()}

    def storages(llm):
        return {name: parameter.data_ptr() for name, parameter in model_of(llm).named_parameters()}

    report, most_open = {}, 0

    def receive(receiver, info):
        nonlocal most_open
        shards = shards_of(Path(info.sync_round["key"]), family)
        for copy in copies:
            values = shards[copy.src_param][as_index(copy.src_slice)]
            place = receiver.write(copy, values)
            assert checksum(place) == checksum(values), copy
            if receiver._reload is not None:
                unfinished = [name for name in receiver._reload._begun if receiver._reload._missing[name]]
                most_open = max(most_open, len(unfinished))
            receiver.written(copy)

    ShardReceiver.receive_weights = receive

    def sync(llm, folder):
        llm.collective_rpc("start_weight_update")
        llm.collective_rpc("update_weights", kwargs={"update_info": {"sync_round": {"key": str(folder)}}})
        llm.collective_rpc("finish_weight_update")

    def connect(llm):
        info = {"copies": [to_plain(copies)], "dtype": DTYPE, "first_rank": 0}
        llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": info})

    llm, fresh = make(HF), make(OTHER)
    before, expected, wanted_parameters = answers(llm), answers(fresh), parameters(fresh)
    if not QUANTIZATION:
        connect(fresh)
        sync(fresh, OTHER)
        report["the ordinary way changes nothing"] = answers(fresh) == expected
    ShardReceiver._always_reloads = not QUANTIZATION
    connect(llm)
    assert isinstance(llm.llm_engine.model_executor.driver_worker.worker.weight_transfer_engine._reload, LayerwiseReload)
    old = storages(llm)
    sync(llm, OTHER)
    got = parameters(llm)
    report["answers differ before"] = before != expected
    report["answers"] = answers(llm) == expected
    report["parameters"] = got.keys() == wanted_parameters.keys() and all(
        torch.equal(got[name].float(), wanted.float()) for name, wanted in wanted_parameters.items()
    )
    report["in place"] = storages(llm) == old
    sync(llm, HF)
    report["and back"] = answers(llm) == before
    report["quantised"] = sum(p.dtype == torch.float8_e4m3fn for p in got.values())
    report["layers at once"] = most_open
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
