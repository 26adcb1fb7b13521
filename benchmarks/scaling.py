"""Weak scaling on one host: the work of a device stays the same while their number grows, and two processes share it.

python -m benchmarks.scaling [--devices 1 2 4 8] [--rounds 3] [--save FILE]

The devices are simulated and share the cores of this host, so n of them need n times as long at best. What is shown is
the share of that which is reached: 1 where collectives, the sharded optimizer and dispatch cost nothing. It says that
nothing grows with the devices that should not, and nothing about a network. `2 processes` is the largest number of
devices over two processes of jax.distributed on this machine.

Every measurement is a fresh process, or two; one step to warm up, then the median of `--steps` steps; rounds alternate.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import time

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import record

PAIRS, VOCABULARY = 8, 4096


@dataclasses.dataclass(frozen=True)
class Options:
    devices: tuple[int, ...] = (1, 2, 4, 8)
    rows: int = 2
    """Rows of 256 tokens a device and step."""
    hidden_size: int = 256
    layers: int = 8
    steps: int = 5
    rounds: int = 3
    save: str | None = None
    """JSON file to write."""


def work(devices: int, process: int, port: int, options: Options) -> None:
    """A measuring process; with a port, one of two. Prints the seconds of a step."""
    import jax

    from alignx_jax import sharding
    from alignx_jax.config import Config, DataConfig, OptimizerConfig, TrainingConfig
    from alignx_jax.models.architecture import DecoderConfig
    from alignx_jax.models.rope import Rope
    from benchmarks import synthetic

    processes = 2 if port else 1
    jax.config.update("jax_platforms", "cpu")
    sharding.prepare_devices(f"{devices}x1", processes)
    if port:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", processes, process)
    d = options.hidden_size
    decoder = DecoderConfig(
        family="llama",
        vocab_size=VOCABULARY,
        hidden_size=d,
        intermediate_size=3 * d,
        num_layers=options.layers,
        num_heads=d // 32,
        num_kv_heads=d // 64,
        head_dim=32,
        norm_epsilon=1e-5,
        rope=Rope(),
        tie_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        activation="silu",
        initializer_range=0.02,
        max_positions=256,
    )
    config = Config(
        mesh=f"{devices}x1",
        data=DataConfig(cutoff=256, row_length=256, examples_per_row=PAIRS),
        optimizer=OptimizerConfig(warmup_steps=0),
        training=TrainingConfig(
            rows=options.rows * devices, steps=1000, compute_dtype="float32", remat="attention", attention="xla"
        ),
    )
    mesh, seconds = sharding.make_mesh(config.mesh), []
    with jax.set_mesh(mesh):
        job = synthetic.job(config, decoder, mesh, PAIRS)
        update, now = job.compile(), job.state()
        for _, batch in zip(
            range(1 + options.steps),
            synthetic.batches(config, VOCABULARY, PAIRS),
            strict=False,
        ):
            placed, start = job.place(batch), time.perf_counter()
            now, metrics = update(now, placed)
            loss = float(metrics["loss"])
            seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": statistics.median(seconds[1:]), "loss": loss}))


def measure(devices: int, processes: int, options: Options) -> dict[str, float]:
    port = 0
    if processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
    given = json.dumps(dataclasses.asdict(options))
    command = [sys.executable, "-m", "benchmarks.scaling", "--work", str(devices)]
    running = [
        subprocess.Popen(
            [*command, str(n), str(port), given], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for n in range(processes)
    ]
    ended = [process.communicate() for process in running]
    if any(process.returncode for process in running):
        sys.exit("\n".join(error for _, error in ended))
    return json.loads(ended[0][0].splitlines()[-1])


def main(options: Options) -> None:
    console, cores = Console(width=120), len(os.sched_getaffinity(0))
    cases = [(n, 1) for n in options.devices] + [(max(options.devices), 2)] * (max(options.devices) > 1)
    rounds = []
    for number in range(options.rounds):
        rounds.append([measure(*case, options) for case in cases])
        console.print(f"round {number + 1} of {options.rounds}", highlight=False)
    base = options.devices[0]
    table = Table(title=f"weak scaling on {cores} cores: {options.rows} rows of 256 tokens a device")
    for name in ("devices", "processes", "s a step", "of the time at best"):
        table.add_column(name, justify="right")
    results = []
    for place, (devices, processes) in enumerate(cases):
        seconds = [one[place]["seconds"] for one in rounds]
        reached = [one[0]["seconds"] * devices / base / one[place]["seconds"] for one in rounds]
        table.add_row(str(devices), str(processes), record.spread(seconds, 2), record.spread(reached, 2))
        results.append({"devices": devices, "processes": processes, "seconds": seconds, "reached": reached})
        results[-1]["losses"] = [one[place]["loss"] for one in rounds]
    console.print(table)
    record.save(options.save, "scaling", options, {"results": results}, console)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        devices, process, port, given = sys.argv[2:]
        work(int(devices), int(process), int(port), Options(**json.loads(given)))
    else:
        main(tyro.cli(Options, description=__doc__))
