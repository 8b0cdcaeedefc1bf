"""Messages <-> tokens for Qwen2-VL and Qwen2.5-VL checkpoints (ChatML, pictures between vision markers)."""

from __future__ import annotations

from megatron_agent.models.qwen2_5_vl.template import CHAT_TEMPLATE
from megatron_agent.models.renderer import ChatRenderer

PATCH_PX = 14
SPATIAL_MERGE = 2


class Renderer(ChatRenderer):
    """Token rows of Qwen2.5-VL: a picture of w x h px is (w / 28) x (h / 28) `<|image_pad|>` tokens between two markers."""

    end_of_turn = "<|im_end|>"
    image_placeholder = "<|image_pad|>"
    image_block = "<|vision_start|><|image_pad|><|vision_end|>"
    forbidden_tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")

    fallback_template = CHAT_TEMPLATE

    def __init__(self, model_path: str, merge_px: int = PATCH_PX * SPATIAL_MERGE) -> None:
        super().__init__(model_path, merge_px)


class TextRenderer(Renderer):
    """The same tokens with whatever template the checkpoint has: its system message and its tools are its own."""

    fallback_template = ""
