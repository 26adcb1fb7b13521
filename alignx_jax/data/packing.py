"""Examples into rows: the order of an epoch, which examples share a row, and the row itself."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from alignx_jax.batch import Batch

WINDOW = 4096
"""Examples packed together: enough for full rows, few enough that a row's examples stay a random draw of the data."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Examples by row."""

    starts: np.ndarray
    """[rows+1] int64: row r holds `examples[starts[r]:starts[r+1]]`."""
    examples: np.ndarray
    """[N] int64 ids of examples."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.examples[self.starts[row] : self.starts[row + 1]]


@dataclasses.dataclass(frozen=True)
class PackedExample:
    """An example on its way into a row; ranges are [start, end) over its tokens, (0, 0) is none."""

    tokens: np.ndarray
    labels: np.ndarray
    """[n] bool: tokens with weight as a label."""
    source: tuple[int, int]
    target: tuple[int, int]
    languages: tuple[int, int]
    """Ids of the source's and the target's language."""
    hashes: tuple[int, int, int]
    """Hashes of the source's and the target's text, and of their line's meaning."""
    alone: tuple[int, int] | None = None
    """First tokens of the source and of the target encoded once more by themselves, behind the prompt."""


def order(epoch: int, seed: int, sizes: Sequence[int], weights: Sequence[float]) -> np.ndarray:
    """The shuffled examples of an epoch, [n] int64; source s owns the ids from `sum(sizes[:s])` on.

    Source s gives `round(sizes[s] * weights[s])` examples: each as often as that goes, and a random subset of them,
    another one each epoch, once more.
    """
    rng = np.random.default_rng([seed, epoch])
    parts, first = [], 0
    for size, weight in zip(sizes, weights, strict=True):
        whole, rest = divmod(round(size * weight), max(size, 1))
        parts += [first + np.tile(np.arange(size), whole), first + rng.permutation(size)[:rest]]
        first += size
    return rng.permutation(np.concatenate(parts))


def plan(
    lengths: np.ndarray, row_length: int, examples_per_row: int, order: np.ndarray, seed: Sequence[int] | None = None
) -> Rows:
    """Packs the examples of `order` by best fit, longest first, within windows of `WINDOW` of them.

    Args:
      lengths: [examples] tokens of each example, at most `row_length`.
      order: ids into `lengths`, in the order to be seen; an id may come more than once.
      seed: shuffles the rows of a window, which otherwise come fullest first; None leaves them.
    """
    examples, sizes = [np.zeros(0, np.int64)], [np.zeros(1, np.int64)]
    rng = None if seed is None else np.random.default_rng(seed)
    for first in range(0, len(order), WINDOW):
        window = order[first : first + WINDOW]
        packed = _best_fit_decreasing(window, np.asarray(lengths)[window], row_length, examples_per_row)
        rows = packed if rng is None else [packed[i] for i in rng.permutation(len(packed))]
        examples.append(np.fromiter(itertools.chain.from_iterable(rows), np.int64))  # lists take ten times as much
        sizes.append(np.fromiter(map(len, rows), np.int64))
    return Rows(np.cumsum(np.concatenate(sizes)), np.concatenate(examples))


def _best_fit_decreasing(ids: np.ndarray, lengths: np.ndarray, row_length: int, slots: int) -> list[list[int]]:
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(row_length + 1)]  # rows by the tokens they still hold
    mask = 0  # bit r: some row has room for exactly r tokens; finds the tightest fit without a search
    by_length = np.argsort(-lengths, kind="stable")
    for example, length in zip(ids[by_length].tolist(), lengths[by_length].tolist(), strict=True):
        if not 0 < length <= row_length:
            raise ValueError(f"example {example} has {length} tokens, a row {row_length}")
        if fitting := mask >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                mask &= ~(1 << room)
        else:
            room, row = row_length, len(rows)
            rows.append([])
        rows[row].append(example)
        room -= length
        if room and len(rows[row]) < slots:
            with_room[room].append(row)
            mask |= 1 << room
    return rows


def assemble(examples: Sequence[PackedExample], row_length: int, slots: int) -> Batch:
    """One row: a Batch of NumPy arrays without the leading R. No examples make an empty row."""
    row = Batch(
        tokens=np.zeros(row_length, np.int32),
        positions=np.zeros(row_length, np.int32),
        segments=np.zeros(row_length, np.int32),
        loss_weights=np.zeros(row_length, np.float32),
        source_span=np.zeros(row_length, np.int32),
        target_span=np.zeros(row_length, np.int32),
        source_language=np.zeros(slots, np.int32),
        target_language=np.zeros(slots, np.int32),
        source_hash=np.zeros(slots, np.int32),
        target_hash=np.zeros(slots, np.int32),
        line_hash=np.zeros(slots, np.int32),
        valid=np.zeros(slots, bool),
    )
    start = 0
    for slot, example in enumerate(examples, 1):
        end = start + len(example.tokens)
        row.tokens[start:end] = example.tokens
        pieces = np.array([0, *(example.alone or ()), len(example.tokens)])
        for number, (first, last) in enumerate(itertools.pairwise(start + pieces)):
            row.positions[first:last] = np.arange(last - first)
            row.segments[first:last] = slot + number * slots
        row.loss_weights[start:end] = example.labels
        row.loss_weights[start + pieces[:-1]] = 0  # nothing predicts a segment's first token
        row.source_span[start + example.source[0] : start + example.source[1]] = slot
        row.target_span[start + example.target[0] : start + example.target[1]] = slot
        row.source_language[slot - 1], row.target_language[slot - 1] = example.languages
        row.source_hash[slot - 1], row.target_hash[slot - 1], row.line_hash[slot - 1] = example.hashes
        row.valid[slot - 1] = example.source[0] < example.source[1] and example.target[0] < example.target[1]
        start = end
    return row
