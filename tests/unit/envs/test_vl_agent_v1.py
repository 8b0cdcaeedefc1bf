"""Zooming through a grounding service, against a real HTTP server: what it is asked, and every kind of answer."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from megatron_agent.data.images import ImageStore, PixelLimits
from megatron_agent.envs.base import make_session
from megatron_agent.envs.vl_agent import VLAgent
from megatron_agent.envs.vl_agent_v1 import VLAgentV1
from megatron_agent.errors import ConfigError
from megatron_agent.types import Task
from tests.unit.envs.http_service import Reply, Server, nobody_there

LIMITS = PixelLimits(784, 3136)
OUTPUTS = {
    "dog": [{"bbox_2d": [16, 16, 96, 96]}, {"bbox_2d": [0, 0, 9, 9]}],
    "one": {"bbox_2d": [16, 16, 96, 96]},
    "none": [],
    "nothing": None,
    "tiny": [{"bbox_2d": [3, 3, 3, 9]}],
    "three": [{"bbox_2d": [1, 2, 3]}],
    "words": [{"bbox_2d": ["a", 2, 3, 4]}],
    "endless": [{"bbox_2d": [0, 0, 1e999, 4]}],
    "text": "left",
}


@pytest.fixture
def server():
    server = Server(lambda path, payload: Reply({"output": OUTPUTS[payload["text"]]}))
    yield server
    server.close()


@pytest.fixture
def start(tmp_path):
    def start(url, name="vl_agent_v1", **options):
        store = ImageStore(tmp_path / "store", LIMITS)
        source = Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8))
        session = make_session(name, {name: VLAgentV1.Config(endpoints=[url], max_attempts=1, **options)}, store, LIMITS)
        session.reset(Task("t:0", "", (), (store.put_picture(source),), name, "", ""))
        return session

    return start


def zoom_in(name):
    return f"<tool_call>{json.dumps({'name': 'zoom_in', 'arguments': {'object': name}})}</tool_call>"


@pytest.mark.parametrize("name", ["dog", "one", " dog "])
@pytest.mark.parametrize("space", ["seen", "original"])  # of the model's boxes: the service's are the original's in both
def test_the_service_says_where(start, server, name, space):
    result = start(f"{server.url}/query", coordinate_space=space).step(zoom_in(name) + zoom_in("none"))
    assert [(call.name, call.ok, call.box_px) for call in result.tool_calls] == [("zoom_in", True, (16, 16, 96, 96))]
    assert result.tool_calls[0].shown_box_px == (4, 4, 24, 24) and result.observation.messages[0]["role"] == "user"
    ((path, payload),) = server.asked
    assert path == "/query" and payload["text"] == name.strip()
    assert Image.open(io.BytesIO(base64.b64decode(payload["image"]))).size == (224, 224)


@pytest.mark.parametrize(("name", "why"), [
    ("none", "no such object"), ("nothing", "no such object"), ("tiny", "holds nothing"), ("three", "could not be read"),
    ("words", "could not be read"), ("endless", "could not be read"), ("text", "could not be read"), ("  ", "1 to 200"),
    ("x" * 201, "this has 201"), (3, "object must be string"),
])  # fmt: skip
def test_answers_that_show_nothing(start, server, name, why):
    result = start(f"{server.url}/query").step(zoom_in(name))
    assert why in result.observation.text and not result.tool_calls[0].ok and not result.done
    assert result.observation.messages == [{"role": "user", "content": result.observation.text}]


def test_nobody_there(start):
    assert "did not answer" in start(nobody_there()).step(zoom_in("dog")).observation.text


def test_their_name_for_it(start, server):
    result = start(server.url, "vl_agent").step(zoom_in("dog"))
    assert result.tool_calls[0].ok and VLAgent.name == "vl_agent" and not VLAgent.runs_inline


@pytest.mark.parametrize(("options", "why"), [({"endpoints": []}, "endpoints is empty"), ({"min_side_px": -1}, "-1")])
def test_config_refuses(options, why):
    with pytest.raises(ConfigError, match=why):
        VLAgentV1.Config(**options)
