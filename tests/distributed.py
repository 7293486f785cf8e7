"""Runs a task of `tests/workers` in two processes that talk over gloo, and brings back what each of them returned.

Nothing here waits for ever: a process that fails ends the others, a pair that takes too long is ended as a group, and a
process whose test has gone ends itself.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

PROCESSES = 2
TESTS = Path(__file__).resolve().parent
GRACE = 10  # seconds in which the others may say what went wrong, once a process has failed


def in_two_processes(task: str, folder: Path, *, timeout: int = 120, processes: int = PROCESSES) -> list[Any]:
    """What each process returned, by rank.

    Args:
        task: `module:function` in `tests/workers`; the function takes the folder and returns tensors and plain values.
        folder: an empty folder, which the processes share.
        timeout: seconds until all are ended.

    Raises:
        AssertionError: a process failed or took too long; the message has what each of them printed.
    """
    port = _free_port()
    logs = [folder / f"log{rank}.txt" for rank in range(processes)]
    running = [_start(task, folder, rank, processes, port, timeout, log) for rank, log in enumerate(logs)]
    try:
        _wait(running, timeout)
        codes = [process.poll() for process in running]
    finally:
        _end(running)
    if any(codes):
        said = "\n".join(
            f"--- rank {rank}: {'still running' if code is None else f'exit status {code}'}\n{_tail(log)}"
            for rank, (code, log) in enumerate(zip(codes, logs))
        )
        raise AssertionError(f"{task} failed.\n{said}")
    if any(code is None for code in codes):
        said = "\n".join(f"--- rank {rank}\n{_tail(log)}" for rank, log in enumerate(logs))
        raise AssertionError(f"{task} took longer than {timeout} s.\n{said}")

    import torch

    return [torch.load(folder / f"result{rank}.pt", weights_only=True) for rank in range(processes)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(
    task: str, folder: Path, rank: int, processes: int, port: int, timeout: int, log: Path
) -> subprocess.Popen[bytes]:
    paths = [str(TESTS), *(path for path in sys.path if path)]
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, str(Path(__file__).resolve()), task, str(folder), str(timeout)]
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(running: list[subprocess.Popen[bytes]], timeout: int) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        codes = [process.poll() for process in running]
        if all(code is not None for code in codes):
            return
        if any(codes):
            deadline = min(deadline, time.monotonic() + GRACE)
            running = [process for process, code in zip(running, codes) if code is None]
        time.sleep(0.05)


def _end(running: Iterable[subprocess.Popen[bytes]]) -> None:
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=GRACE)


def _tail(log: Path, characters: int = 6000) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-characters:]


def main(task: str, folder: str, timeout: str) -> None:
    """Run a task as one of the processes."""
    # The last resort, should the test that started this process be gone.
    faulthandler.dump_traceback_later(int(timeout), exit=True)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # Collectives wait less than the test does, so that a process left alone says in which one.
    dist.init_process_group("gloo", timeout=timedelta(seconds=max(int(timeout) // 2, 20)))
    module, _, function = task.partition(":")
    result = getattr(importlib.import_module(f"workers.{module}"), function)(Path(folder))
    torch.save(result, Path(folder) / f"result{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
