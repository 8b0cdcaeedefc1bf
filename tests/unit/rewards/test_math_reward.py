r"""Finding `\boxed{}`, equality of formulas, what computes for ever, and the reward's numbers."""

import asyncio
import os
import subprocess
import sys
import time

import pytest

from megatron_agent.errors import ConfigError
from megatron_agent.rewards import math_verifier
from megatron_agent.rewards.math import MathReward, boxed
from megatron_agent.types import Status, Task, Trajectory, Turn, Unscored


@pytest.mark.parametrize(("text", "found"), [
    (r"\boxed{5}", ["5"]),
    (r"so \boxed{ \frac{1}{2} } and \boxed{x^{2}}", [r"\frac{1}{2}", "x^{2}"]),
    (r"\boxed{\{1, 2\}}", [r"\{1, 2\}"]),
    (r"\boxed{\boxed{3}}", [r"\boxed{3}"]),
    (r"\boxed{1 \boxed{2}", ["2"]),
    (r"\boxed{a \\}", [r"a \\"]),
    (r"\boxed{}", []), (r"\boxed{ }", []), (r"\boxed{5", []), ("5", []), (r"boxed{5}", []),
])  # fmt: skip
def test_boxed(text, found):
    assert boxed(text) == found


@pytest.mark.parametrize(("truth", "answer", "is_equal"), [
    (r"\frac{1}{2}", "0.5", True),
    ("12", r"\frac{1}{2}", False),
    (r"2\sqrt{3}", r"\sqrt{12}", True),
    ("3", "x=3", True),
    ("(1,2)", "(2,1)", False),
    (r"\{1,2\}", r"\{2,1\}", True),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1&2.0\end{pmatrix}", True),
    ("90^\\circ", "90", True),
    ("tea", "eat", False),  # products of symbols, were they formulas
    ("5", "5 \ud800", False), ("5", "(" * 50, False), ("5", "\x00", False), ("5", "4\n5", False),
])  # fmt: skip
def test_equality(truth, answer, is_equal):
    assert asyncio.run(math_verifier.equal(truth, answer, 5.0)) is is_equal


def test_what_computes_for_ever_is_ended_and_holds_up_nobody():
    async def run():
        ticks, start = 0, time.perf_counter()
        work = asyncio.create_task(math_verifier.equal("1", "9^{9^{9^{9}}}", 0.3))
        while not work.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return await work, ticks, time.perf_counter() - start

    is_equal, ticks, seconds = asyncio.run(run())
    assert is_equal is False and ticks > 5 and seconds < 30
    assert asyncio.run(math_verifier.equal("7", "7.0", 5.0)) is True  # by another child


def test_no_child_is_left_behind():
    program = (
        "import asyncio, os\n"
        "from megatron_agent.rewards import math_verifier\n"
        "assert asyncio.run(math_verifier.equal('7', '7.0', 5.0))\n"
        "child = math_verifier._threads.submit(lambda: math_verifier._local.child).result()\n"
        "print(child.pid, flush=True)\n"
        "os._exit(9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=os.environ)
    child = int(done.stdout)
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{child}") and time.monotonic() < deadline:
        with open(f"/proc/{child}/stat") as stat:
            if stat.read().rsplit(")", 1)[1].split()[0] == "Z":  # ended, and its new parent has not looked yet
                return
        time.sleep(0.02)
    assert not os.path.exists(f"/proc/{child}")


class Strict:
    """Knows one phrase, and writes down what it is asked."""

    def __init__(self):
        self.asked = []

    async def verdict(self, question, answer, prediction):
        self.asked.append(prediction)
        return float(prediction == "a half") if prediction != "down" else Unscored("away")


def score(text, truth="0.5", status=Status.ANSWERED):
    task = Task("t", "thinklite_eureka", (), (), "", truth, "How much?")
    turns = [Turn([1], [0.0], [0], text, "stop")] if text is not None else []
    judge = Strict()
    found = asyncio.run(MathReward(judge=judge).score(Trajectory(task, 0, [1], turns, status), task))
    return found if isinstance(found, Unscored) else (found.parts["accuracy"], found.parts["format"], found.total), judge.asked


@pytest.mark.parametrize(("text", "expected", "asked"), [
    (r"<think>a</think>\boxed{0.5}", (1, 0, 1.2), []),
    (r"<think>a</think>It is \boxed{\frac12}.<|im_end|>", (1, 0, 1.2), []),
    (r"<think>a</think>\boxed{a half}", (1, 0, 1.2), ["a half"]),
    (r"<think>a</think>\boxed{0.4}", (0, 0, 0), ["0.4"]),
    (r"<think>a</think>\boxed{0.4} \boxed{0.5}", (1, -1, 0.8), []),
    (r"<think>\boxed{0.5}</think>0.5", (0, -1, -0.4), []),
    (r"<think>\boxed{0.5}", (1, -1, 0.8), []),
    ("<think>a</think><answer>0.5</answer>", (0, -1, -0.4), []),
    (r"<think>a</think>\boxed{" + "9" * 1000 + "}", (0, -1, -0.4), []),
    (r"<|image_pad|><think>a</think>\boxed{0.5}", (1, -1, 0.8), []),
])  # fmt: skip
def test_the_numbers(text, expected, asked):
    found, prompts = score(text)
    assert found == pytest.approx(expected) and prompts == asked


def test_the_rest():
    assert score(r"<think>a</think>\boxed{0.5}", status=Status.LENGTH)[0] == pytest.approx((1, -1, 0.8))
    assert score(None, status=Status.CONTEXT_FULL)[0] == pytest.approx((0, -1, -0.4))
    assert score(r"<think>a</think>\boxed{\frac12}", truth=r"$x$: \boxed{0.5}")[0][0] == 1.0
    assert score(r"<think>a</think>\boxed{down}")[0] == Unscored("away")
    assert isinstance(score(r"\boxed{0.5}", status=Status.ABORTED)[0], Unscored)
    with pytest.raises(ConfigError, match="verify_limit_s"):
        MathReward.Config(verify_limit_s=0.0)
