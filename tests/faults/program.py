"""The program as its user starts it, `python run.py ...`: watched from outside, stopped at chosen moments, read after.

Moments are told by what the program prints and leaves on disk, never by the clock, so that slow machines see the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEADLINE = 300.0  # seconds for whatever is waited for; a whole run takes ten on two cores
_LOOK = 0.001  # seconds between two looks at the disk


class Hang(AssertionError):
    """The program was still running at the deadline."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """What a finished process leaves to its user."""

    code: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"exit code {self.code}\n{self.out}\n{self.err}"

    @property
    def continued_from(self) -> int | None:
        """The step it says it continued from."""
        found = re.search(r"continuing \S+ from step (\d+)", self.out)
        return int(found[1]) if found else None

    def sentence(self, code: int, *parts: str) -> str:
        """The one line of an orderly refusal or stop; it has to contain each of `parts`."""
        assert self.code == code, f"exit code {code} expected: {self}"
        said = [line for line in self.err.splitlines() if line.startswith("run.py: ")]
        assert len(said) == 1 and "Traceback" not in self.err, f"one sentence expected: {self}"
        for part in parts:
            assert part in said[0], f"{part!r} expected in: {said[0]}"
        return said[0]


class Running:
    """A started process, in a folder of its own that keeps its output. As a context manager it leaves none behind."""

    def __init__(self, command: list[str], folder: pathlib.Path, environment: dict[str, str]):
        self._out, self._err = folder / "out", folder / "err"
        with self._out.open("w") as out, self._err.open("w") as err:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=folder, env=environment
            )

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *error) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def lines(self) -> int:
        """Lines printed so far."""
        return self._out.read_text().count("\n")

    @property
    def step(self) -> int:
        """The last step that this process has printed the losses of; 0 before its first one."""
        return max(map(int, re.findall(r"^stage \d (\d+)/", self._out.read_text(), re.MULTILINE)), default=0)

    def until(self, reached: Callable[[], bool], seconds: float = DEADLINE) -> bool:
        """Waits until `reached()`; false if the process ends before."""
        end = time.monotonic() + seconds
        while not reached():
            if self._process.poll() is not None:
                return reached()
            if time.monotonic() > end:
                self._hang(seconds)
            time.sleep(_LOOK)
        return True

    def kill_while(self, reached: Callable[[], bool], pause: float = 0.0) -> bool:
        """SIGKILL while `reached()`, `pause` seconds after it begins; false if the process ends before.

        The process is stopped first and looked at: if what was to be interrupted is over by then, the next such moment
        is taken.
        """
        while self.until(reached):
            time.sleep(pause)
            self.signal(signal.SIGSTOP)
            if self._process.poll() is None and reached():
                self.signal(signal.SIGKILL)
                self._process.wait()
                return True
            self.signal(signal.SIGCONT)
            pause /= 2
        return False

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Within, the process stands still."""
        self.signal(signal.SIGSTOP)
        yield
        self.signal(signal.SIGCONT)

    def wait(self, seconds: float = DEADLINE) -> Ended:
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._hang(seconds)
        return self.ended(code)

    def ended(self, code: int | None = None) -> Ended:
        """What it printed until now; `code` of a process that was killed."""
        return Ended(-signal.SIGKILL if code is None else code, self._out.read_text(), self._err.read_text())

    def _hang(self, seconds: float) -> None:
        self.signal(signal.SIGKILL)
        self._process.wait()
        raise Hang(f"still running after {seconds:.0f} s: {self.ended()}")


@dataclasses.dataclass(frozen=True)
class Stage:
    """The folder of a stage, as it lies on disk at the moment of looking."""

    folder: pathlib.Path

    @property
    def logged(self) -> int:
        """The last step in metrics.jsonl."""
        with contextlib.suppress(FileNotFoundError):
            whole = (self.folder / "metrics.jsonl").read_text().split("\n")[:-1]
            return max((json.loads(line)["step"] for line in whole), default=0)
        return 0

    @property
    def saved(self) -> list[int]:
        """Steps of the checkpoints whose writing is finished: the checksums come last."""
        return sorted(int(name) for name, whole in self._checkpoints() if whole)

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is half-written."""
        return not all(whole for _, whole in self._checkpoints())

    def _checkpoints(self) -> list[tuple[str, bool]]:
        """Names, and whether each is whole."""
        with contextlib.suppress(FileNotFoundError):
            names = (self.folder / "checkpoints").iterdir()
            folders = [path for path in names if path.is_dir() and not (path / "damaged.txt").exists()]
            return [(path.name, path.name.isdigit() and (path / "checksums.json").exists()) for path in folders]
        return []

    def checkpoint(self, step: int) -> pathlib.Path:
        return self.folder / "checkpoints" / str(step)

    def state(self, step: int) -> dict:
        """Every array of a checkpoint (parameters, optimizer, step), read by Orbax without code of ours."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that shardings are those of the file
            return jax.tree.map(np.asarray, ocp.load_checkpointables(self.checkpoint(step)))

    def metrics(self) -> list[dict]:
        """All records but for their times."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [
            {k: v for k, v in json.loads(line).items() if not k.endswith(("per_second", "input_wait"))}
            for line in lines
        ]


def command(flags: dict[str, object]) -> list[str]:
    """`python run.py` with flags by their names."""
    given = (f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items())
    return [sys.executable, str(ROOT / "run.py"), *given]
