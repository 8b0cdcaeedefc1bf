"""The Qwen2 text family on real ranks against transformers: log-probs and the gradient of every tensor.

Not covered: more Adam steps and layouts (tools/parity.py takes a text model too), bfloat16, GPUs.
"""

import math

import numpy as np
import pytest
import rank_jobs_text
import torch
from safetensors.torch import save_file

from megatron_agent.training.layout import Layout

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(2),
    "pp2": Layout(pipeline_parallel=2),  # two layers and one: the head counts
    "tp4sp": Layout(4, sequence_parallel=True),  # more ranks than the two KV heads
    "cp2": Layout(context_parallel=2),
    "pp3": Layout(pipeline_parallel=3),
}


@pytest.fixture(scope="module")
def reference(tiny_text_model, tmp_path_factory):
    """-> log-probs by row, the file of gradients, shapes by HF name."""
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(tiny_text_model, dtype=torch.float32).eval()
    samples, logprobs = rank_jobs_text.make_samples(), []
    num_tokens = sum(s.num_action_tokens for s in samples)
    for sample in samples:
        row, own = torch.tensor([sample.token_ids_T]), torch.tensor(sample.action_mask_T).nonzero()[:, 0]
        found = model(input_ids=row).logits[0, own - 1].log_softmax(-1).gather(1, row[0, own, None])[:, 0]
        (-found.sum() / num_tokens).backward()
        logprobs.append(found.tolist())
    file = tmp_path_factory.mktemp("text") / "gradients.safetensors"
    save_file({name: p.grad.contiguous() for name, p in model.named_parameters()}, file)
    return logprobs, file, {name: p.numel() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_logprobs_and_gradients_equal_transformers(ranks, tiny_text_model, reference, name):
    logprobs, file, sizes = reference
    results = ranks.run(LAYOUTS[name].world_size, rank_jobs_text.compare, tiny_text_model, LAYOUTS[name], file)
    found = dict(item for of_rank, _ in results for item in of_rank.items())
    assert [len(found[row]) for row in range(len(logprobs))] == [len(row) for row in logprobs]
    assert max(np.abs(np.subtract(found[i], row)).max() for i, row in enumerate(logprobs)) < 2e-5
    errors = [item for _, of_rank in results for item in of_rank.items()]
    assert [(box, error) for box, error in errors if not error < 2e-6] == []
    covered = dict.fromkeys(sizes, 0)
    for tensor, box in {where for where, _ in errors}:
        covered[tensor] += math.prod(stop - start for start, stop in box)
    assert covered == sizes
