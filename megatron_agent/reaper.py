"""Sweeps up after the driver, however it ended: `python -m megatron_agent.reaper MARK PID`, started by cluster.py.

Ray's own processes die with a driver that exits; after a kill -9 two of its agents stay for a minute or more, as they
wait for a dead control store. The driver's descendants are noted while it lives (some rewrite their environment along
with their title), and what starts between two looks is known by the mark that it inherits.

waits for: the end of its standard input, which the driver alone holds open. produces: no process of the run is left.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from pathlib import Path

import psutil

MARK_VARIABLE = "MEGATRON_AGENT_RUN"
GRACE_S = 3.0  # for an orderly end of what was told to stop
SWEEP_S = 10.0
LOOK_EVERY_S = 2.0


class Descendants:
    """All processes below `driver_pid` that were ever seen, and all that carry the mark."""

    def __init__(self, mark: str, driver_pid: int) -> None:
        self.mark, self.driver_pid = mark, driver_pid
        self.seen: set[psutil.Process] = set()  # by pid and start time: a reused pid is another process

    def look(self) -> None:
        with contextlib.suppress(psutil.Error):
            self.seen.update(psutil.Process(self.driver_pid).children(recursive=True))

    def left(self) -> list[psutil.Process]:
        found = set(self.seen)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK_VARIABLE) == self.mark:
                    found.add(process)
        return [process for process in found if process.pid != os.getpid() and process.is_running()]


def sweep(descendants: Descendants) -> None:
    deadline = time.monotonic() + GRACE_S
    while descendants.left() and time.monotonic() < deadline:
        time.sleep(0.2)
    deadline = time.monotonic() + SWEEP_S
    while (left := descendants.left()) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.1)
    for file in Path("/dev/shm").glob(f"megatron_agent_{descendants.mark}_*"):
        file.unlink(missing_ok=True)


def main() -> None:
    descendants = Descendants(sys.argv[1], int(sys.argv[2]))
    while not select.select([sys.stdin], [], [], LOOK_EVERY_S)[0]:
        descendants.look()
    sweep(descendants)


if __name__ == "__main__":
    main()
