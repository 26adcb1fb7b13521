"""The dummy data as the archives that are published: a folder of `dummy` each, packed, or a file, compressed."""

import gzip
import pathlib
import tarfile

import pytest

DUMMY = pathlib.Path(__file__).parent / "dummy"


def pack(folder: pathlib.Path) -> pathlib.Path:
    """The archives, in a new folder."""
    folder.mkdir(parents=True)
    for entry in DUMMY.iterdir():
        if entry.is_dir():
            with tarfile.open(folder / f"{entry.name}.tar.gz", "w:gz") as tar:
                for file in sorted(entry.iterdir()):
                    tar.add(file, f"./{file.name}" if "flores" in file.name else file.name)
        else:
            (folder / f"{entry.name}.gz").write_bytes(gzip.compress(entry.read_bytes()))
    return folder


@pytest.fixture(scope="session")
def archives(tmp_path_factory) -> pathlib.Path:
    return pack(tmp_path_factory.mktemp("published") / "archives")


@pytest.fixture
def cache(tmp_path) -> pathlib.Path:
    """A cache with the archives in the place of those that were fetched by hand."""
    pack(tmp_path / "cache" / "downloads" / "manual")
    return tmp_path / "cache"
