"""One run a folder."""

import os
import signal
import subprocess
import sys

import pytest

from alignx_jax.exits import UserError
from alignx_jax.runs import locks


def test_a_second_run_is_refused_and_told_who_holds_the_folder(tmp_path):
    folder = tmp_path / "run" / "stage1"
    with locks.hold(folder):
        with (
            pytest.raises(
                UserError, match=rf"{folder} is in use by another run \(process {os.getpid()} on .* since 20"
            ),
            locks.hold(folder),
        ):
            pass
        with locks.hold(tmp_path / "run" / "stage2"):
            pass
    with locks.hold(folder):
        folder.mkdir()
    assert list((tmp_path / "run").iterdir()) == [folder]


def test_a_refused_run_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="no such file"), locks.hold(tmp_path / "runs" / "mine" / "stage1"):
        raise UserError("no such file")
    assert not list(tmp_path.iterdir())


def test_the_lock_ends_with_its_process(tmp_path):
    folder = tmp_path / "run" / "stage1"
    program = f"""
import pathlib, time
from alignx_jax.runs import locks
with locks.hold(pathlib.Path({str(folder)!r})):
    print("held", flush=True)
    time.sleep(100)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {process.pid} on"), locks.hold(folder):
            pass
        process.send_signal(signal.SIGKILL)
    with locks.hold(folder):
        pass


def test_a_file_that_is_deleted_while_it_is_looked_at_is_no_lock(tmp_path, monkeypatch):
    """By the one who held it, after it was opened here."""
    fstat, file, deleted = os.fstat, tmp_path / "stage1.lock", []

    def let_go(number: int) -> os.stat_result:
        if not deleted:
            deleted.append(file.unlink())
        return fstat(number)

    monkeypatch.setattr(os, "fstat", let_go)
    with locks.hold(tmp_path / "stage1"):
        assert deleted and str(os.getpid()) in file.read_text()
