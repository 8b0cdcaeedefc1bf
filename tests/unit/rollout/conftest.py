"""A real tokenizer with a chat template of Qwen2.5-VL's kind; no model is run here."""

import sys
from pathlib import Path

import pytest

from megatron_agent.models.qwen2_5_vl.renderer import Renderer

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart"
WORDS = "system user assistant what color is it ? zoom red green turn on You are a helpful assistant. Error: the tool"


@pytest.fixture(scope="session")
def renderer(tmp_path_factory):
    sys.path.insert(0, str(QUICKSTART))
    try:
        from tiny_model import make_tokenizer
    finally:
        sys.path.remove(str(QUICKSTART))
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer([WORDS]).save_pretrained(folder)
    return Renderer(str(folder))
