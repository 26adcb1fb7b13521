"""One run a folder: a lock that ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import socket
import time
from collections.abc import Iterator

from alignx_jax import console, hosts, storage
from alignx_jax.exits import UserError


@contextlib.contextmanager
def hold(folder: storage.Path, flag: str = "--run") -> Iterator[None]:
    """Inside it no other run may use `folder`: a stage's, or one that is written. The lock is on a file beside it and
    ends with its process.

    The lock is `flock`: of this machine, and across machines on NFS (Linux), Lustre (mounted with `flock`) and CephFS.
    Process 0 holds it for all processes of a run. Object storage has no locks: there is a warning.

    Args:
      flag: that gives another folder.

    Raises:
      UserError: another run uses it; says who.
    """
    if not hosts.is_first():
        yield
        return
    if storage.is_remote(folder):
        console.warn(f"gs:// has no locks: see to it that no other run uses {folder}")
        yield
        return
    file = folder.with_name(folder.name + ".lock")
    made = [parent for parent in file.parents if not parent.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file, folder, flag):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.unlink()
                for parent in made:  # a run that was refused leaves nothing
                    parent.rmdir()


@contextlib.contextmanager
def _locked(path: pathlib.Path, folder: pathlib.Path, flag: str) -> Iterator[None]:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                who = file.read().strip() or "which has just started"
                raise UserError(
                    f"{folder} is in use by another run ({who}); wait for it, stop it, or give another {flag}"
                ) from None
        except OSError as error:
            console.warn(f"{path} cannot be locked ({error.strerror}): see to it that no other run uses {folder}")
            break
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # the one who held it has deleted it in between
    who = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S %Z')}\n"
    with file:
        file.truncate(0)
        with contextlib.suppress(OSError):  # without room for it, what is done inside says so
            os.write(file.fileno(), who.encode())
        yield
