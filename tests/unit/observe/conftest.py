"""Episodes with real pictures: a red square to find, one crop of it, and a model that tries to write HTML."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from megatron_agent.data.images import ImageStore, PixelLimits
from megatron_agent.types import ImageRef, RewardParts, Status, Task, ToolCall, Trajectory, Turn, Unscored

TARGET_BBOX_PX = [120, 80, 160, 120]


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images", PixelLimits(min_pixels=28 * 28, max_pixels=84 * 56))


@pytest.fixture
def make_episode(store: ImageStore) -> Callable[..., Trajectory]:
    """One look at a crop, then an answer."""
    original = Image.new("RGB", (240, 160), "#dbe4f0")
    ImageDraw.Draw(original).rectangle(TARGET_BBOX_PX, fill="#c0392b")
    source = store.put_picture(original).source

    def make(task_id: str = "t0", unscored: bool = False) -> Trajectory:
        picture = ImageRef(source, 84, 56)
        crop = ImageRef(source, 56, 56, crop_box_px=(100, 60, 180, 140))
        task = Task(
            task_id=task_id,
            data_source="quickstart",
            messages=({"role": "user", "content": "Which colour?"},),
            images=(picture,),
            env_name="crop",
            ground_truth="red",
            question="Which colour has the <small> square?",
            extra_info={"target_bbox": TARGET_BBOX_PX},
        )
        call = ToolCall("crop", True, "", 0.01, 0, box_px=(100, 60, 180, 140), shown_box_px=(35, 21, 63, 49))
        look = Turn(
            token_ids=[1, 2, 3],
            logprobs=[-0.5, -0.25, -0.75],
            weight_versions=[4, 4, 5],
            text='<think>It is <script>alert("x")</script></think>\n<tool_call>{"bbox_2d": [35, 21, 63, 49]}</tool_call>',
            stop_reason="tool",
            observation_token_ids=[9, 9],
            observation_images=[crop],
            observation_text="Here is the crop & more.",
            tool_calls=[call],
            tool_reward=0.1,
        )
        answer = Turn([5, 6], [-0.1, float("nan")], [5, 5], "<answer>red</answer>", "stop")
        parts = RewardParts({"accuracy": 1.0, "format": -0.5}, {"accuracy": 0.8, "format": 0.2})
        reward = Unscored("judge is down") if unscored else parts
        return Trajectory(task, 2, [7, 8], [look, answer], Status.ANSWERED, reward, seconds=1.5)

    return make
