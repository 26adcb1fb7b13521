"""The files of weights in a Hugging Face folder: opened and checked against a configuration; only headers are read."""

from __future__ import annotations

import collections
import fnmatch
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import safetensors

from alignx_jax.exits import UserError
from alignx_jax.models import other_formats
from alignx_jax.models.families import FAMILIES, DecoderConfig, Weight
from alignx_jax.models.fields import read_json, refuse_pointer, unreadable

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_COMPARED_ROWS = 1024

_Tensors = dict[str, Any]  # key -> a slice of safetensors, which reads from disk only what is asked of it


def open_weights(folder: pathlib.Path, config: DecoderConfig) -> _Tensors:
    """The tensors of a folder by key, each with its shape and type, and not read yet; all that `config` needs.

    Raises:
      UserError: as `huggingface.load`, but for what only reading the numbers shows.
    """
    tensors, family = _open(folder), FAMILIES[config.family]
    if config.tie_embeddings and family.weights[0].key not in tensors and family.tied_copy in tensors:
        tensors[family.weights[0].key] = tensors.pop(family.tied_copy)  # one of the two, as transformers has it
    _check_keys(folder, tensors, family.table(config), config)
    return tensors


def stored_dtype(folder: pathlib.Path) -> str | None:
    """The type that most numbers of the weights have; None in a folder without weights.

    Raises:
      UserError: as `open_weights`, of the files alone.
    """
    if not has_weights(folder):
        return None
    numbers = collections.Counter()
    for tensor in _open(folder).values():
        numbers[_DTYPES.get(tensor.get_dtype())] += math.prod(tensor.get_shape())
    del numbers[None]
    return max(numbers, key=numbers.get, default=None)


def has_weights(folder: pathlib.Path) -> bool:
    """Whether a folder has, or should have, weights that are read here."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Those that hold the weights.

    Raises:
      UserError: there are none, or not those that the index names.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder}: {other_formats.in_place_of_weights(folder)}")
    named, names = set(_weight_map(folder).values()), {file.name for file in folder.iterdir() if file.is_file()}
    if missing := sorted(named - names):  # as is a path that leaves the folder
        raise UserError(f"{folder}: no file {missing[0]!r} in it, though {INDEX} names it; download it again")
    return [folder / name for name in sorted(named)]


def _weight_map(folder: pathlib.Path) -> dict[str, str]:
    """The file of each tensor."""
    named = read_json(folder / INDEX, "download it again").get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(f, str) for f in named.values()):
        raise UserError(f"{folder / INDEX}: no weight_map of keys to file names; download it again")
    return named


def _open(folder: pathlib.Path) -> _Tensors:
    tensors: _Tensors = {}
    for file in files(folder):
        opened = _open_file(file)
        if twice := opened.keys() & tensors.keys():
            raise UserError(f"{file}: {_some(twice)} is in another file too; download the folder again")
        tensors |= opened
    expected = [] if (folder / SINGLE).is_file() else _weight_map(folder)
    if missing := [key for key in expected if key not in tensors]:
        raise UserError(f"{folder}: {INDEX} names tensors that are not in its files: {_some(missing)}")
    return tensors


def _open_file(file: pathlib.Path) -> _Tensors:
    refuse_pointer(file)
    try:
        file.open("rb").close()  # safetensors says of a file without permission that there is none
        opened = safetensors.safe_open(file, framework="np")
    except OSError as error:
        raise unreadable(file, error) from None
    except safetensors.SafetensorError as error:
        raise UserError(f"{file}: truncated or damaged ({error}); download it again") from None
    return {key: opened.get_slice(key) for key in opened.offset_keys()}


def _some(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _check_keys(folder: pathlib.Path, tensors: _Tensors, table: list[Weight], config: DecoderConfig) -> None:
    if config.num_layers > len(tensors):  # before as many names are made
        raise UserError(f"{folder}: its config.json asks for {config.num_layers} layers, more than there are weights")
    expected = {key: weight.tensor_shape(config) for weight in table for key in weight.keys(config)}
    if missing := expected.keys() - tensors.keys():
        raise UserError(f"{folder}: the weights lack {_some(missing)}, which its config.json asks for")
    for key, shape in expected.items():
        stored, dtype = tuple(tensors[key].get_shape()), tensors[key].get_dtype()
        if stored != shape:
            raise UserError(f"{folder}: {key} has shape {list(stored)}; its config.json makes it {list(shape)}")
        if dtype not in _DTYPES:
            raise UserError(f"{folder}: {key} is of type {dtype}; supported: {', '.join(_DTYPES)}")
    family = FAMILIES[config.family]
    unknown = {
        k for k in tensors.keys() - expected.keys() if not any(fnmatch.fnmatchcase(k, p) for p in family.passed_over)
    }
    if config.tie_embeddings and family.tied_copy in unknown:
        _check_tied(folder, family.tied_copy, tensors[family.tied_copy], tensors[family.weights[0].key])
        unknown.remove(family.tied_copy)
    if unknown:
        raise UserError(f"{folder}: the weights hold {_some(unknown)}, which no part of a {config.family} model reads")


def _check_tied(folder: pathlib.Path, key: str, copy: Any, embedding: Any) -> None:
    """Some checkpoints store the output weights of tied embeddings too; they have to be the embeddings."""
    rows = embedding.get_shape()[0]
    parts = (slice(n, min(n + _COMPARED_ROWS, rows)) for n in range(0, rows, _COMPARED_ROWS))
    alike = copy.get_shape() == embedding.get_shape() and copy.get_dtype() in _DTYPES
    same = alike and all(np.array_equal(copy[p], embedding[p]) for p in parts)
    if not same:
        raise UserError(
            f"{folder}: {key} differs from the embeddings, but config.json ties them; set tie_word_embeddings to false"
        )
