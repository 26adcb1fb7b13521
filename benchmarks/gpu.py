"""Stage 1 at the shapes of a real model on one accelerator, random weights: tokens/s, MFU, memory, time to first step.

python -m benchmarks.gpu [--rows 24] [--sides ours torch] [--save FILE]         # one H100 or H200 of 80 GB or more

The defaults are the recipe of configs/llama3_8b_one_h100.py: Llama 3 8B, float32 weights, Adafactor, bfloat16 compute,
24 rows of 512 tokens, every row full. Beside it the published step in PyTorch and transformers (torch_reference.py) on
the same number of tokens, one example of 512 tokens a row, in micro-batches of `--micro-rows`: bfloat16 weights and
torch's Adafactor, for float32 ones with AdamW do not fit, sdpa attention, gradient checkpointing. Each side is a fresh
process: `first step` is from its start to the end of its first step, with compilation; then `--steps` steps are timed.

MFU = rows x T x (6 N + 12 L H h T c) / (seconds x peak): N weights of matrix products without the embedding table, L
layers, H heads of size h, c = 1/2 with causal halving, else 1 (docs/plan.md). The peak is the chip's data sheet's.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import record

NAMES = {"ours": "ours", "torch": "PyTorch, transformers (published)"}


@dataclasses.dataclass(frozen=True)
class Options:
    shapes: str = "configs/shapes/llama3_8b"
    """Folder with a config.json."""
    rows: int = 24
    row_length: int = 512
    pairs: int = 5
    """Pairs in a row of ours: examples of about 100 tokens, as real ones have."""
    micro_rows: int = 8
    """Rows of a micro-batch of PyTorch."""
    optimizer: Literal["adafactor", "adamw"] = "adafactor"
    remat: Literal["none", "attention", "block", "offload"] = "block"
    steps: int = 10
    sides: tuple[Literal["ours", "torch"], ...] = ("ours", "torch")
    platform: Literal["cuda", "tpu", "cpu"] = "cuda"
    save: str | None = None
    """JSON file to write."""


def run_ours(options: Options) -> dict:
    started = time.perf_counter()
    from alignx_jax.planning import xla_flags

    xla_flags.apply()
    import jax

    from alignx_jax import sharding
    from alignx_jax.config import Config, DataConfig, OptimizerConfig, TrainingConfig
    from alignx_jax.planning import chips
    from alignx_jax.runs import loading
    from alignx_jax.training import build
    from benchmarks import synthetic

    jax.config.update("jax_platforms", options.platform)
    decoder = loading.find(options.shapes).decoder_config()
    config = Config(
        data=DataConfig(cutoff=options.row_length, row_length=options.row_length, examples_per_row=options.pairs),
        optimizer=OptimizerConfig(kind=options.optimizer),
        training=TrainingConfig(rows=options.rows, steps=1000, remat=options.remat),
    )
    mesh = sharding.make_mesh(config.mesh)
    device, seconds = mesh.devices.flat[0], []
    with jax.set_mesh(mesh):
        job = synthetic.job(config, decoder, mesh, options.pairs)
        begun = time.perf_counter()
        update = job.compile()
        compiled = time.perf_counter() - begun
        now, start = job.state(), None
        for number, batch in enumerate(synthetic.batches(config, decoder.vocab_size, options.pairs)):
            placed = job.place(batch)
            start = time.perf_counter()
            now, metrics = update(now, placed)
            loss = float(metrics["loss"])
            seconds.append(time.perf_counter() - start)
            if number == 0:
                first = time.perf_counter() - started
            if number == options.steps:
                break
    chip, rows = chips.of_device(device.device_kind), (options.rows, options.row_length)
    flops = {c: chips.model_flops(decoder, *rows, causal=c) for c in (True, False)}
    return {
        "device": device.device_kind,
        "attention": build.attention_kernel(config, decoder, mesh).kernel,
        "flags": xla_flags.shown(device.platform),
        "first step": first,
        "compiled in": compiled,
        "seconds": seconds[1:],
        "peak GiB": (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30,
        "loss": loss,
        "peak": chip.flops if chip else None,
        "model flops": flops[True],
        "model flops without causal halving": flops[False],
    }


def run_torch(options: Options) -> dict:
    started = time.perf_counter()
    import numpy as np
    import torch
    from transformers import AutoConfig

    from benchmarks import torch_reference as published

    on_gpu = options.platform == "cuda"
    device, dtype = torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16
    shapes = AutoConfig.from_pretrained(options.shapes)
    with device:
        model = published.AlignXTorch(shapes, shapes.num_hidden_layers // 2, dtype=dtype)
    model.llm.gradient_checkpointing_enable()
    model.train()
    if options.optimizer == "adafactor":
        optimizer = torch.optim.Adafactor(model.parameters(), lr=2e-6)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-6, weight_decay=0.0, fused=on_gpu)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    rng, seconds = np.random.default_rng(0), []

    def micro_batch() -> dict:
        shape, half = (options.micro_rows, options.row_length), options.row_length // 2
        tokens = torch.tensor(rng.integers(3, shapes.vocab_size, shape))
        index = torch.full(shape, published.TARGET)
        index[:, :half], index[:, 0] = published.SOURCE, 0
        languages = {name: torch.tensor(rng.integers(0, 10, options.micro_rows)) for name in ("src_lang", "tgt_lang")}
        full = {"attention_mask": torch.ones(shape, dtype=torch.long), "labels": tokens.clone()}
        batch = {"input_ids": tokens, "src_tgt_index": index, **full, **languages}
        return {name: tensor.to(device) for name, tensor in batch.items()}

    for number in range(1 + options.steps):
        batches = [micro_batch() for _ in range(options.rows // options.micro_rows)]
        start = time.perf_counter()
        metrics = published.train_step(model, optimizer, scheduler, batches)
        loss = float(metrics["loss"].mean())
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if number == 0:
            first = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    return {"first step": first, "seconds": seconds[1:], "peak GiB": peak, "loss": loss}


def measure(side: str, options: Options) -> dict:
    given = json.dumps(dataclasses.asdict(options))
    command = [sys.executable, "-m", "benchmarks.gpu", "--work", side, given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def main(options: Options) -> None:
    if options.rows % options.micro_rows:
        sys.exit(f"--rows={options.rows} is no multiple of --micro-rows={options.micro_rows}")
    console = Console(width=140)
    found = {side: measure(side, options) for side in options.sides}
    ours = found.get("ours", {})
    tokens = options.rows * options.row_length
    title = f"{options.shapes.rpartition('/')[2]}, steps of {options.rows} rows x {options.row_length} tokens"
    table = Table(title=f"{title}, {ours.get('device', options.platform)}")
    for name in ("", "tokens/s", "s a step", "MFU, causal", "MFU, full", "peak GiB", "first step, s"):
        table.add_column(name, justify="right" if name else "left")
    for side, one in found.items():
        if "failed" in one:
            table.add_row(NAMES[side], one["failed"])
            continue
        speed = [tokens / s for s in one["seconds"]]
        of_peak = ["", ""]
        if ours.get("peak"):
            at_best = [ours[k] / ours["peak"] for k in ("model flops", "model flops without causal halving")]
            of_peak = [f"{best / statistics.median(one['seconds']):.1%}" for best in at_best]
        memory = f"{one['peak GiB']:.1f}" if one["peak GiB"] else ""
        columns = record.spread(speed, 0), record.spread(one["seconds"], 3), *of_peak, memory
        table.add_row(NAMES[side], *columns, f"{one['first step']:.0f}")
    console.print(table)
    if {"ours", "torch"} <= {side for side, one in found.items() if "failed" not in one}:
        ratio = statistics.median(found["torch"]["seconds"]) / statistics.median(ours["seconds"])
        console.print(f"ours is faster by {ratio:.2f}; its weights are float32, PyTorch's bfloat16", highlight=False)
    console.print("MFU = rows x T x (6 N + 12 L H h T c) / (seconds x peak), c = 1/2 causal, 1 full", highlight=False)
    record.save(options.save, "gpu", options, {"sides": found}, console)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        side, given = sys.argv[2:]
        print(json.dumps((run_ours if side == "ours" else run_torch)(Options(**json.loads(given)))))
    else:
        main(tyro.cli(Options, description=__doc__))
