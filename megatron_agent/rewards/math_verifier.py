"""math-verify in processes of its own. What a model writes may compute for ever (a tower of powers), out of reach of
Python's signals, and math-verify's own deadlines need the main thread: here the kernel ends the process.

A child reads lines `[truth, answer, limit_s]` and writes lines `true` or `false`; it ends with its parent.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

NUM_CHILDREN = max(1, min(8, (os.cpu_count() or 1) // 2))
MEMORY_LIMIT_BYTES = 4 << 30
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{\w+\*?\}")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")

_threads = ThreadPoolExecutor(NUM_CHILDREN, thread_name_prefix="math-verify")  # each has a child of its own
_local = threading.local()


async def equal(truth: str, answer: str, limit_s: float) -> bool:
    """Whether two formulas (LaTeX or plain) are equal as mathematics; what takes longer than `limit_s` of CPU is not.

    Words are none: to math-verify they are products of symbols, in which `tea` equals `eat`.
    """
    if any(_PROSE.search(_ENVIRONMENT.sub("", text)) for text in (truth, answer)):
        return False
    return await asyncio.get_running_loop().run_in_executor(_threads, _ask, truth, answer, limit_s)


@functools.lru_cache(maxsize=16384)
def _ask(truth: str, answer: str, limit_s: float) -> bool:
    child = getattr(_local, "child", None) or _start()
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(json.dumps([truth, answer, limit_s]) + "\n")
        child.stdin.flush()
        line = child.stdout.readline()
    except BrokenPipeError:
        line = ""
    _local.child = child
    if not line:  # ended by its timer or its memory limit
        _local.child = None
        child.kill()
        child.communicate()
    return line == "true\n"


def _start() -> subprocess.Popen[str]:
    # -P: this file's folder holds a math.py, which is not Python's
    command = [sys.executable, "-P", __file__]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )


def main() -> None:
    """The child: one pair at a time, each under a timer of CPU seconds whose signal ends the process."""
    from math_verify import parse, verify

    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    for line in sys.stdin:
        truth, answer, limit_s = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        parsed = [parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in (truth, answer)]
        is_equal = bool(verify(*parsed, timeout_seconds=None))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(is_equal) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
