"""Ranks on the hosts of a lab: start them, collect what each returns, kill all when one fails.

One idea: a rank is `ip netns exec HOST python netlab_ranks.py JOB RANK`; it joins a gloo group
whose store is at host 0, calls one function of one script with the settings, and writes the result
as JSON before anything is torn down, so that trouble at the exit is no failure.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from netlab_wires import LabError, Network

__all__ = ["run_ranks"]

# Namespaces share no ports.
_PORT = 29500
_EXIT_S = 20.0
_LOG_TAIL = 4000


def run_ranks(
    network: Network,
    script: Path,
    function: str,
    settings: Mapping[str, Any],
    *,
    ranks_per_host: int = 1,
    threads: int = 1,
    timeout_s: float = 300.0,
    python: str = sys.executable,
) -> list[Any]:
    """Call `function(settings)` of `script` on every rank; rank r is on host r // ranks_per_host.

    Args:
        network: built.
        script: its folder goes first on the ranks' module path.
        function: a name in it; gets the settings, returns what JSON can hold.
        settings: what JSON can hold.
        ranks_per_host: processes on each host.
        threads: torch threads of each.
        timeout_s: after this long the ranks are killed.
        python: the interpreter that runs them.

    Returns:
        The results, in rank order.

    Raises:
        LabError: with the end of what the first failing rank printed.
    """
    world_size = network.num_hosts * ranks_per_host
    with tempfile.TemporaryDirectory(prefix="ringctx-lab-") as name:
        folder = Path(name)
        job = {
            "script": str(script),
            "function": function,
            "settings": settings,
            "store": f"tcp://{network.address(0)}:{_PORT}",
            "world_size": world_size,
            "threads": threads,
            "timeout_s": timeout_s,
        }
        (folder / "job.json").write_text(json.dumps(job))
        ranks: list[_Rank] = []
        try:
            for rank in range(world_size):
                ranks.append(_start(network, rank, rank // ranks_per_host, folder, python))
            _wait(ranks, time.monotonic() + timeout_s, timeout_s)
        finally:
            for started in ranks:
                started.kill()
        return [json.loads(rank.result.read_text()) for rank in ranks]


@dataclass(frozen=True)
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    result: Path
    log: Path

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def tail(self) -> str:
        return f"rank {self.number}:\n{self.log.read_text(errors='replace')[-_LOG_TAIL:]}"


def _start(network: Network, rank: int, host: int, folder: Path, python: str) -> _Rank:
    log = folder / f"rank-{rank}.log"
    command = ["ip", "netns", "exec", network.namespace(host)]
    command += [python, __file__, str(folder / "job.json"), str(rank)]
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": network.interface,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            # Ctrl-C reaches the parent alone, which then kills every rank with its children.
            start_new_session=True,
        )
    return _Rank(rank, process, _result_path(folder / "job.json", rank), log)


def _result_path(job: Path, rank: int) -> Path:
    return job.with_name(f"rank-{rank}.json")


def _wait(ranks: list[_Rank], deadline_s: float, timeout_s: float) -> None:
    while waiting := [rank for rank in ranks if not rank.result.exists()]:
        for rank in waiting:
            # Once more, since the result may have come between the two looks.
            if rank.process.poll() is not None and not rank.result.exists():
                code = rank.process.returncode
                raise LabError(f"a rank ended with {code} and no result; {rank.tail()}")
        if time.monotonic() > deadline_s:
            tails = "\n".join(rank.tail() for rank in waiting)
            raise LabError(f"not finished after {timeout_s:g} s\n{tails}")
        time.sleep(0.05)
    exit_deadline_s = time.monotonic() + _EXIT_S
    while any(rank.process.poll() is None for rank in ranks):
        if time.monotonic() > exit_deadline_s:
            return
        time.sleep(0.05)


def _rank_main(job_file: Path, rank: int) -> None:
    # Not at the top: the parent needs no torch.
    import torch
    import torch.distributed as dist

    job = json.loads(job_file.read_text())
    script = Path(job["script"])
    sys.path.insert(0, str(script.parent))
    function: Callable[[Any], Any] = getattr(importlib.import_module(script.stem), job["function"])
    torch.set_num_threads(job["threads"])
    dist.init_process_group(
        "gloo",
        init_method=job["store"],
        rank=rank,
        world_size=job["world_size"],
        timeout=timedelta(seconds=job["timeout_s"]),
    )
    result = function(job["settings"])
    target = _result_path(job_file, rank)
    unfinished = target.with_suffix(".part")
    unfinished.write_text(json.dumps(result))
    unfinished.rename(target)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank_main(Path(sys.argv[1]), int(sys.argv[2]))
