"""The judge's client and vLLM's own OpenAI-compatible server, over HTTP.

Not covered: whether a verdict is right (the model is tiny and knows nothing).
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from megatron_agent.rewards.judge import JudgeConfig
from megatron_agent.rewards.judge_client import VERDICTS, OpenAIJudge
from megatron_agent.types import Unscored
from tests.integration.conftest import ROOT

pytestmark = pytest.mark.integration

START_S = 300


@pytest.fixture(scope="module")
def server(tiny_text_model, tmp_path_factory):
    """The base URL of a running server, and the file of its output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output = tmp_path_factory.mktemp("server") / "output.txt"
    cpu = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "TORCH_COMPILE_DISABLE": "1",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_text_model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "tiny-judge", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "4096", "--max-num-seqs", "8"]
    with open(output, "w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | cpu, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/health", process, output)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_healthy(url, process, output):
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"the server did not start: {output.read_text()[-3000:]}")


def test_a_model_is_found_asked_and_believed_only_in_one_word(server):
    async def ask(*predictions, **options):
        judge = OpenAIJudge(JudgeConfig(kind="openai", endpoints=[server], timeout_s=120, max_retries=0, **options))
        try:
            asked = (judge.verdict("What color is it?", "red", prediction) for prediction in predictions)
            return await asyncio.gather(*asked), judge.endpoints[0]
        finally:
            await judge.close()

    (verdict,), endpoint = asyncio.run(ask("red"))
    assert isinstance(verdict, Unscored) and "not CORRECT or WRONG" in verdict.reason  # what a tiny model says
    assert endpoint._model == "tiny-judge" and endpoint.breaker.state == "closed"
    choice = {"structured_outputs": {"choice": list(VERDICTS)}}  # vLLM's own way to one word
    verdicts, _ = asyncio.run(ask("red", "blue", "<|im_end|>", extra_body=choice))
    assert set(verdicts) <= {0.0, 1.0}
    (verdict,), endpoint = asyncio.run(ask("red " * 4096))  # a 400: the request's fault, not the server's
    assert isinstance(verdict, Unscored) and "400" in verdict.reason and endpoint.breaker.state == "closed"
    (verdict,), _ = asyncio.run(ask("red", model="another"))
    assert isinstance(verdict, Unscored) and "404" in verdict.reason
