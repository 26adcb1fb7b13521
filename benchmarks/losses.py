"""The two pair losses by themselves, forward and backward: ours beside two forms in PyTorch, in seconds and memory.

python -m benchmarks.losses [--pairs 16 64 128 256 1024 4096] [--hidden-size 4096] [--rounds 3] [--save FILE]

`published` is the form of torch_reference.py: every pair's vectors side by side. `factored` is the best that PyTorch
writes in a few lines: one product of unit vectors; W [e_i; e_j] = W[:D] e_i + W[D:] e_j, broadcast sums. All get the
same random sentences of ten languages in float32 and the same cores, and give the loss and its gradients by the
sentences and the classifier. Every measurement is a fresh process, one run to warm up (and compile) and the median of
some more; the sides take turns. Memory is the growth of the process from before the first run to its peak. A form whose
estimate is above `--memory` is not run.

First, at the smallest size, the losses and gradients of all forms are compared, and ours on two simulated devices.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import types

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.step import memory

LOSSES = ("contrastive", "language_matching")
SIDES = {"published": "PyTorch, published", "factored": "PyTorch, factored", "ours": "ours"}
SECONDS, RUNS = 1.0, 2
"""A process times runs for so long, and so many at least; it gives their median."""
TEMPERATURE = 0.1


@dataclasses.dataclass(frozen=True)
class Options:
    pairs: tuple[int, ...] = (16, 64, 128, 256, 1024, 4096)
    """Sizes; the first is the one that is checked."""
    hidden_size: int = 4096
    width: int = 128
    """Of the pair classifier."""
    rounds: int = 3
    """Measurements of each side; one of sizes above 256 pairs."""
    memory: float | None = None
    """GiB that a form may need; unset: half of what is free."""
    save: str | None = None
    """JSON file to write."""


def estimate(loss: str, side: str, pairs: int, hidden_size: int, width: int) -> float:
    """GiB: how many arrays of all pairs a form holds at its peak, by what was seen at sizes that fit; 0 of ours."""
    n = pairs if loss == "contrastive" else 2 * pairs
    elements = {
        ("contrastive", "published"): 4 * n * n * hidden_size,
        ("contrastive", "factored"): 3 * n * n,
        ("language_matching", "published"): 3 * n * n * 2 * hidden_size,
        ("language_matching", "factored"): 7 * n * n * width,
    }
    return 4 * elements.get((loss, side), 0) / 2**30


def inputs(pairs: int, hidden_size: int, width: int) -> dict[str, np.ndarray]:
    """Sources, then targets [2n,D], their languages, and a classifier as it is initialised."""
    rng = np.random.default_rng(0)
    shapes = {"gate": (2 * hidden_size, width), "up": (2 * hidden_size, width), "down": (width, 2)}
    return {
        "embedding": rng.normal(size=(2 * pairs, hidden_size)).astype(np.float32),
        "languages": rng.integers(0, 10, 2 * pairs),
        **{k: rng.normal(scale=0.02, size=shape).astype(np.float32) for k, shape in shapes.items()},
    }


def torch_form(loss: str, side: str, given: dict[str, np.ndarray]):
    """A function that gives the loss and its gradients by the sentences, and by gate, up and down if they have any."""
    import torch
    import torch.nn.functional as F

    from benchmarks import torch_reference as published

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    n, d, width = len(given["embedding"]) // 2, given["embedding"].shape[1], given["down"].shape[0]
    source, target = (torch.tensor(x, requires_grad=True) for x in np.split(given["embedding"], 2))
    languages = torch.tensor(given["languages"])
    classifier = published.LanguageMatchingClassifier(d, width, "silu")
    names = ("gate", "up", "down")
    kernels = [getattr(classifier, f"{k}_proj").weight for k in names]  # [W,2D], [W,2D], [2,W]
    for name, kernel in zip(names, kernels, strict=True):
        kernel.data = torch.tensor(given[name].T.copy())
    holder = types.SimpleNamespace(language_matching_classifier=classifier)
    index = torch.tensor([[published.SOURCE, published.TARGET]]).expand(n, -1)

    def contrastive():
        if side == "published":
            return published.contrastive_loss(torch.stack([source, target], dim=1), index, TEMPERATURE)
        cosine = F.normalize(source, dim=1, eps=1e-8) @ F.normalize(target, dim=1, eps=1e-8).T
        return F.cross_entropy(cosine / TEMPERATURE, torch.arange(n)) / 2

    def language_matching():
        if side == "published":
            hidden = torch.stack([source, target], dim=1)
            return published.AlignXTorch.language_matching_loss(holder, hidden, index, languages)
        embedding = torch.cat([source, target])
        gate, up = (
            (embedding @ k[:, :d].T)[:, None] + (embedding @ k[:, d:].T)[None] for k in (kernels[0], kernels[1])
        )
        same = (languages[:, None] == languages).long()
        return F.cross_entropy((F.silu(gate) * up @ kernels[2].T).flatten(0, 1), same.flatten())

    form = contrastive if loss == "contrastive" else language_matching
    wanted = [source, target] + (kernels if loss == "language_matching" else [])

    def run() -> list[torch.Tensor]:
        value = form()
        of_source, of_target, *of_kernels = torch.autograd.grad(value, wanted)
        return [value.detach(), of_source, of_target, *(g.T for g in of_kernels)]

    return run


def our_form(loss: str, devices: int, given: dict[str, np.ndarray]):
    """The same of ours, over a mesh of `devices`."""
    import jax
    import jax.numpy as jnp

    from alignx_jax import sharding
    from alignx_jax.objectives.contrastive import contrastive
    from alignx_jax.objectives.language_matching import Classifier, language_matching

    jax.config.update("jax_platforms", "cpu")
    sharding.prepare_devices(f"{devices}x1")
    mesh = sharding.make_mesh(f"{devices}x1")

    def in_groups(x_2n___: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Of sources and of targets, [G,n/G,...]."""
        grouped = x_2n___.reshape(2, devices, -1, *x_2n___.shape[1:])
        return tuple(sharding.place_rows(x, mesh) for x in grouped)

    numbers = np.arange(len(given["languages"]))
    facts = {k: in_groups(x) for k, x in {"languages": given["languages"], "hashes": numbers}.items()}
    valid = sharding.place_rows(np.ones((devices, len(numbers) // 2 // devices), bool), mesh)

    def matching(embedding, classifier):
        both = functools.partial(jnp.concatenate, axis=1)
        total = language_matching(
            both(embedding),
            both(facts["languages"]),
            both([valid, valid]),
            Classifier(*classifier),
            activation=jax.nn.silu,
            scope="global",
        )
        return total / len(numbers) ** 2

    def aligning(embedding, classifier):
        how = dict(temperature=TEMPERATURE, form="published", scope="global", duplicates="keep")
        return contrastive(*embedding, valid, *facts["hashes"], **how) / (len(numbers) // 2)

    wanted = (0, 1) if loss == "language_matching" else (0,)
    form = jax.jit(jax.value_and_grad(matching if loss == "language_matching" else aligning, wanted))
    arguments = in_groups(given["embedding"]), tuple(jnp.asarray(given[k]) for k in ("gate", "up", "down"))

    def run() -> list[jax.Array]:
        with jax.set_mesh(mesh):
            return jax.tree.leaves(jax.block_until_ready(form(*arguments)))

    return run


def work(loss: str, side: str, pairs: int, hidden_size: int, width: int, to: str) -> None:
    """A measuring process: prints its figures as JSON; with a file to write, what it computes instead."""
    given = inputs(pairs, hidden_size, width)
    if side in ("published", "factored"):
        run = torch_form(loss, side, given)
    else:
        run = our_form(loss, 1 if side == "ours" else int(side), given)
    if to:
        value, of_source, of_target, *of_classifier = (np.asarray(x) for x in run())
        of_vectors = [x.reshape(pairs, hidden_size) for x in (of_source, of_target)]
        np.savez(to, value, *of_vectors, *of_classifier)
    else:
        before, seconds = memory("VmRSS"), []
        run()
        while len(seconds) < RUNS or sum(seconds) < SECONDS:
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        grown = memory("VmHWM") - before
        print(json.dumps({"seconds": statistics.median(seconds), "runs": len(seconds), "grown_mib": grown}))


def measure(*arguments: object, to: str = "") -> dict | None:
    command = [sys.executable, "-m", "benchmarks.losses", "--work", *map(str, arguments), to]
    # Threads of PyTorch that wait must not spin: on a busy machine its small products took 10 to 20 times as long.
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return None if to else json.loads(done.stdout.splitlines()[-1])


def check(loss: str, pairs: int, options: Options) -> dict[str, float]:
    """The largest relative difference of any form's loss or gradients from ours on one device.

    Raises:
      SystemExit: one is above 1e-4: the forms do not compute the same.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for side in (*SIDES, "2"):
            file = f"{folder}/{side}.npz"
            measure(loss, side, pairs, options.hidden_size, options.width, to=file)
            found[side] = list(np.load(file).values())
    expected = found.pop("ours")
    differences = {}
    for side, arrays in found.items():
        parts = (np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(arrays, expected, strict=True))
        differences["two devices" if side == "2" else side] = float(max(parts))
    if max(differences.values()) > 1e-4:
        sys.exit(f"{loss}: the forms do not compute the same: {differences}")
    return differences


def free_memory() -> float:
    """GiB, of Linux."""
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    return int(next(x for x in lines if x.startswith("MemAvailable")).split()[1]) / 2**20


def main(options: Options) -> None:
    console, limit = Console(width=140), options.memory or free_memory() / 2
    options = dataclasses.replace(options, memory=round(limit, 1))
    differences, results = {}, []
    for loss in LOSSES:
        found = differences[loss] = check(loss, options.pairs[0], options)
        parts = ", ".join(f"{side} {value:.1e}" for side, value in found.items())
        console.print(f"{loss}: relative difference from ours on one device: {parts}", highlight=False)
    for loss in LOSSES:
        table = Table(title=f"{loss}, hidden {options.hidden_size}, forward and backward: median (range)")
        for name in ("pairs", "", "seconds", "ours is faster by", "peak MiB"):
            table.add_column(name, justify="left" if not name else "right")
        for pairs in options.pairs:
            sizes = pairs, options.hidden_size, options.width
            needs = {side: estimate(loss, side, *sizes) for side in SIDES}
            run = [side for side in SIDES if needs[side] <= limit]
            rounds = [
                {side: measure(loss, side, *sizes) for side in run}
                for _ in range(options.rounds if pairs <= 256 else 1)
            ]
            result = {"loss": loss, "pairs": pairs, "sides": {}}
            for side, name in SIDES.items():
                if side not in run:
                    result["sides"][side] = {"not run: GiB needed": round(needs[side], 1)}
                    table.add_row(str(pairs), name, f"not run: about {needs[side]:,.0f} GiB", "", "")
                    continue
                seconds = [r[side]["seconds"] for r in rounds]
                slower = [r[side]["seconds"] / r["ours"]["seconds"] for r in rounds]
                grown = [r[side]["grown_mib"] for r in rounds]
                result["sides"][side] = {
                    "seconds": seconds,
                    "ratio to ours": statistics.median(slower),
                    "grown MiB": grown,
                }
                faster = "" if side == "ours" else record.spread(slower, 2)
                table.add_row(str(pairs), name, record.spread(seconds, 4), faster, record.spread(grown, 0))
            results.append(result)
            table.add_section()
        console.print(table)
    record.save(options.save, "losses", options, {"differences": differences, "results": results}, console)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        loss, side, *sizes, to = sys.argv[2:]
        work(loss, side, *map(int, sizes), to)
    else:
        main(tyro.cli(Options))
