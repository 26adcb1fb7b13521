"""Rows of Parquet files and of folders that Hugging Face `datasets` saved; pyarrow reads them and runs no code."""

from __future__ import annotations

import json
import pathlib
import re
import struct
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from alignx_jax.data.fields import Bad, present
from alignx_jax.data.text_files import LONGEST_LINE, whole
from alignx_jax.exits import UserError

KINDS = (".parquet", ".arrow")

_ROWS = 64  # decoded at a time: none is longer than `LONGEST_LINE`
_COMPRESSION = 100  # times smaller than its values: of text, repetitions alone are
_SMALL = 1 << 24  # bytes of a column of a row group that may be as repetitive as they like


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
        names = [entry["filename"] for entry in json.loads(whole(state))["_data_files"]]
        there = {file.name for file in folder.glob("*.arrow")}
        strangers = [name for name in names if name not in there]  # a path that leaves the folder is one
        if strangers or not names:
            raise ValueError(f"{strangers[0]!r} is no Arrow file of its folder" if strangers else "an empty list")
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{state}: does not name the files of the data set ({error}); save it again") from None
    return [folder / name for name in names]


def rows(file: pathlib.Path) -> Iterator[tuple[int, dict | Bad]]:
    """Numbered rows, each a dict of what is not null in it, or why it cannot be read.

    Memory is bounded by the size of the file, whatever is in it: what is compressed beyond reason is not read.

    Raises:
      UserError: the file is not what its name says, or inflates to more than text does.
    """
    number = 0
    try:
        for batch in _parquet(file) if file.suffix == ".parquet" else _arrow(file):
            for place in range(len(batch)):
                number += 1
                yield number, _row(batch.slice(place, 1))
    except (pa.ArrowException, OSError, UnicodeDecodeError, struct.error, IndexError) as error:  # of a column's name
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{file}: row {number + 1}: damaged, or no such file as its name says ({reason})") from None


def _parquet(file: pathlib.Path) -> Iterator[pa.RecordBatch]:
    opened = pq.ParquetFile(file)
    first = 1
    for number in range(opened.metadata.num_row_groups):
        group = opened.metadata.row_group(number)
        for n in range(group.num_columns):
            column = group.column(n)
            inflated, values = column.total_uncompressed_size, max(column.num_values, 1)
            dense = inflated > _SMALL and inflated > _COMPRESSION * column.total_compressed_size
            if dense or inflated > LONGEST_LINE * values:
                raise UserError(
                    f"{file}: rows {first:,} to {first + group.num_rows - 1:,}: column {column.path_in_schema!r} "
                    f"inflates to {inflated:,} bytes, more than sentences do; write the file again as .jsonl"
                )
        first += group.num_rows
    yield from opened.iter_batches(batch_size=_ROWS)


def _arrow(file: pathlib.Path) -> Iterator[pa.RecordBatch]:
    for message in pa.ipc.MessageReader.open_stream(pa.memory_map(str(file))):
        if message.type != "schema" and _is_compressed(message.metadata.to_pybytes()):
            raise UserError(f"{file}: compressed inside; save it again without compression, as save_to_disk does")
    yield from pa.ipc.open_stream(pa.memory_map(str(file)))


def _is_compressed(metadata: bytes) -> bool:
    """Whether a message's body is compressed, by the Flatbuffers of the format (Message.fbs): nothing else tells."""

    def table(pointer: int):
        """The places of a table's fields by number, 0 for those it does not have."""
        start = pointer + struct.unpack_from("<I", metadata, pointer)[0]
        fields = start - struct.unpack_from("<i", metadata, start)[0]
        size = struct.unpack_from("<H", metadata, fields)[0]

        def place(number: int) -> int:
            offset = struct.unpack_from("<H", metadata, fields + 4 + 2 * number)[0] if 4 + 2 * number < size else 0
            return offset and start + offset

        return place

    message = table(0)
    body = table(message(2))  # of a RecordBatch, whose field 3 says how it is compressed
    if metadata[message(1)] == 2:  # a DictionaryBatch, whose field 1 is a RecordBatch
        body = table(body(1))
    return bool(body(3))


def _row(row) -> dict | Bad:
    try:
        row.validate(full=True)  # offsets that point elsewhere, text that is not UTF-8
        if _size(row.to_struct_array()) > LONGEST_LINE:
            return Bad(f"more than {LONGEST_LINE:,} bytes; split it, or leave it out")
        return present(row.to_pylist()[0])
    except ValueError as error:  # ArrowInvalid is one
        return Bad(f"cannot be read ({str(error).splitlines()[0]})")


def _size(array: pa.Array) -> int:
    """Bytes of the values of a row, roughly. In a list several places may share one, which is not made for each."""
    if isinstance(array, pa.StructArray):
        return sum(map(_size, array.flatten()))
    if not re.search("dictionary|view|run_end", str(array.type)):
        return array.nbytes
    if isinstance(array, pa.DictionaryArray):
        return _size(array.dictionary_decode())
    if pa.types.is_string_view(array.type) or pa.types.is_binary_view(array.type):
        return array.cast(pa.large_binary()).nbytes
    raise ValueError(f"{array.type} is not supported")
