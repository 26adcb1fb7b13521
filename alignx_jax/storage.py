"""Where runs are kept: folders on a file system, or `gs://` in object storage, by one kind of path.

Object storage has files that are whole or not there, and nothing else: no folders, appending, renaming of many files,
links or locks. So it is written the same way on a file system: a folder counts once it has the file that is written
last. Libraries that know only files of this machine get a folder of it (`staging`, `local_copy`).
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import pathlib
import shutil
import tempfile
import traceback
from collections.abc import Collection

import fsspec
from etils import epath

from alignx_jax.exits import StorageError, UserError

Path = pathlib.Path | epath.Path

os.environ.setdefault("EPATH_USE_TF", "false")  # an installed TensorFlow would be loaded for gs://
# Each listing is asked for anew: TensorStore and other processes write too.
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)

_SPECIAL = "*?[\\"
"""Orbax's glob takes the first three in a path for patterns, and then finds nothing to write the index of;
TensorStore takes the last one for a separator, and writes elsewhere."""


def path(text: str) -> Path:
    """The path that a user has given.

    Raises:
      UserError: it is remote and the library for it is not installed.
    """
    if "://" not in text:
        return pathlib.Path(text).expanduser()
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text}: gs:// needs gcsfs; install it (pip install gcsfs), or give a path of this machine")
    return epath.Path(text)


def is_remote(path: Path) -> bool:
    return not isinstance(path, pathlib.Path)


def absolute(path: Path) -> Path:
    return path if is_remote(path) else path.absolute()


def check_place(folder: Path) -> None:
    """Refuses a folder that checkpoints cannot be written to.

    Raises:
      UserError: its path has a character that Orbax or TensorStore take for something else.
    """
    path = str(absolute(folder))
    if special := [c for c in _SPECIAL if c in path]:
        raise UserError(
            f"--run={folder}: checkpoints cannot be written where the path has {' or '.join(special)} ({path}); give "
            "another --run"
        )


def make(folder: Path) -> None:
    """With its parents; remote ones need no making."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def files(folder: Path) -> dict[str, int]:
    """Every file below a folder, relative to it, with its size in bytes; nothing where there is no such folder."""
    if is_remote(folder):
        system, root = fsspec.url_to_fs(str(folder))
    else:
        system, root = fsspec.filesystem("file"), str(folder)  # a path may have `::` in it, which joins addresses
    found = system.find(root, detail=True)
    return {os.path.relpath(name, root): about["size"] for name, about in sorted(found.items())}


def remove(folder: Path, ignore_errors: bool = False) -> None:
    """A folder and all in it, if it is there."""
    if not is_remote(folder):
        if folder.exists():
            shutil.rmtree(folder, ignore_errors)
        return
    try:
        if folder.is_dir():
            folder.rmtree()
    except Exception:  # whatever the client raises
        if not ignore_errors:
            raise


def staging(folder: Path) -> pathlib.Path:
    """Where to write what `publish` then brings to `folder`: the folder itself, or an empty one of this machine."""
    return _scratch() if is_remote(folder) else folder


def publish(staged: pathlib.Path, folder: Path, last: str = "") -> None:
    """All files of `staged` to `folder`, as they are now.

    Args:
      last: the file that says the folder is whole.
    """
    if staged == folder:
        return
    system, root = fsspec.url_to_fs(str(folder))
    for name in sorted(files(staged), key=lambda name: (name == last, name)):
        system.put_file(str(staged / name), f"{root}/{name}")


def beside(folder: Path) -> pathlib.Path:
    """Where to write what `end` then makes a new `folder` of."""
    return _scratch() if is_remote(folder) else folder.with_name(f".{folder.name}.partial")


def begin(partial: pathlib.Path, folder: Path, leftovers: Collection[str] = ()) -> None:
    """Makes `partial`, which `beside` gave, an empty folder.

    Args:
      leftovers: files that an attempt which was stopped may have left in `folder`, in object storage.

    Raises:
      UserError: `folder` holds something already.
    """
    half = set(leftovers) if is_remote(folder) else set()
    if folder.exists() and (not folder.is_dir() or {file.name for file in folder.iterdir()} - half):
        raise UserError(f"{folder} exists already; delete it, or give another folder")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def end(partial: pathlib.Path, folder: Path, last: str) -> None:
    """Makes `partial`, with all in it, `folder`; in object storage its file `last` is written last."""
    if is_remote(folder):
        publish(partial, folder, last=last)
        shutil.rmtree(partial)
    else:
        os.replace(partial, folder)


def free(folder: Path) -> Path:
    """The first of `NAME.1`, `NAME.2`, ... that is not there yet: where what has a folder's name is kept."""
    number = 1
    while (name := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return name


def move(folder: Path, to: Path, last: str) -> None:
    """A folder to a new name; in object storage file by file, so that one of the two is whole at any moment: by its
    file `last`, which is copied last and deleted first."""
    if not is_remote(folder):
        os.replace(folder, to)
        return
    system, root = fsspec.url_to_fs(str(folder))
    names = sorted(files(folder), key=lambda name: (name == last, name))
    for name in names:
        system.copy(f"{root}/{name}", f"{fsspec.url_to_fs(str(to))[1]}/{name}")
    for name in reversed(names):
        system.rm_file(f"{root}/{name}")


def discard(folder: Path, last: str) -> None:
    """Deletes a folder that was whole by its file `last`: no half of it is taken for one, whenever this is killed."""
    if is_remote(folder):
        (folder / last).unlink()
        remove(folder)
        return
    gone = folder.with_name(f".{folder.name}.gone")
    remove(gone)
    os.replace(folder, gone)
    remove(gone)


def local_copy(folder: Path) -> pathlib.Path:
    """A folder of this machine with the files of `folder`: itself, or a copy that ends with the process."""
    if not is_remote(folder):
        return folder
    copy = _scratch()
    system, root = fsspec.url_to_fs(str(folder))
    for name in files(folder):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        system.get_file(f"{root}/{name}", str(copy / name))
    return copy


def failed(error: BaseException) -> str | None:
    """What remote storage says, if an error comes from there; its libraries raise errors of many kinds."""
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    if any(name.partition(".")[0] == "gcsfs" for name in modules):
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def _scratch() -> pathlib.Path:
    return pathlib.Path(tempfile.mkdtemp(dir=_all_scratch()))


@functools.cache
def _all_scratch() -> str:
    folder = tempfile.mkdtemp(prefix="alignx_jax-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def write(path: Path, content: str | bytes) -> None:
    """Replaces `path` by `content`, on disk, or in object storage, when this returns.

    Raises:
      StorageError: object storage refuses.
      OSError: the file system does.
    """
    content = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        try:
            path.write_bytes(content)
        except Exception as error:  # whatever the client raises
            raise StorageError(
                f"{path} cannot be written ({failed(error) or error}); see to it that the bucket is there and "
                "may be written, and start the same command again"
            ) from error
        return
    fresh = path.with_name(path.name + ".new")
    with fresh.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    sync(path.parent)


def sync(path: pathlib.Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
