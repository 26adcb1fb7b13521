"""Our stage-1 step beside the published one in plain PyTorch: useful tokens a second and peak memory, as ratios.

python -m benchmarks.step --parallel PATH... --tokenizer FOLDER [--rows 16] [--rounds 3] [--sides SIDE...] [--save FILE]

With other sides the first is what the ratios are to: `--sides unpacked packed` is what packing gives on real lengths,
`--sides plain packed` what the alignment losses cost over the next-token loss alone. `--hidden-size 768 --layers 12
--heads 12` has about 110 M parameters with Llama 2's tokenizer.

Both sides take the same random Llama, the same classifier, the same real sentences in the same optimizer steps
(forward, backward, clipping, AdamW), float32, the same cores. The baseline (torch_reference.py) pads micro-batches of
at most 16 examples, as published. Ours takes the rows that the training plan packs them into, `ROWS` a micro-batch.
Every measurement is a fresh process: one step to warm up (and compile), then two that are timed; the sides take turns,
so that what else the machine does hits both. First the losses of 16 examples are compared: the two have to compute
the same. Useful tokens are those that are no padding, the same on both sides.

Each process also times a matrix product of 2,048 x 2,048 x 2,048, the speed that bounds its side. GFLOP/s of a side are
6 x parameters x places (padding too) / time: attention's products and what is computed again are not counted.
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
from typing import Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.record import spread

SIDES = {
    "torch": "PyTorch, padded (published)",
    "unpacked": "ours, one example a row",
    "packed": "ours, packed",
    "plain": "ours, packed, next-token loss alone",
}
MICRO_BATCH = 16
"""Examples, of the published step and of one example a row."""
ROWS, WIDTH, SLOTS = 4, 512, 16
"""Of a packed micro-batch: rows, tokens a row, most examples a row."""
TIMED = 2


@dataclasses.dataclass(frozen=True)
class Options:
    parallel: tuple[str, ...]
    """Parallel text, as for `--data.parallel` of run.py."""
    tokenizer: str
    """Folder with a tokenizer."""
    rows: int = 16
    """Packed rows an optimizer step, a multiple of 4."""
    rounds: int = 3
    """Measurements of each side."""
    hidden_size: int = 256
    layers: int = 8
    heads: int = 4
    sides: tuple[Literal["torch", "unpacked", "packed", "plain"], ...] = ("torch", "unpacked", "packed")
    save: str | None = None
    """JSON file to write."""


def prepare(options: Options, work: pathlib.Path) -> None:
    """The model, the classifier and the rows of each round's steps, in `work`."""
    import jax
    from flax import nnx

    from alignx_jax.config import DataConfig
    from alignx_jax.data import corpora, examples, packing, prompts, tokenizer
    from alignx_jax.training import state
    from benchmarks import random_llama

    jax.config.update("jax_platforms", "cpu")
    make = random_llama.Options(
        pathlib.Path(options.tokenizer), work / "model", options.hidden_size, options.layers, options.heads
    )
    count = random_llama.make(make)
    classifier = state.PairClassifier(options.hidden_size, 128, rngs=nnx.Rngs(0))
    np.savez(work / "classifier.npz", **{k: np.asarray(getattr(classifier, k)) for k in ("gate", "up", "down")})
    settings, rng, pool = DataConfig(), np.random.default_rng(0), []
    for source in options.parallel:
        corpus = corpora.prepare("parallel", source, pathlib.Path(settings.cache), "stop")
        encoded = examples.encode(corpus, tokenizer.load(options.tokenizer), prompts.load("alpaca"), settings)
        for entry in encoded.index[rng.choice(len(encoded.index), packing.WINDOW // len(options.parallel))]:
            tokens = encoded.tokens[entry["start"] : entry["start"] + entry["length"]]
            languages = [encoded.languages[entry[k]] for k in ("source_language", "target_language")]
            spans = [int(entry[k]) for k in ("source_start", "source_end", "target_start", "target_end")]
            pool.append({"tokens": tokens.tolist(), "spans": spans, "languages": languages})
    codes = sorted({code for example in pool for code in example["languages"]})
    for example in pool:
        example["languages"] = [codes.index(code) for code in example["languages"]]
    lengths = np.array([len(example["tokens"]) for example in pool])
    plan = packing.plan(lengths, WIDTH, SLOTS, rng.permutation(len(pool)), seed=[0])
    rows = [[pool[n] for n in plan[row]] for row in range((1 + TIMED) * options.rounds * options.rows)]
    steps = [rows[n : n + options.rows] for n in range(0, len(rows), options.rows)]
    (work / "steps.json").write_text(json.dumps(steps))
    (work / "facts.json").write_text(json.dumps({"parameters": count, "languages": codes}))


def run_torch(work: pathlib.Path, layers: int, steps: list[list[list[dict]]], check: bool) -> dict:
    """Times all `steps` but the first; or, to check, the losses of the first examples with BOS no label."""
    import torch

    from benchmarks import torch_reference as published

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = published.AlignXTorch(work / "model", layers // 2)
    kernels = np.load(work / "classifier.npz")
    for name in ("gate", "up", "down"):
        getattr(model.language_matching_classifier, f"{name}_proj").weight.data = torch.tensor(kernels[name].T.copy())
    optimizer, scheduler = published.optimizer_and_schedule(model, 1e-4, 2, 100)

    def batch(examples: list[dict]) -> dict:
        rows = []
        for e in examples:
            index = np.zeros(len(e["tokens"]), int)
            index[e["spans"][0] : e["spans"][1]], index[e["spans"][2] : e["spans"][3]] = 1, 2
            languages = dict(zip(("src_lang", "tgt_lang"), e["languages"], strict=True))
            rows.append({"input_ids": e["tokens"], "src_tgt_index": index.tolist(), **languages})
        return published.collate(rows, 0)

    steps = [mixed(step) for step in steps]
    if check:
        first = batch(steps[0][:MICRO_BATCH])
        first["labels"][torch.arange(MICRO_BATCH), first["attention_mask"].argmax(dim=1)] = published.IGNORED
        with torch.no_grad():
            return {k: float(v) for k, v in model(first).items()}
    micro_batches = [[batch(part) for part in np.array_split(s, -(-len(s) // MICRO_BATCH))] for s in steps]
    places = sum(b["input_ids"].numel() for step in micro_batches[1:] for b in step)

    def once(batches) -> None:
        float(published.train_step(model, optimizer, scheduler, batches)["grad_norm"])

    found = timed(once, micro_batches) | {"places": places}
    a = torch.rand(2048, 2048)
    return found | {"peak_gflops": matmul_gflops(lambda: (a @ a)[0, 0].item())}


def mixed(step: list[list[dict]]) -> list[dict]:
    """The examples of a step's rows, in random order."""
    examples = [example for row in step for example in row]
    return [examples[n] for n in np.random.default_rng(0).permutation(len(examples))]


def run_ours(work: pathlib.Path, layers: int, steps: list[list[list[dict]]], check: bool, side: str) -> dict:
    """The same with our step."""
    import jax
    import jax.numpy as jnp

    from alignx_jax import sharding
    from alignx_jax.config import ContrastiveConfig, LanguageMatchingConfig, ObjectiveConfig, OptimizerConfig
    from alignx_jax.data import packing
    from alignx_jax.models import huggingface
    from alignx_jax.training import optimizer, state
    from alignx_jax.training import step as training

    jax.config.update("jax_platforms", "cpu")
    width, slots, micro_rows = WIDTH, SLOTS, ROWS
    if check:
        steps = [[[example] for example in mixed(steps[0])[:MICRO_BATCH]]]
    if side == "unpacked":
        steps = [[[example] for row in step for example in row] for step in steps]
        width = -(-max(len(e["tokens"]) for step in steps for (e,) in step) // 8) * 8
        slots, micro_rows = 1, MICRO_BATCH
    micro_batches = -(-max(map(len, steps)) // micro_rows)
    rows = micro_batches * micro_rows

    def pack(e: dict) -> packing.PackedExample:
        a, b, c, d = e["spans"]
        tokens, labels = np.array(e["tokens"]), np.ones(len(e["tokens"]), bool)
        return packing.PackedExample(tokens, labels, (a, b), (c, d), tuple(e["languages"]), (0, 0, 0))

    def batch(step: list[list[dict]]):
        made = [packing.assemble([pack(e) for e in row], width, slots) for row in step + [[]] * (rows - len(step))]
        return jax.tree.map(lambda *x: np.stack(x), *made)

    batches = [batch(step) for step in steps]
    mesh = sharding.make_mesh("1x1")
    with jax.set_mesh(mesh):
        model = state.build(huggingface.load(work / "model", mesh), 128, seed=0)
        kernels = np.load(work / "classifier.npz")
        for name in ("gate", "up", "down"):
            getattr(model.classifier, name).set_value(jnp.asarray(kernels[name]))
        objective = ObjectiveConfig(duplicates="keep")
        if side == "plain":
            objective = ObjectiveConfig(ContrastiveConfig(weight=0.0), LanguageMatchingConfig(weight=0.0))
        recipe = training.Recipe(
            objective=objective,
            contrastive_layer=layers // 2,
            matching_layer=layers,
            pairs=True,
            groups=1,
            group_pairs=micro_rows * slots,
            accumulation=micro_batches,
            compute_dtype=jnp.dtype("float32"),
            remat="attention",
        )
        graph, params, _ = state.split(model)
        if check:
            recipe = dataclasses.replace(recipe, accumulation=1, group_pairs=rows * slots)
            _, losses = jax.jit(functools.partial(training.gradients, graph=graph, recipe=recipe))(params, batches[0])
            return {k: float(losses[k]) for k in ("loss", "next_token", "contrastive", "language_matching")}
        settings = OptimizerConfig(learning_rate=1e-4, warmup_steps=2)
        now = [state.create(params, optimizer.build(settings, 100), mesh)]
        update = training.compiled_for(now[0], graph=graph, recipe=recipe, config=settings)

        def once(rows) -> None:
            now[0], metrics = update(now[0], jax.tree.map(lambda x: sharding.place_rows(x, mesh), rows), 100)
            float(metrics["gradient_norm"])

        found = timed(once, batches) | {"places": rows * width * TIMED}
        a = jax.random.uniform(jax.random.key(0), (2048, 2048))
        product = jax.jit(jnp.matmul)
        return found | {"peak_gflops": matmul_gflops(lambda: product(a, a).block_until_ready())}


def timed(once, batches: list) -> dict:
    """Warms up on the first batch, times the others; memory from before the first step to the peak."""
    before, start = memory("VmRSS"), time.perf_counter()
    once(batches[0])
    warm = time.perf_counter()
    for batch in batches[1:]:
        once(batch)
    end = time.perf_counter()
    peak = memory("VmHWM")
    return {"seconds": end - warm, "warm_up": warm - start, "peak_mib": peak, "grown_mib": peak - before}


def matmul_gflops(product) -> float:
    """The best of ten."""
    times = []
    for _ in range(10):
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times) / 1e9


def memory(field: str) -> float:
    """MiB, of Linux. getrusage would count the parent's peak too."""
    line = next(x for x in pathlib.Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


def work(folder: str, side: str, layers: int, number: int) -> None:
    """A measuring process: prints its figures as JSON. Round -1 is the check."""
    everything = json.loads((pathlib.Path(folder) / "steps.json").read_text())
    steps = everything[max(number, 0) * (1 + TIMED) :][: 1 + TIMED]
    arguments = pathlib.Path(folder), layers, steps, number < 0
    found = run_torch(*arguments) if side == "torch" else run_ours(*arguments, side)
    useful = sum(len(e["tokens"]) for step in steps[1:] for row in step for e in row)
    print(json.dumps(found | {"useful": useful}))


def measure(folder: str, side: str, options: Options, number: int) -> dict:
    arguments = [folder, side, str(options.layers), str(number)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.step", "--work", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main(options: Options) -> None:
    console = Console(width=140)
    with tempfile.TemporaryDirectory() as folder:
        prepare(options, pathlib.Path(folder))
        facts = json.loads((pathlib.Path(folder) / "facts.json").read_text())
        theirs, ours = (measure(folder, side, options, -1) for side in ("torch", "packed"))
        for name in ("next_token", "contrastive", "language_matching"):
            console.print(f"{name}: PyTorch {theirs[name]:.6f}, ours {ours[name]:.6f}", highlight=False)
            if abs(theirs[name] - ours[name]) > 1e-4 * abs(theirs[name]):
                sys.exit(f"{name} differs: the two sides do not compute the same")
        rounds = []
        for number in range(options.rounds):
            rounds.append({side: measure(folder, side, options, number) for side in options.sides})
            console.print(f"round {number + 1} of {options.rounds}", highlight=False)
    table = Table(title=f"optimizer steps of {options.rows} packed rows, {facts['parameters'] / 1e6:.1f} M parameters")
    for name in ("", "useful tokens/s", "ratio", "peak MiB", "ratio", "padding", "GFLOP/s", "of matmul"):
        table.add_column(name, justify="right" if name else "left")
    base = options.sides[0]
    for side in options.sides:
        speed = [r[side]["useful"] / r[side]["seconds"] for r in rounds]
        faster = [r[base]["seconds"] / r[side]["seconds"] for r in rounds]
        memory = [r[side]["grown_mib"] for r in rounds]
        smaller = [r[base]["grown_mib"] / r[side]["grown_mib"] for r in rounds]
        padding = [1 - r[side]["useful"] / r[side]["places"] for r in rounds]
        rate = [6e-9 * facts["parameters"] * r[side]["places"] / r[side]["seconds"] for r in rounds]
        share = [x / r[side]["peak_gflops"] for x, r in zip(rate, rounds, strict=True)]
        columns = spread(speed, 0), spread(faster, 2), spread(memory, 0), spread(smaller, 2)
        of_peak = f"{statistics.median(padding):.0%}", spread(rate, 0), f"{statistics.median(share):.0%}"
        table.add_row(SIDES[side], *columns, *of_peak)
    console.print(table)
    console.print(f"median (range) of {options.rounds} rounds")
    record.save(options.save, "step", options, facts | {"rounds": rounds}, console)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], sys.argv[3], *map(int, sys.argv[4:]))
    else:
        main(tyro.cli(Options))
