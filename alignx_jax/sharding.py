"""The mesh and every sharding rule of the project.

Axes: "data" shards rows and parameters (FSDP), "model" shards heads, MLP width and vocabulary (tensor parallelism),
"replica" (optional, across slices) shards rows and copies parameters.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alignx_jax.exits import UserError

if TYPE_CHECKING:
    from alignx_jax.models.architecture import DecoderConfig

# By the last names of a parameter's path. A leading [L] is the stacked layers, never sharded: scan slices it.
_PARAMETERS: dict[tuple[str, ...], P] = {
    ("embedding",): P("model", "data"),  # [V,D]
    ("output",): P("model", "data"),  # [V,D]
    ("norm",): P(None),  # [D]
    ("layers", "attention_norm"): P(None, None),  # [L,D]
    ("layers", "query"): P(None, "data", "model", None),  # [L,D,H,h]
    ("layers", "key"): P(None, "data", "model", None),  # [L,D,K,h]
    ("layers", "value"): P(None, "data", "model", None),  # [L,D,K,h]
    ("layers", "attention_output"): P(None, "model", None, "data"),  # [L,H,h,D]
    ("layers", "query_bias"): P(None, "model", None),  # [L,H,h]
    ("layers", "key_bias"): P(None, "model", None),  # [L,K,h]
    ("layers", "value_bias"): P(None, "model", None),  # [L,K,h]
    ("layers", "attention_output_bias"): P(None, None),  # [L,D]
    ("layers", "query_norm"): P(None, None),  # [L,h]
    ("layers", "key_norm"): P(None, None),  # [L,h]
    ("layers", "attention_post_norm"): P(None, None),  # [L,D]
    ("layers", "mlp_norm"): P(None, None),  # [L,D]
    ("layers", "mlp_post_norm"): P(None, None),  # [L,D]
    ("layers", "gate"): P(None, "data", "model"),  # [L,D,F]
    ("layers", "up"): P(None, "data", "model"),  # [L,D,F]
    ("layers", "down"): P(None, "model", "data"),  # [L,F,D]
    ("layers", "gate_bias"): P(None, "model"),  # [L,F]
    ("layers", "up_bias"): P(None, "model"),  # [L,F]
    ("layers", "down_bias"): P(None, None),  # [L,D]
    # Adapters A [L,inputs,r] and B [L,r,outputs], each as the inputs or outputs of its weights.
    ("query", "a"): P(None, "data", None),
    ("query", "b"): P(None, None, "model", None),
    ("key", "a"): P(None, "data", None),
    ("key", "b"): P(None, None, "model", None),
    ("value", "a"): P(None, "data", None),
    ("value", "b"): P(None, None, "model", None),
    ("attention_output", "a"): P(None, "model", None, None),
    ("attention_output", "b"): P(None, None, "data"),
    ("gate", "a"): P(None, "data", None),
    ("gate", "b"): P(None, None, "model"),
    ("up", "a"): P(None, "data", None),
    ("up", "b"): P(None, None, "model"),
    ("down", "a"): P(None, "model", None),
    ("down", "b"): P(None, None, "data"),
    # The pair classifier is small (4 MB for an 8B model): every device has all of it.
    ("classifier", "gate"): P(None, None),
    ("classifier", "up"): P(None, None),
    ("classifier", "down"): P(None, None),
}

_CONCURRENT = "--xla_cpu_enable_concurrency_optimized_scheduler"
CPU_THREADS, _THREADS_A_DEVICE = "PJRT_NPROC", 8
"""The variable for the number of threads of XLA for CPUs, and what a simulated device gets."""


def _shape(spec: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", spec, flags=re.ASCII):
        raise UserError(
            f"--mesh={spec}: a mesh is data x model, such as 8x1, or replicas x data x model, such as 2x8x1"
        )
    return tuple(map(int, spec.split("x")))


def prepare_devices(spec: str, processes: int = 1) -> None:
    """Makes CPU-only hosts simulate the devices that a mesh asks for. Call it before anything uses a device.

    XLA for CPUs starts independent collectives together, and each blocks a thread until all devices have come: there
    have to be threads for all of them, on few cores too, and the fewer start together the better (dev/decisions.md).

    With an accelerator this changes nothing that matters: `make_mesh` takes the accelerator's devices.

    Raises:
      UserError: `spec` is no mesh, or its devices do not divide among the processes.
    """
    size = math.prod(_shape(spec))
    if size % processes:
        raise UserError(
            f"--mesh={spec}: {size} devices do not divide among {processes} processes, which have as many each; "
            f"give a mesh of a multiple of {processes}"
        )
    wanted = max(size // processes, jax.config.jax_num_cpu_devices)
    try:
        jax.config.update("jax_num_cpu_devices", wanted)
    except RuntimeError:
        return  # devices exist already; `make_mesh` says so if they are too few
    if size > 1:
        os.environ.setdefault(CPU_THREADS, str(max(os.cpu_count() or 1, _THREADS_A_DEVICE * wanted)))
        if _CONCURRENT not in (flags := os.environ.get("XLA_FLAGS", "")):
            os.environ["XLA_FLAGS"] = f"{flags} {_CONCURRENT}=false".strip()


def make_mesh(spec: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh "DxM" with axes (data, model) or "RxDxM" with axes (replica, data, model).

    Args:
      devices: those of a machine that is not attached; unset: all there are.

    Raises:
      UserError: `spec` is no mesh, or there are fewer devices than it asks for; or more, on several processes.
    """
    shape = _shape(spec)
    attached = devices is None
    devices, wanted = devices or jax.devices(), math.prod(shape)
    if attached and jax.process_count() > 1 and len(devices) != wanted:
        raise UserError(
            f"--mesh={spec} is of {wanted} devices, but the {jax.process_count()} processes have {len(devices)} "
            f"({devices[0].device_kind}); several processes use all of theirs: give a mesh of {len(devices)}"
        )
    if len(devices) < wanted:
        raise UserError(
            f"--mesh={spec} asks for {wanted} devices, but there are {len(devices)} ({devices[0].device_kind}); "
            f"give a mesh of at most {len(devices)}"
        )
    return jax.make_mesh(shape, _names_of(shape), axis_types=(AxisType.Auto,) * len(shape), devices=devices[:wanted])


def abstract_mesh(spec: str) -> AbstractMesh:
    """The shape of `make_mesh(spec)`, with no devices.

    Raises:
      UserError: `spec` is no mesh.
    """
    shape = _shape(spec)
    return AbstractMesh(shape, _names_of(shape), axis_types=(AxisType.Auto,) * len(shape))


def _names_of(shape: tuple[int, ...]) -> tuple[str, ...]:
    return ("replica", "data", "model")[-len(shape) :]


def row_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The axes that rows of a batch are sharded over."""
    return tuple(a for a in ("replica", "data") if a in mesh.shape)


def data_shards(mesh: Mesh | AbstractMesh) -> int:
    """Number of groups that the rows of a batch are split into."""
    return math.prod(mesh.shape[a] for a in row_axes(mesh))


def batch_spec(mesh: Mesh | AbstractMesh) -> P:
    """Of an array with leading rows [R,...]."""
    return P(row_axes(mesh))


def own_rows(rows: int, mesh: Mesh) -> np.ndarray:
    """The numbers of those of `rows` rows that this process's devices need, in order: all, in a single process.

    Processes that share a part of the data axes, as those of a model axis do, need the same rows.
    """
    places = NamedSharding(mesh, batch_spec(mesh)).addressable_devices_indices_map((rows,))
    return np.unique(np.concatenate([np.arange(rows)[place] for place in places.values()]))


def place_rows(x: np.ndarray, mesh: Mesh, own: np.ndarray | None = None, rows: int = 0) -> jax.Array:
    """Rows [R,...] that every process has, onto the devices: each process's part onto its own.

    Args:
      own: given where `x` is only these of `rows` rows, those of `own_rows`.
    """
    shape = x.shape if own is None else (rows, *x.shape[1:])

    def part(index: tuple[slice, ...]) -> np.ndarray:
        return x[index] if own is None else x[np.searchsorted(own, np.arange(rows)[index[0]])]

    return jax.make_array_from_callback(shape, NamedSharding(mesh, batch_spec(mesh)), part)


def to_host(tree: Any) -> Any:
    """Global arrays whole on every process's host, as NumPy: the one way back from the devices.

    Every process has to call it. What is not wholly on its own devices is gathered, an array at a time.
    """

    def fetch(x: jax.Array) -> np.ndarray:
        here = not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
        return np.asarray(x if here else multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(fetch, tree)


def rows_like(x: np.ndarray, rows: int, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """What `place_rows` makes of `rows` rows such as `x` [...], without the rows."""
    return jax.ShapeDtypeStruct((rows, *x.shape), x.dtype, sharding=NamedSharding(mesh, batch_spec(mesh)))


def on_each_device(function, mesh: Mesh):
    """`function`, of arrays with any leading axis, run by every device on its own entries of a global leading axis."""
    spec = P(tuple(mesh.axis_names))
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Fixes the sharding of an activation: "rows", axes of the mesh or None for each dimension, None for the others.

    The mesh is the one of `jax.set_mesh`; without one (a single device) this does nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(*(row_axes(mesh) if a == "rows" else a for a in axes)))


def constrain_to_table(x_RxTxD: jax.Array) -> jax.Array:
    """Fixes the sharding of what meets the embedding table to that of its columns.

    Every device has its own part of D, for all rows of its replica: no device ever holds the whole table.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return constrain(x_RxTxD, "replica" if "replica" in mesh.shape else None, None, "data")


def constrain_lookup(x_RxTxD: jax.Array) -> jax.Array:
    """Fixes the sharding of rows just read from the embedding table.

    Every device first looks up its own part of D, and an all-to-all turns that into all of D for its own rows.
    """
    return constrain(constrain_to_table(x_RxTxD), "rows")


def constrain_groups(x_Gx___: jax.Array) -> jax.Array:
    """Fixes the sharding of what each group of pairs has by itself, [G,...] with a group a device of the data axes.

    Left free, the compiler gathers blocks of the pair losses' gradients of all groups on every device.
    """
    return constrain(x_Gx___, "rows")


def constrain_vocabulary(x_Vx___: jax.Array) -> jax.Array:
    """Fixes the sharding of what has the vocabulary in front, inside the next-token loss: over all axes but replicas.

    Every device has its own part of the vocabulary, for all tokens of its replica: it never holds the whole table, nor
    the whole of its gradient, and what travels are the tokens' states (dev/decisions.md). Where data x model does
    not divide the vocabulary it is sharded as it is stored, and the compiler gathers what it needs.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x_Vx___.shape[0] % (mesh.shape["model"] * mesh.shape["data"]):
        return x_Vx___
    return constrain(x_Vx___, ("model", "data"))


def constrain_to_vocabulary(x_NxD: jax.Array) -> jax.Array:
    """Fixes the sharding of what meets the vocabulary there: all tokens of a replica, on each of its devices."""
    return constrain(x_NxD, "replica" if "replica" in jax.sharding.get_abstract_mesh().shape else None)


def map_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of trees of arrays [R,...], applied by every device to its own rows.

    For what treats each row by itself and the compiler would gather all rows for, such as a top-k.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return function if mesh.empty else jax.shard_map(function, in_specs=batch_spec(mesh), out_specs=batch_spec(mesh))


def map_heads(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function` of q [R,T,H,h], k and v [R,T,K,h], segments [R,T]: every device applies it to its own rows and heads.

    For kernels, which the compiler cannot partition. Groups of heads stay together: "model" divides K (`check`).
    """
    rows = row_axes(jax.sharding.get_abstract_mesh())
    heads = P(rows, None, "model", None)
    # The kernels do not say which axes their results vary over.
    return jax.shard_map(function, in_specs=(heads, heads, heads, P(rows)), out_specs=heads, check_vma=False)


def constrain_micro_batches(x: jax.Array) -> jax.Array:
    """Fixes the sharding of [A,R,...]: the rows of every micro-batch over all devices."""
    return constrain(x, None, "rows")


def parameter_spec(path: tuple[str, ...]) -> P:
    """The sharding of the parameter at `path`, names from the root, such as ("decoder", "layers", "query").

    Raises:
      KeyError: no rule for it; a parameter is never replicated by oversight.
    """
    for names, spec in _PARAMETERS.items():
        if path[-len(names) :] == names:
            return spec
    raise KeyError(f"no sharding rule for the parameter {'/'.join(path)}")


def parameter_shardings(params: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The NamedSharding of every leaf of a nested dictionary of parameters."""
    return jax.tree_util.tree_map_with_path(lambda path, _: NamedSharding(mesh, parameter_spec(_names(path))), params)


def moment_shardings(moments: Any, params: dict[str, Any], mesh: Mesh) -> Any:
    """The NamedSharding of every leaf of an optimizer's state, whose paths end in those of the parameters.

    A moment is sharded as its parameter; a mean over one of the parameter's axes as the axes that are left (of equally
    long ones the first is taken for the one that is gone). What is of no parameter, and placeholders, are everywhere.
    """

    def spec(path, x) -> P:
        names = tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
        if not names:
            return P()
        shape, axes = functools.reduce(dict.__getitem__, names, params).shape, (*parameter_spec(names),)
        if x.shape == shape:
            return P(*axes)
        for gone in range(len(shape)):
            if x.shape == (*shape[:gone], *shape[gone + 1 :]):
                return P(*axes[:gone], *axes[gone + 1 :])
        return P()

    return jax.tree_util.tree_map_with_path(lambda path, x: NamedSharding(mesh, spec(path, x)), moments)


def is_stacked(path: tuple[Any, ...]) -> bool:
    """Whether what is at `path` of a tree has the layers as its leading axis."""
    return any(getattr(entry, "key", None) == "layers" for entry in path)


def constrain_parameters(params: dict[str, Any]) -> dict[str, Any]:
    """Fixes the sharding of parameters, or of their gradients, inside a compiled function; see `constrain`."""
    return jax.tree_util.tree_map_with_path(lambda path, x: constrain(x, *parameter_spec(_names(path))), params)


def _names(path: tuple[jax.tree_util.DictKey, ...]) -> tuple[str, ...]:
    return tuple(entry.key for entry in path)


def check(
    decoder: DecoderConfig, mesh: Mesh | AbstractMesh, rows: int, accumulation: int = 1, flag: str = "training.rows"
) -> None:
    """Whether a model, and steps of `rows` rows in `accumulation` micro-batches, can be laid out on a mesh.

    Raises:
      UserError: an axis does not divide what it shards; says which, and what would work.
    """
    sharded_over_model = {
        "attention heads": decoder.num_heads,
        "key/value heads": decoder.num_kv_heads,
        "MLP units": decoder.intermediate_size,
        "vocabulary rows (padded)": decoder.padded_vocab_size,
    }
    model, data, shards = mesh.shape["model"], mesh.shape["data"], data_shards(mesh)
    for what, size in sharded_over_model.items():
        if size % model:
            common = math.gcd(*sharded_over_model.values())
            works = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            raise UserError(
                f"--mesh: a model axis of {model} does not divide the model's {size} {what}; sizes that work: {works}"
            )
    if decoder.hidden_size % data:
        raise UserError(
            f"--mesh: a data axis of {data} does not divide the model's hidden size {decoder.hidden_size}; "
            f"give one that does, such as {max(n for n in range(1, data) if decoder.hidden_size % n == 0)}"
        )
    if rows % accumulation:
        raise UserError(
            f"--{flag}={rows} cannot be split into --training.accumulation={accumulation} micro-batches; "
            f"give a multiple of {accumulation} rows"
        )
    if rows // accumulation % shards:
        raise UserError(
            f"--{flag}={rows} cannot be split into {accumulation} micro-batches over the mesh's {shards} "
            f"data shards; give a multiple of {accumulation * shards} rows"
        )
