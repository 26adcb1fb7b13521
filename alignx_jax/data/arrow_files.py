"""Rows of Parquet files and of folders that Hugging Face `datasets` saved; pyarrow reads them and runs no code."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from alignx_jax.data.fields import Bad, present
from alignx_jax.exits import UserError

KINDS = (".parquet", ".arrow")


def of_dataset(folder: pathlib.Path) -> list[pathlib.Path] | None:
    """The Arrow files of a folder of `save_to_disk`, in their order; None if it is no such folder.

    Of several splits that is `train`.

    Raises:
      UserError: no split for training, or a folder that is not whole or names files that are not its own.
    """
    if (folder / "dataset_dict.json").is_file():
        if not (folder / "train").is_dir():
            raise UserError(f"{folder}: the data set has no split 'train'; name the folder of a split in it")
        folder = folder / "train"
    state = folder / "state.json"
    if not state.is_file():
        return None
    try:
        names = [entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
        there = {file.name for file in folder.glob("*.arrow")}
        strangers = [name for name in names if name not in there]  # a path that leaves the folder is one
        if strangers or not names:
            raise ValueError(f"{strangers[0]!r} is no Arrow file of its folder" if strangers else "an empty list")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{state}: does not name the files of the data set ({error}); save it again") from None
    return [folder / name for name in names]


def rows(file: pathlib.Path) -> Iterator[tuple[int, dict | Bad]]:
    """Numbered rows, each a dict of what is not null in it, or why it cannot be read.

    Raises:
      UserError: the file is not what its name says.
    """
    number = 0
    try:
        if file.suffix == ".parquet":
            batches = pq.ParquetFile(file).iter_batches(batch_size=1024)
        else:
            batches = pa.ipc.open_stream(pa.memory_map(str(file)))
        for batch in batches:
            for place in range(len(batch)):
                number += 1
                yield number, _row(batch.slice(place, 1))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last of a column's name
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{file}: row {number + 1}: damaged, or no such file as its name says ({reason})") from None


def _row(row) -> dict | Bad:
    try:
        row.validate(full=True)  # offsets that point elsewhere, text that is not UTF-8
        return present(row.to_pylist()[0])
    except ValueError as error:  # ArrowInvalid is one
        return Bad(f"cannot be read ({str(error).splitlines()[0]})")
