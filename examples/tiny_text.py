"""What the text examples share: a Qwen2.5 small enough to learn on a laptop, rows in the dataset's columns, and a folder
that is either absent or complete.

The checkpoint has the layout of the published Qwen2.5 models (architecture, special tokens, chat template), so that
whatever loads those loads this.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SCHEMA = pa.schema({
    "data_source": pa.string(),
    "prompt": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
    "env_name": pa.string(),
    "ability": pa.string(),
    "reward_model": pa.struct({"style": pa.string(), "ground_truth": pa.string()}),
    "extra_info": pa.struct({
        "question": pa.string(), "index": pa.int64(), "split": pa.string(), "seed": pa.int64(), "size": pa.int64(),
        "p": pa.float64(),
    }),
})  # fmt: skip
SCRIPT = pa.field("script", pa.list_(pa.string()))


def make_tokenizer(texts: list[str], protocol: list[str]) -> "PreTrainedTokenizerFast":
    """A byte-level BPE over Qwen's own pre-tokenizer in which every word of `texts`, with the space before it, and every
    string of `protocol` is one token; any other text still encodes, byte by byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    from examples.quickstart.tiny_model import CHAT_TEMPLATE, PLAIN_TOKENS, SPECIAL_TOKENS

    plain = PLAIN_TOKENS + protocol
    known = re.compile("|".join(map(re.escape, SPECIAL_TOKENS + plain)))
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, min_frequency=2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    pieces = [piece for text in texts for piece in known.split(text) if piece]
    core.train_from_iterator(pieces * 2, trainer)  # twice: a word seen once must count as frequent too
    core.add_special_tokens(SPECIAL_TOKENS)
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE,
        model_max_length=4096, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def write_text_model(folder: Path, texts: list[str], protocol: list[str], seed: int) -> None:
    """A Qwen2 checkpoint of under a million parameters whose tokenizer knows `texts` and `protocol`; the weights depend on
    `seed` alone. Heads are 32 wide, the least that vLLM's attention on CPU takes."""
    import torch  # late: importing it takes seconds, and often there is nothing to write
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tokenizer(texts, protocol)
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    config = Qwen2Config(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=(len(tokenizer) + 63) // 64 * 64, max_position_embeddings=4096, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5}, tie_word_embeddings=True, initializer_range=0.08,
        bos_token_id=pad, eos_token_id=end, pad_token_id=pad,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config).float()
    model.generation_config.update(do_sample=True, bos_token_id=pad, eos_token_id=[end, pad], pad_token_id=pad)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(path: Path, rows: list[dict]) -> None:
    """One parquet file; rows get their index and the file's name."""
    for index, row in enumerate(rows):
        row["extra_info"] |= {"index": index, "split": path.stem}
    schema = SCHEMA.append(SCRIPT) if "script" in rows[0] else SCHEMA
    pq.write_table(pa.Table.from_pylist(rows, schema), path)


def prepare(out: Path, seed: int, code: list[Path], write_all: Callable[[Path, int], None]) -> bool:
    """Make sure that `out` holds what `write_all(folder, seed)` writes; returns whether anything had to be written.

    `code` are the files that the output depends on. Work happens in a folder beside `out` that takes its name at the end.
    """
    out, done = out.absolute(), "recipe.json"
    source = b"".join(path.read_bytes() for path in [Path(__file__), *code])
    recipe = {"seed": seed, "code": hashlib.sha256(source).hexdigest()}
    if out.exists():
        if (out / done).exists() and json.loads((out / done).read_text()) == recipe:
            return False
        if any(out.iterdir()) and not (out / done).exists():
            raise SystemExit(f"{out} holds files that are not ours: choose another --out or remove it")
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        write_all(aside, seed)
        (aside / done).write_text(json.dumps(recipe, indent=2) + "\n")
        if out.exists():
            shutil.rmtree(out)
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return True
