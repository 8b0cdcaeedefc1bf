"""Real gloo ranks for tests: four processes started once, that run one function after another in worlds of 1 to 4."""

import gc
import multiprocessing
import os
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path

JOBS_PER_PROCESS = 8  # groups that a job leaks keep threads that spin on sockets whose other end is gone


class RankError(AssertionError):
    """A rank raised, died or did not answer; carries the rank's own traceback."""


def serve(rank: int, inbox: Connection) -> None:
    """Body of one process. Every job gets process groups of its own."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    from megatron_agent.training import cpu

    torch.set_num_threads(1)
    cpu.guard_collectives()  # first: Megatron keeps references to some collectives from its import on
    cpu.install()
    from megatron.core import parallel_state

    while (job := inbox.recv()) is not None:
        function, world_size, store, arguments = job
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=240)
            )
            inbox.send((True, function(*arguments)))
        except BaseException:
            inbox.send((False, traceback.format_exc()))
        finally:
            parallel_state.destroy_model_parallel()
            if dist.is_initialized():
                dist.destroy_process_group()
            gc.collect()  # models hold their groups in cycles, and every gloo group has threads


class Ranks:
    """The processes. A failed job stops them all (its peers may hang in a collective); the next job starts new ones."""

    def __init__(self, count: int = 4) -> None:
        self.count = count
        self.processes: list = []
        self.num_jobs = 0
        self.pipes: list[Connection] = []

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, theirs))
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def run(self, world_size: int, function, *arguments, timeout_s: float = 300.0) -> list:
        """`function(*arguments)` on ranks 0 .. world_size - 1 -> its results in rank order. Raises RankError."""
        if self.num_jobs == JOBS_PER_PROCESS:
            self.stop()
        if not self.processes:
            self.start()
        self.num_jobs += 1
        with tempfile.TemporaryDirectory() as folder:
            for pipe in self.pipes[:world_size]:
                pipe.send((function, world_size, str(Path(folder) / "store"), arguments))
            try:
                return self._collect(world_size, time.monotonic() + timeout_s)
            except RankError:
                self.stop(kill=True)
                raise

    def _collect(self, world_size: int, deadline: float) -> list:
        results: dict[int, object] = {}
        while len(results) < world_size:
            open_pipes = [self.pipes[rank] for rank in range(world_size) if rank not in results]
            ready = wait(open_pipes, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankError(f"ranks {[r for r in range(world_size) if r not in results]} did not answer in time")
            for pipe in ready:
                rank = self.pipes.index(pipe)
                try:
                    ok, result = pipe.recv()
                except EOFError:
                    raise RankError(f"rank {rank} died") from None
                if not ok:
                    raise RankError(f"rank {rank}:\n{result}")
                results[rank] = result
        return [results[rank] for rank in range(world_size)]

    def stop(self, kill: bool = False) -> None:
        for process, pipe in zip(self.processes, self.pipes):
            if kill:
                process.kill()
            elif process.is_alive():
                pipe.send(None)
        for process, pipe in zip(self.processes, self.pipes):
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join()
            pipe.close()
        self.processes, self.pipes, self.num_jobs = [], [], 0
