"""What a compiled step costs one device: FLOPs of matrix products, bytes moved in memory, collectives."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

from alignx_jax.planning import hlo
from alignx_jax.planning.hlo import Instruction, Module

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_FREE = frozenset(
    {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
    | {"partition-id", "replica-id", "opt-barrier", "copy-done", "slice-done", "async-done", "async-update"}
)  # what moves no bytes itself; a *-done was counted at its start
_FREE_CALLS = frozenset({"AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone", "Sharding"})


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation, as often as it runs in a step."""

    kind: str
    """One of COLLECTIVES; an all-reduce of which every device keeps only its own slice is a reduce-scatter."""
    operand_bytes: int
    """What each device brings."""
    group: int
    """Devices that take part together."""
    times: int
    operation: str
    """Where in the model's source it comes from: JAX's `op_name`."""
    hbm_bytes: int = 0
    """Read and written by an all-gather inside fusions, for which these are not counted."""

    @property
    def sent(self) -> float:
        """Bytes that each device sends a step, by the algorithms that are optimal for bandwidth (a ring's)."""
        share = (self.group - 1) / self.group
        factor = {"all-gather": self.group * share, "all-reduce": 2 * share, "collective-permute": 1.0}
        return self.times * self.operand_bytes * factor.get(self.kind, share)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one step, for one device."""

    flops: float
    """Of matrix products, and of kernels that say how many theirs are; 2 for a multiplication with its addition."""
    hbm_bytes: float
    """Read and written by every instruction that is not inside a fusion."""
    collectives: tuple[Collective, ...]
    kernels_without_estimate: int
    """Custom kernels that carry no figures: their FLOPs are in none of these."""
    unknown_loops: int
    """Loops whose trip count the program does not say; their bodies are counted once."""

    def sent(self) -> dict[str, float]:
        """Bytes that a device sends over the interconnect a step, by kind."""
        totals = collections.Counter()
        for one in self.collectives:
            totals[one.kind] += one.sent
        return {kind: totals[kind] for kind in COLLECTIVES if totals[kind]}


def cost(module: Module) -> Cost:
    """Every instruction of `module`, as often as it runs."""
    flops, hbm_bytes, kernels = 0.0, 0.0, 0
    for name, times in module.runs.items():
        computation, fused = module.computations[name], name in module.fused
        for one in computation.values():
            if one.opcode in ("dot", "convolution"):
                flops += times * _product_flops(one, computation)
            elif one.opcode == "custom-call" and (one.target == "tpu_custom_call" or one.target.startswith("__cudnn$")):
                of_kernel = _kernel_flops(one, computation)
                flops += times * (of_kernel or 0)
                kernels += of_kernel is None
            if not fused:
                hbm_bytes += times * _bytes(one, computation, module)
    collectives = tuple(_collectives(module))
    hbm_bytes += sum(one.times * one.hbm_bytes for one in collectives)
    return Cost(flops, hbm_bytes, collectives, kernels, module.unknown_loops)


def _collectives(module: Module) -> Iterator[Collective]:
    """Each once: a TPU's program may spread one over several fusions, which share its channel and origin."""
    found: dict[tuple[str, ...], Collective] = {}
    for name, times in module.runs.items():
        computation = module.computations[name]
        for one in computation.values():
            kind = one.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            users = [other for other in computation.values() if one.name in other.operands]
            if kind == "all-reduce" and users and all(user.opcode == "dynamic-slice" for user in users):
                kind = "reduce-scatter"
            operand_bytes = sum(a.bytes for operand in one.operands for a in computation[operand].arrays)
            group = _group_size(one.attributes)
            channel = re.search(r"channel_id=(\d+)", one.attributes)
            operation = re.search(r'op_name="([^"]*)"', one.attributes)
            origin = operation[1] if operation else ""
            spread = name in module.fused and channel is not None
            key = (kind, channel[1], origin) if spread else (name, one.name)
            if key not in found or found[key].times < times:
                moved = _in_hbm(one) + sum(_in_hbm(computation[operand]) for operand in one.operands)
                hbm_bytes = moved if name in module.fused and kind == "all-gather" else 0
                found[key] = Collective(kind, operand_bytes, group, times, origin, hbm_bytes)
    return iter(c for c in found.values() if c.group > 1)


def _bytes(one: Instruction, computation: dict[str, Instruction], module: Module) -> int:
    """Read from and written to HBM by an instruction."""
    if one.opcode in _FREE or one.target in _FREE_CALLS:
        return 0
    operands = [computation[name] for name in one.operands]
    written = _in_hbm(one)
    if one.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * written
    if one.opcode == "slice-start":  # its result is (operands, slice, context)
        result = one.arrays[len(operands)]
        return result.bytes * (2 if result.in_hbm else 1)
    if one.opcode == "copy-start":
        return _in_hbm(operands[0]) + (one.arrays[0].bytes if one.arrays[0].in_hbm else 0)
    if one.opcode == "dynamic-update-slice":
        return 2 * _in_hbm(operands[1])
    if one.opcode in ("fusion", "async-start"):
        return _fusion_bytes(one, operands, module)
    return written + sum(map(_in_hbm, operands))


def _fusion_bytes(one: Instruction, operands: list[Instruction], module: Module) -> int:
    """A fusion that reads only a slice of an operand, or updates only a slice of it in place, moves that slice.

    What it hands on as it is, it does not move. An all-gather inside is counted by itself, once for all its parts.
    """
    inside = module.computations[next(iter(one.called().values()))[0]]
    parameters = {int(i.literal): i for i in inside.values() if i.opcode == "parameter"}
    users = collections.defaultdict(list)
    for i in inside.values():
        for name in i.operands:
            users[name].append(i)

    def uses(name: str) -> Iterator[tuple[str, Instruction]]:
        for user in users[name]:
            if user.opcode in ("bitcast", "copy") and len(users[name]) == 1:
                yield from uses(user.name)
            else:
                yield name, user

    total = 0
    for number, operand in enumerate(operands):
        full, sliced = _in_hbm(operand), 0
        for name, user in uses(parameters[number].name):
            if user.opcode in ("tuple", "all-gather"):
                continue
            if user.opcode in ("dynamic-slice", "slice") and user.operands[0] == name:
                sliced += user.arrays[0].bytes
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                sliced = full
                break
        total += min(full, sliced)
    root = hlo.root(inside)
    results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for result, array in zip(results, one.arrays, strict=False):
        while result.opcode == "bitcast":
            result = inside[result.operands[0]]
        if result.opcode in ("parameter", "all-gather"):
            continue
        in_place = result.opcode == "dynamic-update-slice"
        size = inside[result.operands[1]].arrays[0].bytes if in_place else array.bytes
        total += size if array.in_hbm else 0
    return total


def _in_hbm(one: Instruction) -> int:
    return sum(a.bytes for a in one.arrays if a.in_hbm)


def _group_size(attributes: str) -> int:
    """Devices in each of `replica_groups`, in any of the three ways to write them; 2 for a sender and its receiver."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if "source_target_pairs=" in attributes:
        return 2
    raise ValueError(f"replica groups of an unknown form: {attributes[:200]}")


def _product_flops(one: Instruction, computation: dict[str, Instruction]) -> int:
    left, right = (computation[name].arrays[0].dims for name in one.operands[:2])
    out = one.arrays[0].dims
    if one.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)[1]
        return 2 * math.prod(out) * math.prod(left[int(d)] for d in contracted.split(",") if d)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    of_left, of_right, of_out = labels[1], labels[2], labels[3]
    groups = {name: int(n) for name, n in re.findall(r"(feature|batch)_group_count=(\d+)", one.attributes)}
    batch = left[of_left.index("b")] // groups.get("batch", 1)
    # The kernel's "i" is the input features of one group already.
    total = 2 * batch * right[of_right.index("i")] * right[of_right.index("o")]
    window = dict(re.findall(r"(\w+)=([\w\-]+)", re.search(r"window=\{([^}]*)\}", one.attributes + "window={}")[1]))
    for k in range(len(of_left) - 2):
        total *= _valid_positions(
            left[of_left.index(str(k))],
            right[of_right.index(str(k))],
            out[of_out.index(str(k))],
            *(int(window[n].split("x")[k]) if n in window else 1 for n in ("stride", "lhs_dilate", "rhs_dilate")),
            int(window["pad"].split("x")[k].split("_")[0]) if "pad" in window else 0,
        )
    return total


def _valid_positions(size: int, kernel: int, out: int, stride: int, base: int, dilation: int, pad: int) -> int:
    """How many (output, kernel) places of one spatial dimension meet an entry of the input, not padding or a hole."""
    count = 0
    for place in range(kernel):
        first = place * dilation - pad  # of output 0, in the dilated input
        count += sum(
            1
            for n in range(out)
            if 0 <= first + n * stride < (size - 1) * base + 1 and (first + n * stride) % base == 0
        )
    return count


def _kernel_flops(one: Instruction, computation: dict[str, Instruction]) -> int | None:
    """Of a Pallas kernel: its own estimate, or that of JAX's splash attention, which carries none; of cuDNN's
    attention; None: not known.

    Splash attention gets a map of its blocks [1,n,n], then q [...,T,h] and k; of the n x n blocks it skips those above
    the diagonal. It forms two products forward, three for the gradient of q, four for those of k and v, all five in one
    kernel, which then has one result more. cuDNN's goes by blocks of 128 queries and as many keys, and forms two
    products forward and five backward; the shape of its logits stands in its settings.
    """
    if one.target.startswith("__cudnn$fmha"):
        logits = re.search(r'"intermediate_tensor_shape":\{.*?"dimensions":\[([^\]]*)\]', _compact(one.attributes))
        dims = [int(n) for n in re.findall(r"\d+", logits[1])]
        head_dim = computation[one.operands[0]].arrays[0].dims[-1]
        blocks = -(-dims[-1] // 128) if '"mask_type":"CAUSAL"' in _compact(one.attributes) else 1
        products = 5 if "Backward" in one.target else 2
        return round(products * 2 * math.prod(dims) * head_dim * (blocks + 1) / (2 * blocks))
    if estimate := re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', one.attributes):
        return int(estimate[1])
    if not (name := re.match(r"splash_mha_(fwd|dq|dkv)_", one.name)):
        return None
    blocks, _, query, key = (computation[operand].arrays[0].dims for operand in one.operands[:4])
    products = {"fwd": 2, "dq": 3, "dkv": 4}[name[1]] + (name[1] == "dkv" and len(one.arrays) == 5)
    share = (blocks[-1] + 1) / (2 * blocks[-1])
    return round(products * 2 * math.prod(query) * key[-2] * share)


def _compact(attributes: str) -> str:
    """Without the spaces that one compiler writes into its settings and another does not."""
    return attributes.replace(": ", ":")
