"""Stands for another node, in tests of pictures that are fetched."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_agent.data.images import ImageStore


@dataclass(frozen=True)
class Peer:
    """Another node's store; every picture that it gives away leaves a line in `log`."""

    store: ImageStore
    log: Path

    def __call__(self, source):
        data = self.store.bytes_of(source)
        with self.log.open("a") as log:
            log.write(f"{os.getpid()} {source}\n")
        time.sleep(0.05)  # slow enough for everybody to want it at once
        return data
