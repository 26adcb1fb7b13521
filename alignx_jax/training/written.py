"""Looks at a checkpoint as it lies in storage: every array is there, and every part of it."""

from __future__ import annotations

import json
import math
from collections import Counter

import jax
import tensorstore

from alignx_jax import storage

Kinds = dict[str, Counter]
"""Of each item of a checkpoint, how many arrays it has of each shape and type."""


def kinds(items: dict) -> Kinds:
    """What `incomplete` compares with, of the arrays themselves."""
    return {name: Counter((x.shape, str(x.dtype)) for x in jax.tree.leaves(tree)) for name, tree in items.items()}


def incomplete(folder: storage.Path, sizes: dict[str, int], expected: Kinds) -> str | None:
    """What a checkpoint lacks, whose writing is said to be over; None: nothing.

    The index of every item is read, and no array: it costs milliseconds. In object storage only whether it is there.

    Args:
      sizes: of its files, in bytes.
    """
    for name, wanted in expected.items():
        if not sizes.get(f"{name}/manifest.ocdbt"):
            return f"{name}/manifest.ocdbt is missing"
        if storage.is_remote(folder):
            continue
        place = {"driver": "file", "path": f"{folder / name}/"}
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": place}).result()
        parts, arrays = Counter(), {}
        for key in (key.decode() for key in store.list().result()):
            array, _, rest = key.partition("/")
            if rest == "zarr.json":
                arrays[array] = json.loads(store[key])
            else:
                parts[array] += 1
        if Counter((tuple(a["shape"]), a["data_type"]) for a in arrays.values()) != wanted:
            return f"{name} has not the arrays of the state"
        for array, about in arrays.items():
            grid = zip(about["shape"], about["chunk_grid"]["configuration"]["chunk_shape"], strict=True)
            every = math.prod(-(-size // part) for size, part in grid)
            if parts[array] != every:
                return f"{name} has {parts[array]} of {every} parts of {array}"
    return None
