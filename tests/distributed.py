"""Runs tasks of `tests/workers` in two processes that talk over gloo, and brings back what each of them returned.

One process imports what the tasks need, and the two come from it by `fork`: half the imports, which take longer than most
tasks. Nothing here waits for ever: a process that fails ends the others, a pair that takes too long is ended as a group,
and a process whose test has gone ends itself.
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
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

PROCESSES = 2
TESTS = Path(__file__).resolve().parent
GRACE = 10  # seconds in which the others may say what went wrong, once a process has failed


def in_two_processes(*tasks: str, folder: Path, timeout: int = 120) -> list[tuple[Any, ...]]:
    """What each process returned from each task, by rank.

    Args:
        tasks: `module:function` in `tests/workers`, one after the other; each function takes a folder of its own and
            returns tensors and plain values.
        folder: an empty folder, which the processes share.
        timeout: seconds until all are ended.

    Raises:
        AssertionError: a process failed or took too long; the message has what each of them printed.
    """
    running = _start(tasks, folder, timeout)
    try:
        code = running.wait(timeout)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        _end(running)
    if code != 0:
        what = f"took longer than {timeout} s" if code is None else "failed"
        said = "\n".join(f"--- {log.stem}\n{_tail(log)}" for log in sorted(folder.glob("*.txt")))
        raise AssertionError(f"{', '.join(tasks)} {what}.\n{said}")

    import torch

    return [torch.load(folder / f"result{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


def _start(tasks: tuple[str, ...], folder: Path, timeout: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "WORLD_SIZE": str(PROCESSES),
        "LOCAL_WORLD_SIZE": str(PROCESSES),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "PYTHONPATH": os.pathsep.join([str(TESTS), *(path for path in sys.path if path)]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with (folder / "both.txt").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(folder), str(timeout), *tasks],
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _end(running: subprocess.Popen[bytes]) -> None:
    if running.poll() is None:
        os.killpg(running.pid, signal.SIGKILL)
    running.wait(timeout=GRACE)


def _tail(log: Path, characters: int = 6000) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-characters:]


# ------------------------------------------------------------------------------------------------- in the processes


def main(folder: str, timeout: str, *tasks: str) -> None:
    """Import what the tasks need, run them in the processes, and exit with 0 if all of them have."""
    seconds = int(timeout)
    functions = [_function(task) for task in tasks]
    ranks = [_fork(rank, functions, Path(folder), seconds) for rank in range(PROCESSES)]
    sys.exit(_wait(ranks, seconds))


def _function(task: str) -> Callable[[Path], Any]:
    module, _, function = task.partition(":")
    return getattr(importlib.import_module(f"workers.{module}"), function)


def _fork(rank: int, functions: list[Callable[[Path], Any]], folder: Path, seconds: int) -> int:
    child = os.fork()
    if child == 0:
        _be(rank, functions, folder, seconds)
    return child


def _be(rank: int, functions: list[Callable[[Path], Any]], folder: Path, seconds: int) -> NoReturn:
    """Be one of the processes, to the end."""
    code = 1
    try:
        with (folder / f"rank{rank}.txt").open("wb") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        faulthandler.dump_traceback_later(seconds, exit=True)  # the last resort, should the test be gone
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        _run(rank, functions, folder, seconds)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(rank: int, functions: list[Callable[[Path], Any]], folder: Path, seconds: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # Collectives wait less than the test does, so that a process left alone says in which one.
    dist.init_process_group("gloo", timeout=timedelta(seconds=max(seconds // 2, 20)))
    results = []
    for number, function in enumerate(functions):
        own = folder / f"task{number}"
        own.mkdir(exist_ok=True)
        results.append(function(own))
    torch.save(tuple(results), folder / f"result{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _wait(ranks: list[int], seconds: int) -> int:
    """0 once all have ended well; 1 as soon as one has not and the others have had time to say why."""
    deadline, left, code = time.monotonic() + seconds, set(ranks), 0
    while left and time.monotonic() < deadline:
        for rank in list(left):
            ended, status = os.waitpid(rank, os.WNOHANG)
            if ended:
                left.discard(rank)
                if status:
                    code, deadline = 1, min(deadline, time.monotonic() + GRACE)
        time.sleep(0.02)
    for rank in left:
        os.kill(rank, signal.SIGKILL)
    return code or bool(left)


if __name__ == "__main__":
    main(*sys.argv[1:])
