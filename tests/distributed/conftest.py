"""Four ranks for the whole session, and transformers' log-probs and gradients of the same rows."""

import pytest
import rank_jobs
import torch
from ranks import Ranks

from megatron_agent.models.qwen2_5_vl import Qwen2_5_VL


@pytest.fixture(scope="package")
def ranks():
    ranks = Ranks()
    ranks.start()
    yield ranks
    ranks.stop()


def hf_name(name):
    """Name in memory -> name in the file."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


class Reference:
    """transformers on the rows of rank_jobs: log-probs of the action tokens, and the gradient of their mean loss."""

    def __init__(self, path, gradient_file):
        from safetensors.torch import save_file
        from transformers import Qwen2_5_VLForConditionalGeneration

        family = Qwen2_5_VL(path)
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
        samples = rank_jobs.make_samples(family)
        self.num_tokens = sum(s.num_action_tokens for s in samples)
        self.logits, total = [], 0.0
        for sample in samples:
            logits = self._logits(model, family, sample)
            own = [t for t, is_own in enumerate(sample.action_mask_T) if is_own]
            rows = logits[[t - 1 for t in own]]
            ids = torch.tensor([sample.token_ids_T[t] for t in own])
            self.logits.append((rows.detach(), ids))
            loss = -rows.log_softmax(-1)[torch.arange(len(own)), ids].sum() / self.num_tokens
            loss.backward()
            total += loss.item()
        self.loss, self.gradient_file = total, gradient_file
        save_file({hf_name(n): p.grad.contiguous() for n, p in model.named_parameters()}, gradient_file)

    @staticmethod
    def _logits(model, family, sample):
        row = torch.tensor([sample.token_ids_T])
        options = {}
        if sample.images:
            patches = [torch.from_numpy(family.patches(rank_jobs.pixels(ref))) for ref in sample.images]
            options["pixel_values"] = torch.cat(patches)
            options["image_grid_thw"] = torch.tensor([family.grid(ref) for ref in sample.images])
        return model(input_ids=row, mm_token_type_ids=(row == family.image_token_id).int(), **options).logits[0]

    def logprobs(self, temperature=1.0):
        """Per sample, of its action tokens."""
        return [(rows / temperature).log_softmax(-1)[torch.arange(len(ids)), ids].tolist() for rows, ids in self.logits]


@pytest.fixture(scope="session")
def references(tiny_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    return {name: Reference(path, folder / f"{name}.safetensors") for name, path in tiny_models.items()}
