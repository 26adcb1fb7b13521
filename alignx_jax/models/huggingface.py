"""Weights in and out: Hugging Face folders of safetensors, read straight into a sharding and written back."""

from __future__ import annotations

import fnmatch
import functools
import json
import math
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax.sharding import Mesh

from alignx_jax import hosts, sharding, storage
from alignx_jax.exits import StorageError, UserError
from alignx_jax.models import weights
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.families import FAMILIES, DecoderConfig, Weight, decoder_config
from alignx_jax.models.fields import read_json

DTYPES = ("float32", "bfloat16", "float16")
"""Types that weights are written in."""


def read_config(folder: str | pathlib.Path) -> dict[str, Any]:
    """The parsed config.json of a Hugging Face folder.

    Raises:
      UserError: there is none, it is not a JSON object, names code of the model's own, or has a size of no model.
    """
    file = pathlib.Path(folder) / "config.json"
    config = read_json(file, "give a Hugging Face folder, which has one")
    if config.get("auto_map"):
        raise UserError(
            f"{file}: auto_map names code of the model's own, which is never run; if the model does without it, as one "
            "of the supported architectures, remove auto_map"
        )
    if not isinstance(config.get("model_type", ""), str):
        raise UserError(f"{file}: model_type has to be a string; download it again")
    return config


def stop_ids(folder: str | pathlib.Path, eos_id: int) -> list[int]:
    """Tokens that end a text of a model: its tokenizer's end token, and those of its generation_config.json.

    Models of instructions end a turn with another token than a text, and only that file, or config.json where there is
    none, names both (`eos_token_id`), as `generate` of transformers reads them.

    Raises:
      UserError: a file that is not a JSON object, or something else than token ids in it.
    """
    file = pathlib.Path(folder) / "generation_config.json"
    file = file if file.is_file() else pathlib.Path(folder) / "config.json"
    ids = read_json(file, "give a Hugging Face folder, which has one").get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise UserError(f"{file}: eos_token_id has to be a token id or a list of them; download it again")
    return sorted({eos_id, *ids})


def dtype(folder: str | pathlib.Path) -> str:
    """The type of a folder's weights: that its config.json names, else the one that most of their numbers have.

    float32 where neither says, and for float64, of which training keeps no more.

    Raises:
      UserError: config.json names a type that weights are not written in; weights that are damaged.
    """
    folder = pathlib.Path(folder)
    named = named_dtype(read_config(folder), str(folder / "config.json")) or weights.stored_dtype(folder)
    return named if named in DTYPES else "float32"


def named_dtype(settings: Mapping[str, Any], where: str) -> str | None:
    """The type of weights that a config.json names: in `dtype` (transformers 5), else in `torch_dtype` (4).

    Raises:
      UserError: it is none of `DTYPES`.
    """
    field = "dtype" if settings.get("dtype") is not None else "torch_dtype"
    named = settings.get(field)
    if named is not None and named not in DTYPES:
        raise UserError(
            f"{where}: {field} is {named!r}, which weights are not written in; set it to one of {', '.join(DTYPES)}"
        )
    return named


def load(folder: str | pathlib.Path, mesh: Mesh, dtype: jnp.dtype = jnp.float32) -> Decoder:
    """The decoder in a Hugging Face folder, its parameters of type `dtype` and sharded over `mesh`.

    Every device's part is read from the files by itself, a tensor at a time: the host never holds the model.

    Raises:
      UserError: files missing, damaged or not safetensors; keys missing or unknown; a wrong shape; NaN or infinity.
    """
    folder = pathlib.Path(folder)
    config = decoder_config(read_config(folder), str(folder / "config.json"))
    table, tensors = FAMILIES[config.family].table(config), weights.open_weights(folder, config)
    graph, variables = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype)))
    params = nnx.to_pure_dict(variables)
    for weight in table:
        inner = functools.reduce(dict.__getitem__, weight.path[:-1], params)
        shape = inner[weight.path[-1]].shape
        inner[weight.path[-1]] = jax.make_array_from_callback(
            shape,
            jax.sharding.NamedSharding(mesh, sharding.parameter_spec(weight.path)),
            functools.partial(
                _read, weight=weight, shape=shape, dtype=dtype, config=config, tensors=tensors, where=folder
            ),
        )
    return nnx.merge(graph, params)


def _read(
    index: tuple[slice, ...],
    *,
    weight: Weight,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    config: DecoderConfig,
    tensors: Mapping[str, Any],
    where: pathlib.Path,
) -> np.ndarray:
    """The part `index` of a parameter of `shape`; zeros where the vocabulary is padded."""
    bounds = [s.indices(size)[:2] for s, size in zip(index, shape, strict=True)]
    part = np.zeros([stop - start for start, stop in bounds], dtype)
    keys = weight.keys(config)
    if weight.stacked:
        (first, last), *bounds = bounds
        keys = keys[first:last]
    for key, into in zip(keys, part if weight.stacked else [part], strict=True):
        tensor = _read_tensor(tensors[key], weight, config, bounds)
        with np.errstate(over="ignore"):  # told below
            into[tuple(map(slice, tensor.shape))] = tensor
        if not np.isfinite(into).all():
            raise UserError(f"{where}: {key} holds NaN or infinity; download it again, or mend the checkpoint")
    return part


def _read_tensor(tensor: Any, weight: Weight, config: DecoderConfig, bounds: list[tuple[int, int]]) -> np.ndarray:
    """The stored part of a tensor that lies within `bounds` of the parameter, with the parameter's axes."""
    by_axis = dict(zip(weight.axes, bounds, strict=True))
    slices, sizes, axis = [], [], 0
    for factors in weight.split(config):
        start, stop = (min(bound, factors[0]) for bound in by_axis[axis])
        inner = math.prod(factors[1:])  # never sharded: only whole heads are
        slices.append(slice(start * inner, stop * inner))
        sizes += [stop - start, *factors[1:]]
        axis += len(factors)
    return tensor[tuple(slices)].reshape(sizes).transpose(weight.axes)


def export(
    decoder: Decoder,
    source_config: dict[str, Any],
    folder: str | storage.Path,
    dtype: jnp.dtype,
    shard_bytes: float,
    others: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Writes weights and config.json that transformers loads; the inverse of `load`. The host holds one file at a time.

    The folder appears only when all of it is written. In object storage its config.json does, and all of it lies in a
    temporary folder of this machine before. Every process has to call this, and the first one writes.

    Args:
      source_config: the parsed config.json that the decoder was made from; fields of auxiliary heads are left out.
      dtype: of the written weights.
      shard_bytes: largest file in bytes (a larger tensor gets a file of its own); one file if everything fits.
      others: files that belong beside these, by name.

    Raises:
      UserError: the folder holds something already, or a weight is not finite or beyond the range of `dtype`.
      StorageError: a file could not be written.
    """
    folder, dtype = storage.path(str(folder)), jnp.dtype(dtype)
    if decoder.config != decoder_config(source_config, "source_config"):
        raise ValueError("source_config is not that of the decoder")
    partial = storage.beside(folder)
    shards = _plan(decoder.config, dtype.itemsize, shard_bytes)
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    names = [weights.SINGLE] if len(shards) == 1 else names
    leftovers = {*names, weights.INDEX, *(pathlib.PurePath(name).parts[0] for name in others)}
    hosts.first("folder of an export", lambda: storage.begin(partial, folder, leftovers))
    params = nnx.to_pure_dict(nnx.state(decoder, nnx.Param))
    for name, shard in zip(names, shards, strict=True):
        tensors = {}
        for key, (weight, layer) in shard.items():
            parameter = _to_host(functools.reduce(dict.__getitem__, weight.path, params), layer)
            if hosts.is_first():
                tensors[key] = _tensor(parameter, decoder.config, key, weight, dtype)
        if tensors:
            save(tensors, partial, name)

    def finish() -> None:
        if len(shards) > 1:
            every = [w for shard in shards for w, _ in shard.values()]
            size = sum(math.prod(w.tensor_shape(decoder.config)) for w in every) * dtype.itemsize
            files = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
            write(partial, weights.INDEX, to_json(index))
        for name, content in others.items():
            write(partial, name, content)
        write(partial, "config.json", to_json(_exported_config(source_config, decoder.config.family, dtype)))
        storage.end(partial, folder, last="config.json")

    hosts.first("end of an export", finish)


def save(tensors: dict[str, np.ndarray], folder: pathlib.Path, name: str) -> None:
    """Writes a safetensors file into a folder, for whom the umask lets read it.

    Raises:
      StorageError: it could not be written; the folder is gone.
    """
    file = folder / name
    try:
        file.touch()
        mode = file.stat().st_mode
        safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})  # makes one for its owner alone
        file.chmod(mode)
    except (OSError, safetensors.SafetensorError) as error:  # such as a full disk
        raise _given_up(folder, name, error) from error


def write(folder: pathlib.Path, name: str, content: bytes) -> None:
    """Writes another file into it, or into a folder in it.

    Raises:
      StorageError: as `save`.
    """
    try:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    except OSError as error:
        raise _given_up(folder, name, error) from error


def to_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _given_up(folder: pathlib.Path, name: str, error: Exception) -> StorageError:
    shutil.rmtree(folder, ignore_errors=True)
    why = getattr(error, "strerror", None) or error
    return StorageError(f"{folder / name}: {why}; make room, and start the same command again")


def _entries(config: DecoderConfig) -> Iterator[tuple[str, Weight, int | None]]:
    """Every tensor of the checkpoint, layer by layer: its key, its row of the table, its layer."""
    table = FAMILIES[config.family].table(config)
    stacked = [w for w in table if w.stacked]
    for weight in table:
        if not weight.stacked:
            yield weight.key, weight, None
        elif weight is stacked[0]:
            for layer in range(config.num_layers):
                yield from ((w.key.format(layer=layer), w, layer) for w in stacked)


def _plan(config: DecoderConfig, itemsize: int, shard_bytes: float) -> list[dict[str, tuple[Weight, int | None]]]:
    """The tensors of each file."""
    shards, size = [{}], 0
    for key, weight, layer in _entries(config):
        added = math.prod(weight.tensor_shape(config)) * itemsize
        if shards[-1] and size + added > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = (weight, layer)
        size += added
    return shards


def _to_host(parameter: jax.Array, layer: int | None) -> np.ndarray:
    """One parameter, or one layer of a stacked one, whole on this host."""
    return sharding.to_host(parameter if layer is None else parameter[layer])


def _tensor(parameter: np.ndarray, config: DecoderConfig, key: str, weight: Weight, dtype: jnp.dtype) -> np.ndarray:
    """As the checkpoint has it."""
    sizes = [size for factors in weight.split(config) for size in factors]
    split = parameter.transpose(np.argsort(weight.axes))[tuple(map(slice, sizes))]  # padded vocabulary rows go
    with np.errstate(over="ignore"):  # told below
        tensor = np.ascontiguousarray(split.reshape(weight.tensor_shape(config)), dtype)
    if not np.isfinite(tensor).all():
        raise UserError(f"export: {key} is not finite in {dtype.name}; give another --export.dtype")
    return tensor


def _exported_config(source: dict[str, Any], family: str, dtype: jnp.dtype) -> dict[str, Any]:
    row = FAMILIES[family]
    gone = (*row.auxiliary_fields, "dtype", "torch_dtype")
    kept = {k: v for k, v in source.items() if not any(fnmatch.fnmatchcase(k, p) for p in gone)}
    spelling = "torch_dtype" if "torch_dtype" in source and "dtype" not in source else "dtype"  # transformers 4, 5
    return kept | {"architectures": [row.architecture], spelling: dtype.name}
