"""The real program as several processes on this machine."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent
_XLA_FLAGS = os.environ.get("XLA_FLAGS", "")  # as the tests begin; the program adds one for a single process


def environment() -> dict[str, str]:
    """Of a user with what requirements.txt asks for, on a CPU.

    What is compiled is compiled as in the tests, and kept, however small: the compiler is not what is tested.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "PYTEST_"))}
    return kept | {
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT / "tests" / "without_torch"),
        "XLA_FLAGS": _XLA_FLAGS,
    }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def flags_of(count: int, index: int, port: int) -> list[str]:
    return [f"--hosts.coordinator=127.0.0.1:{port}", f"--hosts.count={count}", f"--hosts.index={index}"]


def tiny_model(folder: pathlib.Path) -> None:
    """A random Llama of two layers with the sample's tokenizer, in `folder / "model"`."""
    command = [sys.executable, "-m", "benchmarks.random_llama", "--hidden-size=32", "--layers=2"]
    command += ["--tokenizer=alignx_jax/sample/model", f"--to={folder / 'model'}"]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True)


def few_sentences(folder: pathlib.Path, run: str, *more: str) -> list[str]:
    """Flags of a run at `run`, of the model and with the cache in `folder`: seconds of work on 4 devices.

    Of a flag that is given twice the last counts: `more` may change any.
    """
    return [
        f"--config={ROOT / 'configs' / 'sample.py'}",
        f"--model={folder / 'model'}",
        f"--run={run}",
        f"--data.cache={folder / 'cache'}",
        "--mesh=4x1",
        "--data.limit=40",
        "--data.validation=16",
        "--data.row-length=128",
        "--training.rows=8",
        "--training.steps=4",
        "--training.validate-every=2",
        "--training.save-every=2",
        "--evaluation.limit=8",
        "--evaluation.languages=de",
        "--evaluation.in-prompt",
        "--evaluation.resamples=100",
        "--evaluation.translation.limit=3",
        "--evaluation.translation.max-tokens=4",
        "--evaluation.translation.directions=de-en",
        *more,
    ]


def start(count: int, flags: Sequence[str], own: Sequence[Sequence[str]] = ()) -> list[subprocess.Popen]:
    """`run.py` with `flags` as `count` processes, number n with `own[n]` besides; a single one is not told of hosts."""
    port = free_port()
    processes = []
    for n in range(count):
        more = [*(flags_of(count, n, port) if count > 1 else ()), *(own[n] if own else ())]
        command = [sys.executable, str(ROOT / "run.py"), *flags, *more]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment()))
    return processes


def finish(processes: Sequence[subprocess.Popen], seconds: float = 500) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each; those that are not done in time are killed, and fail the test."""
    deadline = time.monotonic() + seconds
    try:
        said = [process.communicate(timeout=max(1, deadline - time.monotonic())) for process in processes]
        return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]
    finally:
        for process in processes:
            process.kill()
