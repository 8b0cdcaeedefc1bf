"""Zooming in on what the model names: a grounding service says where it is.

The service takes POST `{"image": base64 of a JPEG, "text": ...}` and gives `{"output": [{"bbox_2d": [x1, y1, x2, y2]}, ...]}`,
or one such object, in pixels of that picture; an empty output where it finds nothing.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_agent.envs.base import model_function
from megatron_agent.envs.service import ServiceConfig, service_of
from megatron_agent.envs.zoom import Answer, ZoomTool
from megatron_agent.errors import EnvError

if TYPE_CHECKING:
    import httpx

JPEG_QUALITY = 90
MAX_OBJECT_CHARS = 200


class VLAgentV1(ZoomTool):
    """`zoom_in` takes the `object` to look for in the first picture; the first call of a turn counts.

    The picture comes back as a message of the user. Left out of DeepEyes' `vl_agent`: addresses of one company's machines,
    32 attempts without a deadline, and that the service's box was cut out unchecked.
    """

    name = "vl_agent_v1"
    runs_inline: ClassVar[bool] = False
    answer_role: ClassVar[str] = "user"

    @dataclass
    class Config(ServiceConfig, ZoomTool.Config):
        endpoints: list[str] = field(default_factory=lambda: ["http://127.0.0.1:24000/query"])
        user_prompt: str = (
            "\nThis is what you asked for, enlarged. Go on with the next thought. If you know the answer, give it in "
            "<answer></answer>; otherwise call the function again."
        )

        def __post_init__(self) -> None:
            ServiceConfig.__post_init__(self)
            ZoomTool.Config.__post_init__(self)

    config: Config

    def __init__(self, name: Any = None, description: Any = None, parameters: Any = None, **kwargs: Any) -> None:
        super().__init__(name, description, parameters, **kwargs)
        self.service = service_of(self.config)

    def carry_out(self, calls: Sequence[str]) -> list[Answer]:
        return [self.call(calls[0])]

    @model_function
    def zoom_in(self, object: str) -> Answer:
        """Zoom in on an object of the picture.

        object: What to look for.
        """
        if not object.strip() or len(object) > MAX_OBJECT_CHARS:
            raise EnvError(f"name the object in 1 to {MAX_OBJECT_CHARS} characters; this has {len(object.strip())}")
        jpeg = io.BytesIO()
        self.store.original(self._picture(0).source).save(jpeg, "JPEG", quality=JPEG_QUALITY)
        box = self.service.post({"image": base64.b64encode(jpeg.getvalue()).decode(), "text": object.strip()}, _box)
        if box is None:
            raise EnvError("no such object was found; name it otherwise, or name another one")
        return self.zoomed("zoom_in", box, space="original")


def _box(response: httpx.Response) -> list[float] | None:
    output = response.json()["output"]
    if not output:
        return None
    box = [float(side) for side in (output[0] if isinstance(output, list) else output)["bbox_2d"]]
    if len(box) != 4 or not all(map(math.isfinite, box)):
        raise ValueError(f"{box} is no box")
    return box


COMPONENT = VLAgentV1
