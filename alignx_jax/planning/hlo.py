"""Reads the text of a compiled program: its computations, and how often each of them runs.

XLA's own `cost_analysis()` counts the body of a loop once, and a step is a loop over micro-batches with a loop over
layers inside. A conditional counts each of its branches, so that what is counted by `runs` is an upper bound there.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator

_ARRAY = re.compile(r"\b(pred|token|opaque|[a-z]+(\d+)\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation)=")
_OTHER_SPACES = re.compile(r"S\([1-9]\d*\)")  # than HBM: vector memory of a TPU, or the host's


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


class Module:
    """The computations of an optimised HLO module, by name; each is its instructions by name."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in re.sub(r"\n(?! |%|ENTRY|}\n|}$)", "", text).splitlines():  # attributes may go over several
            if line.startswith(("%", "ENTRY")) and line.endswith("{"):
                name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)[1]
                current = self.computations[name] = {}
                self.entry = name if line.startswith("ENTRY") else self.entry
            elif found := _HEAD.match(line):
                instruction = _instruction(line, found)
                current[instruction.name] = instruction

    @property
    def runs(self) -> dict[str, int]:
        """How often each reachable computation runs in a step."""
        return self._counted[0]

    @property
    def unknown_loops(self) -> int:
        return self._counted[1]

    def trips(self, loop: Instruction, computation: dict[str, Instruction]) -> int | None:
        """How often a `while` runs its body: what the compiler found, or read from `i < limit` and `i + step`."""
        if found := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return int(found[1])
        called = loop.called()
        condition, body = (self.computations[called[name][0]] for name in ("condition", "body"))
        last = root(condition)
        if last.opcode != "compare" or "direction=LT" not in last.attributes:
            return None
        counter, limit = (condition[name] for name in last.operands)
        index = re.search(r"index=(\d+)", counter.attributes)
        if limit.opcode != "constant" or index is None:
            return None
        start = _element(loop.operands[0], int(index[1]), computation)
        step = self._added(root(body).operands[int(index[1])], body)
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
            inner, outer = self._added(root(inside).name, inside), 0
            for operand in one.operands:
                if computation[operand].opcode != "constant":
                    outer = self._added(operand, computation)
            return None if inner is None or outer is None else inner + outer
        if one.opcode != "add":
            return None
        parts = (computation[operand] for operand in one.operands)
        added = [int(p.literal) if p.opcode == "constant" else self._added(p.name, computation) for p in parts]
        return None if None in added else sum(added)

    @functools.cached_property
    def _counted(self) -> tuple[dict[str, int], int]:
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
    def fused(self) -> set[str]:
        """Computations whose instructions move nothing by themselves: they are inside one that does."""
        inside = set()
        for name in self._callers_first():
            for one in self.computations[name].values():
                if name in inside or one.opcode in ("fusion", "async-start"):
                    inside.update(itertools.chain(*one.called().values()))
        return inside


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
        yield Array(math.prod(sizes) * width // 8, sizes, not _OTHER_SPACES.search(layout))


def root(computation: dict[str, Instruction]) -> Instruction:
    return next(one for one in computation.values() if one.root)


def _element(name: str, index: int, computation: dict[str, Instruction]) -> Instruction:
    """What is at `index` of a tuple, looked up through copies."""
    one = computation[name]
    one = computation[one.operands[index]] if one.opcode == "tuple" else one
    while one.opcode in ("copy", "copy-done", "copy-start") and one.operands:
        one = computation[one.operands[0]]
    return one
