"""Reads a compiled program: its FLOPs, bytes moved in memory, and collectives, each times the trips of its loops.

XLA's own `cost_analysis()` counts the body of a loop once, and a step is a loop over micro-batches with a loop over
layers inside. Here every computation of the optimised HLO text is counted as often as it runs. A conditional counts
each of its branches, so what it gives is an upper bound there.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_FREE = frozenset(
    {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
    | {"partition-id", "replica-id", "opt-barrier", "copy-done", "slice-done", "async-done", "async-update"}
)  # what moves no bytes itself; a *-done was counted at its start
_FREE_CALLS = frozenset({"AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone", "Sharding"})
_ARRAY = re.compile(r"\b(pred|token|opaque|[a-z]+(\d+)\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation)=")
_FREE_SPACES = re.compile(r"S\([1-9]\d*\)")  # memory spaces other than HBM: vector memory of a TPU, or the host's


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    bytes: int
    dims: tuple[int, ...]
    in_hbm: bool
    """False in another memory space: a TPU's vector memory, or the host's."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    """What stands in the parentheses: of a constant or parameter, its value or number."""
    attributes: str
    root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        return tuple(_arrays(self.shape))

    @property
    def target(self) -> str:
        """Of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self) -> dict[str, list[str]]:
        """The computations that it calls, by the attribute that names them."""
        found = {}
        for match in _CALLED.finditer(self.attributes):
            rest = self.attributes[match.end() :]
            names = rest[1 : rest.index("}")] if rest.startswith("{") else re.match(r"%?[\w.\-]+", rest)[0]
            found[match[1]] = [name.strip().lstrip("%") for name in names.split(",")]
        return found


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


class Module:
    """The computations of an optimised HLO module, by name; each is its instructions by name."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if line.startswith(("%", "ENTRY")) and line.endswith("{"):
                name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)[1]
                current = self.computations[name] = {}
                self.entry = name if line.startswith("ENTRY") else self.entry
            elif found := _HEAD.match(line):
                instruction = _instruction(line, found)
                current[instruction.name] = instruction

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """How often each reachable computation runs in a step."""
        return self._count()[0]

    @functools.cached_property
    def unknown_loops(self) -> int:
        return self._count()[1]

    def cost(self) -> Cost:
        flops, hbm_bytes, kernels = 0.0, 0.0, 0
        for name, times in self.runs.items():
            computation, fused = self.computations[name], name in self._fused
            for one in computation.values():
                if one.opcode in ("dot", "convolution"):
                    flops += times * _product_flops(one, computation)
                elif one.opcode == "custom-call" and one.target == "tpu_custom_call":
                    estimate = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', one.attributes)
                    flops += times * int(estimate[1]) if estimate else 0
                    kernels += estimate is None
                if not fused:
                    hbm_bytes += times * self._bytes(one, computation)
        return Cost(flops, hbm_bytes, tuple(self._collectives()), kernels, self.unknown_loops)

    def trips(self, loop: Instruction, computation: dict[str, Instruction]) -> int | None:
        """How often a `while` runs its body: what the compiler found, or read from `i < limit` and `i + step`."""
        if found := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return int(found[1])
        called = loop.called()
        condition, body = (self.computations[called[name][0]] for name in ("condition", "body"))
        root = _root(condition)
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        counter, limit = (condition[name] for name in root.operands)
        index = re.search(r"index=(\d+)", counter.attributes)
        if limit.opcode != "constant" or index is None:
            return None
        start = _element(loop.operands[0], int(index[1]), computation)
        step = self._added(_root(body).operands[int(index[1])], body)
        if start.opcode != "constant" or not step:
            return None
        return -((int(start.literal) - int(limit.literal)) // step)

    def _added(self, name: str, computation: dict[str, Instruction]) -> int | None:
        """What integer additions add to the one variable that they begin from; None if there is anything else."""
        one = computation[name]
        if one.opcode in ("get-tuple-element", "parameter"):
            return 0
        if one.opcode in ("copy", "bitcast"):
            return self._added(one.operands[0], computation)
        if one.opcode == "fusion":
            inside = self.computations[one.called()["calls"][0]]
            inner, outer = self._added(_root(inside).name, inside), 0
            for operand in one.operands:
                if computation[operand].opcode != "constant":
                    outer = self._added(operand, computation)
            return None if inner is None or outer is None else inner + outer
        if one.opcode != "add":
            return None
        parts = (computation[operand] for operand in one.operands)
        added = [int(p.literal) if p.opcode == "constant" else self._added(p.name, computation) for p in parts]
        return None if None in added else sum(added)

    def _count(self) -> tuple[dict[str, int], int]:
        runs, unknown = collections.Counter({self.entry: 1}), 0
        for name in self._callers_first():
            computation = self.computations[name]
            for one in computation.values():
                trips = self.trips(one, computation) if one.opcode == "while" else 1
                unknown += trips is None
                times = {"body": trips or 1, "condition": (trips or 1) + 1}
                for attribute, names in one.called().items():
                    if attribute == "to_apply" and one.opcode != "call":
                        continue  # what reduces or sorts two numbers
                    for callee in names:
                        runs[callee] += runs[name] * times.get(attribute, 1)
        return dict(runs), unknown

    def _callers_first(self) -> list[str]:
        """Reachable computations, each after all that call it."""
        order, seen = [], set()

        def visit(name: str) -> None:
            if name in seen:
                return
            seen.add(name)
            for one in self.computations[name].values():
                for names in one.called().values():
                    for callee in names:
                        visit(callee)
            order.append(name)

        visit(self.entry)
        return order[::-1]

    @functools.cached_property
    def _fused(self) -> set[str]:
        """Computations whose instructions move nothing by themselves: they are inside one that does."""
        inside = set()
        for name in self._callers_first():
            for one in self.computations[name].values():
                if name in inside or one.opcode in ("fusion", "async-start"):
                    inside.update(itertools.chain(*one.called().values()))
        return inside

    def _collectives(self) -> Iterator[Collective]:
        """Each once: a TPU's program may spread one over several fusions, which share its channel and origin."""
        found: dict[tuple[str, ...], Collective] = {}
        for name, times in self.runs.items():
            computation = self.computations[name]
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
                spread = name in self._fused and channel is not None
                key = (kind, channel[1], origin) if spread else (name, one.name)
                if key not in found or found[key].times < times:
                    found[key] = Collective(kind, operand_bytes, group, times, origin)
        return iter(c for c in found.values() if c.group > 1)

    def _bytes(self, one: Instruction, computation: dict[str, Instruction]) -> int:
        """Read from and written to HBM by an instruction."""
        if one.opcode in _FREE or one.target in _FREE_CALLS:
            return 0
        operands = [computation[name] for name in one.operands]
        written = _in_hbm(one)
        if one.opcode in ("dynamic-slice", "slice", "gather", "slice-start"):
            return written + (_in_hbm(one) if one.opcode != "slice-start" else 0)
        if one.opcode == "copy-start":
            return _in_hbm(operands[0]) + (one.arrays[0].bytes if one.arrays[0].in_hbm else 0)
        if one.opcode == "dynamic-update-slice":
            return 2 * _in_hbm(operands[1])
        if one.opcode in ("fusion", "async-start"):
            return self._fusion_bytes(one, operands)
        return written + sum(map(_in_hbm, operands))

    def _fusion_bytes(self, one: Instruction, operands: list[Instruction]) -> int:
        """A fusion that reads only a slice of an operand, or updates only a slice of it in place, moves that slice."""
        inside = self.computations[next(iter(one.called().values()))[0]]
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
                if user.opcode in ("dynamic-slice", "slice") and user.operands[0] == name:
                    sliced += user.arrays[0].bytes
                elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                    sliced = full
                    break
            total += min(full, sliced)
        root = _root(inside)
        results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
        for result, array in zip(results, one.arrays, strict=False):
            while result.opcode == "bitcast":
                result = inside[result.operands[0]]
            in_place = result.opcode == "dynamic-update-slice"
            size = inside[result.operands[1]].arrays[0].bytes if in_place else array.bytes
            total += size if array.in_hbm else 0
        return total


def _instruction(line: str, head: re.Match) -> Instruction:
    """`%name = shape opcode(operands), attributes`."""
    start = head.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    opened = line.index("(", end)
    closed = _closing(line, opened)
    inside = line[opened + 1 : closed]
    return Instruction(
        name=head[2],
        shape=line[start:end],
        opcode=line[end:opened].strip(),
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        literal=inside,
        attributes=line[closed + 1 :],
        root=head[1] is not None,
    )


def _closing(line: str, opened: int) -> int:
    depth = 0
    for match in re.compile(r"[()]").finditer(line, opened):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"unbalanced parentheses: {line[:200]}")


def _arrays(shape: str) -> Iterator[Array]:
    for kind, bits, dims, layout in _ARRAY.findall(shape):
        sizes = tuple(int(d) for d in dims.split(",") if d)
        width = {"pred": 8, "token": 0, "opaque": 0}.get(kind) if not bits else int(bits)
        yield Array(math.prod(sizes) * width // 8, sizes, not _FREE_SPACES.search(layout))


def _root(computation: dict[str, Instruction]) -> Instruction:
    return next(one for one in computation.values() if one.root)


def _in_hbm(one: Instruction) -> int:
    return sum(a.bytes for a in one.arrays if a.in_hbm)


def _element(name: str, index: int, computation: dict[str, Instruction]) -> Instruction:
    """What is at `index` of a tuple, looked up through copies."""
    one = computation[name]
    one = computation[one.operands[index]] if one.opcode == "tuple" else one
    while one.opcode in ("copy", "copy-done", "copy-start") and one.operands:
        one = computation[one.operands[0]]
    return one


def _group_size(attributes: str) -> int:
    """Devices in each of `replica_groups`, in any of the three ways to write them; 2 for a sender and its receiver."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
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
