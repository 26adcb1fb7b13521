"""The disk is full or read-only: one sentence, what was saved stays, and with room the same command goes on."""

from __future__ import annotations

import errno
import os
import pathlib
import random
import subprocess

import pytest

from tests.faults.conftest import SEED, STEPS
from tests.faults.program import Running, Stage

pytestmark = pytest.mark.slow


class Disk:
    """A small tmpfs, with something in it that takes all the room or none."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self._other = folder / "someone-elses"

    def fill(self, leave: int = 0) -> None:
        """Until `leave` bytes are left."""
        with self._other.open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC
        os.truncate(self._other, self._other.stat().st_size - leave)

    def keep_full(self, running: Running) -> None:
        """Until the process ends: it makes room itself, where it deletes an old checkpoint."""
        running.until(self.fill)

    def free(self) -> None:
        self._other.unlink()

    def remount(self, how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", self.folder], check=True)


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a disk to fill is a tmpfs, which cannot be mounted here: {mounted.stderr.strip()}")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_the_disk_fills_up_in_training(bench, tally, disk):
    rng = random.Random(f"{SEED} disk")
    run = disk.folder / "run"
    stage = Stage(run / "stage1")
    early, late = rng.randrange(4, STEPS // 2), rng.randrange(STEPS // 2, STEPS - 8)
    moments = [
        ("training", lambda running: stage.saved and running.step >= early),
        ("a save", lambda running: stage.saving and running.step >= late),
    ]
    with tally.verdict() as injected:
        for kind, now in moments:
            with bench.start(run, 1) as running:
                assert running.until(lambda now=now, running=running: now(running))
                good = stage.saved[-1]
                disk.keep_full(running)
                injected.append(f"disk full: {kind}")
                ended = running.wait()
            ended.sentence(74, str(disk.folder))
            assert stage.saved[-1] >= good
            stage.state(stage.saved[-1])  # can be read
            disk.free()
        ended = bench.finish(run, 1)
        assert ended.code == 0, ended
        bench.assert_undisturbed(run, 1)


def test_the_disk_of_the_run_becomes_read_only(bench, tally, disk):
    run = disk.folder / "run"
    with tally.verdict() as injected:
        with bench.start(run, 1) as running:
            assert running.kill_while(lambda: running.step >= STEPS // 2)
        disk.remount("ro")
        injected.append("read-only: start-up")
        bench.finish(run, 1).sentence(74, str(disk.folder))
        disk.remount("rw")
        ended = bench.finish(run, 1)
        assert ended.code == 0 and ended.continued_from, ended
        bench.assert_undisturbed(run, 1)


def test_the_disk_is_full_while_data_are_prepared(bench, tally, disk, tmp_path):
    cache, run = disk.folder / "cache", tmp_path / "run"
    cache.mkdir()
    with tally.verdict() as injected:
        for left in (0, 8192, 65536):  # bytes, of some 200,000 that are wanted
            disk.fill(left)
            injected.append("disk full: data preparation")
            bench.finish(run, "prepare", data__cache=cache).sentence(74, str(cache))
            disk.free()
        ended = bench.finish(run, "prepare", data__cache=cache)
        assert ended.code == 0, ended
        assert _contents(cache / "encoded").items() <= _contents(bench.cache / "encoded").items()


def test_the_disk_is_full_at_export(bench, tally, disk, tmp_path):
    run, there, here = tmp_path / "run", tmp_path / "export", disk.folder / "export"
    assert bench.finish(run, "export", model=bench.whole(1).folder, export__to=there).code == 0
    with tally.verdict() as injected:
        for left in (0, 100_000):  # bytes, of 600,000
            disk.fill(left)
            injected.append("disk full: export")
            ended = bench.finish(run, "export", model=bench.whole(1).folder, export__to=here)
            ended.sentence(74, str(disk.folder))
            disk.free()
        ended = bench.finish(run, "export", model=bench.whole(1).folder, export__to=here)
        assert ended.code == 0, ended
        assert _contents(here) == _contents(there)


def _contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Of files whose bytes do not depend on the time of writing, as those of ArrayRecord do: tokens and weights."""
    kinds = ("*.npy", "*.int32", "*.safetensors")
    found = {f"{f.relative_to(folder)}": f.read_bytes() for kind in kinds for f in folder.rglob(kind)}
    assert found
    return found
