"""A Qwen2.5-VL small enough to learn on a laptop: tokenizer, chat template, processor settings and random weights.

The checkpoint has the layout of the published Qwen2.5-VL models (same architecture, same special tokens in the same
order, same way to render a conversation), so that whatever loads those loads this: transformers, vLLM, and our actor.
"""

import json
import re
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from megatron_agent.models.qwen2_5_vl.template import CHAT_TEMPLATE

SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
PLAIN_TOKENS = [  # one token each, yet kept when special tokens are skipped in decoding
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>", "<answer>", "</answer>",
]  # fmt: skip


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in which every word of `texts` is one token; any other text still encodes, byte by byte.

    A word keeps the space that follows it, so that a name is the same token in a question, in a thought, and in an
    answer. Digits stay single, as in Qwen's own tokenizer.
    """
    known = re.compile("|".join(map(re.escape, SPECIAL_TOKENS + PLAIN_TOKENS)))
    pieces = [piece for text in texts for piece in known.split(text) if piece]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|[?.]|[^\s\d?.]+ ?|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, min_frequency=2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(pieces * 2, trainer)  # twice: a word seen once must count as frequent too
    core.add_special_tokens(SPECIAL_TOKENS)
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE,
        model_max_length=4096, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """Under a million parameters. Heads are 32 wide, the least that vLLM's attention on CPU takes."""
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    text = dict(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=(len(tokenizer) + 63) // 64 * 64, max_position_embeddings=4096, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5, "mrope_section": [4, 6, 6]},
        tie_word_embeddings=True, initializer_range=0.08, bos_token_id=pad, eos_token_id=end, pad_token_id=pad,
    )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=128, patch_size=14,
        spatial_merge_size=2, temporal_patch_size=2, window_size=112, fullatt_block_indexes=[1], in_channels=3,
        hidden_act="silu", initializer_range=0.08,
    )  # fmt: skip
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(list(tokens)), strict=True))
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)


def write_model(folder: Path, texts: list[str], seed: int) -> PreTrainedTokenizerFast:
    """Write a checkpoint whose tokenizer knows the words of `texts`; the weights depend on `seed` alone."""
    tokenizer = make_tokenizer(texts)
    config = make_config(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config).float()
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.generation_config.update(do_sample=True, bos_token_id=pad, eos_token_id=[end, pad], pad_token_id=pad)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    limits = dict(min_pixels=28 * 28, max_pixels=12845056)
    processor = dict(
        image_processor_type="Qwen2VLImageProcessor", processor_class="Qwen2_5_VLProcessor", **limits,
        size={"shortest_edge": limits["min_pixels"], "longest_edge": limits["max_pixels"]},
        patch_size=14, temporal_patch_size=2, merge_size=2,
        do_resize=True, do_rescale=True, do_normalize=True, do_convert_rgb=True,
        image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711],
    )  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    return tokenizer
