"""What has to hold of the compiled step on machines that are not there, as one table.

python -m benchmarks.plan_table [--only TEXT] [--save benchmarks/results/plan.json]

Compiles stage 1 as `run.py --stage=plan` does (docs/plan.md); needs libtpu and JAX's CUDA plugin (`pip install
"jax[tpu,cuda13]"`), and neither TPU nor GPU. Every case is a row; with
--save the file keeps the rows of cases that are not run. Seconds of compilation depend on what else the machine does.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import tyro
from rich.console import Console
from rich.table import Table

from alignx_jax import config_files as configs
from alignx_jax.config import Config, LoraConfig
from alignx_jax.planning import machines, plan, xla_flags
from alignx_jax.runs import loading
from benchmarks import record

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Case:
    topology: str
    mesh: str
    row_length: int
    rows: int
    moments: str = "float32"
    optimizer: str = "adamw"
    remat: str = "block"
    model: str = "llama3_8b"
    losses: bool = True
    """False: the next-token loss alone."""
    layers: int | None = None
    """Instead of the model's."""
    rank: int = 0
    """Of adapters; 0: all weights are trained."""


_DEPTH = Case("v5e:4x4", "16x1", 512, 16)
CASES = {
    "8B, v5e-8, 512": Case("v5e:2x4", "8x1", 512, 24, "bfloat16"),
    "8B, v5e-8, 512, fewer rows": Case("v5e:2x4", "8x1", 512, 8, "bfloat16"),
    "8B, v5e-8, 2048": Case("v5e:2x4", "8x1", 2048, 8, "bfloat16"),
    "8B, v5e-16, 512": Case("v5e:4x4", "16x1", 512, 16),
    "8B, v5e-16, 2048": Case("v5e:4x4", "16x1", 2048, 16),
    "8B, v6e-8, 512": Case("v6e:2x4", "8x1", 512, 24),
    "8B, v6e-8, 2048": Case("v6e:2x4", "8x1", 2048, 8),
    "8B, one H100, AdamW": Case("h100:1", "1x1", 512, 8, "bfloat16"),
    "8B, one H100, 512": Case("h100:1", "1x1", 512, 24, optimizer="adafactor"),
    "8B, one H100, 2048": Case("h100:1", "1x1", 2048, 6, optimizer="adafactor"),
    "8B, eight H100": Case("h100:8", "8x1", 512, 24),
    "8B, LoRA, one RTX 4090": Case("rtx4090:1", "1x1", 512, 8, rank=16),
    "8B, LoRA, v5e-4": Case("v5e:2x2", "4x1", 512, 24, rank=16),
    "8B, LoRA, v5e-8": Case("v5e:2x4", "8x1", 512, 24, rank=16),
    "8B, LoRA, v5e-8, 2048": Case("v5e:2x4", "8x1", 2048, 8, rank=16),
    "70B, v5p-128, 2048": Case("v5p:4x4x8", "128x1", 2048, 128, model="llama3_70b"),
    "70B, v5p-128, 32x4": Case("v5p:4x4x8", "32x4", 2048, 128, model="llama3_70b"),
    "8B, v5p-8": Case("v5p:2x2x2", "8x1", 512, 8),
    "8B, v5p-256": Case("v5p:4x8x8", "32x8x1", 512, 256),
    "8B, v5p-1024": Case("v5p:8x8x16", "128x8x1", 512, 1024),
    "8B, next-token alone": dataclasses.replace(_DEPTH, losses=False),
    "8 layers": dataclasses.replace(_DEPTH, layers=8),
    "16 layers": dataclasses.replace(_DEPTH, layers=16),
}


@dataclasses.dataclass(frozen=True)
class Options:
    only: str = ""
    """Run the cases whose names contain this."""
    save: str | None = None
    """JSON file to write."""


def configuration(case: Case) -> Config:
    base = configs.load(str(ROOT / "configs" / "llama3_8b_opus100.py"))
    objective = base.objective
    if not case.losses:
        objective = dataclasses.replace(
            objective,
            contrastive=dataclasses.replace(objective.contrastive, weight=0.0),
            language_matching=dataclasses.replace(objective.language_matching, weight=0.0),
        )
    return dataclasses.replace(
        base,
        mesh=case.mesh,
        topology=case.topology,
        data=dataclasses.replace(base.data, row_length=case.row_length),
        objective=objective,
        lora=LoraConfig(rank=case.rank),
        optimizer=dataclasses.replace(base.optimizer, kind=case.optimizer, moment_dtype=case.moments),
        training=dataclasses.replace(base.training, rows=case.rows, remat=case.remat),
    )


def run(case: Case) -> dict:
    config = configuration(case)
    decoder = loading.find(str(ROOT / "configs" / "shapes" / case.model)).decoder_config()
    if case.layers:
        decoder = dataclasses.replace(decoder, num_layers=case.layers)
    on = machines.find(config)
    return {"topology": case.topology, "model": case.model, **plan.measure(config, decoder, on).to_dict()}


def show(results: dict[str, dict]) -> Table:
    table = Table(title="of one chip and one step")
    for name in ("", "mesh", "rows x tokens", "GiB", "FLOPs ratio", "moved, GiB", "sent, GiB", "best, s", "MFU", "s"):
        table.add_column(name, justify="right" if name else "left")
    for name, one in results.items():
        shape = (one["settings"]["mesh"], f"{one['settings']['rows']} x {one['settings']['row_length']}")
        if one["refusal"]:
            table.add_row(name, *shape, "does not fit", "", "", "", "", "", f"{one['compile_seconds']:.0f}")
            continue
        fits = "" if one["fits"] else ", does not fit"
        table.add_row(
            name,
            *shape,
            f"{one['total_bytes'] / 2**30:.2f} of {one['capacity'] / 2**30:.2f}{fits}",
            f"{one['ratio']:.3f}",
            f"{one['hbm_bytes'] / 2**30:.1f}",
            f"{sum(one['sent_bytes'].values()) / 2**30:.2f}",
            f"{one['step_seconds']:.3f}, {one['bound']}",
            f"{one['mfu']:.0%}",
            f"{one['compile_seconds']:.0f}",
        )
    return table


def main(options: Options) -> None:
    xla_flags.apply()
    jax.config.update("jax_num_cpu_devices", 8)  # the most that a case compiles for on this host
    console = Console(width=160)
    file = pathlib.Path(options.save) if options.save else None
    results = json.loads(file.read_text())["results"] if file and file.is_file() else {}
    for name in (name for name in CASES if options.only in name):
        console.print(f"compiling {name}")
        results[name] = run(CASES[name])
        if file:
            known = {name: results[name] for name in CASES if name in results}
            file.write_text(json.dumps(record.of_this_run("plan_table") | {"results": known}, indent=1) + "\n")
    console.print(show({name: results[name] for name in CASES if name in results}))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
