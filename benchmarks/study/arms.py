"""The study's runs: from one base model, at equal data and steps, what each loss and each choice is worth.

python -m benchmarks.study.arms --model BASE/model --to FOLDER [--arms alignx ...] [--seeds 0 1 2] [--pairs 250]

Every arm is one `Config` that differs from `STUDY` in what its line of `ARMS` says. It goes through the program's own
stages: stage 1 on translation pairs of 11 languages with English, both directions, then stage 2, the same for all
arms, on instructions mixed with translations. The seed decides the order of the data and the classifier's first
weights: the same for all arms. No test set is read here.

The four arms of the ablation come first, all seeds of them, then the choices beyond the paper, seed after seed. A run
ends as `FOLDER/ARM/SEED/{stage1,stage2}` and `done.json` with its configuration, losses, tokens and seconds; started
again, finished runs are skipped and the one that was stopped goes on. Expect a line a run and a table at the end.

The learning rate was chosen by the next-token loss of the validation pairs after stage 1, with a seed of its own, 99:
4.169, 4.142 and 4.156 of next-token, 4.220, 4.187 and 4.200 of alignx, for these:

python -m benchmarks.study.arms --model BASE/model --to FOLDER --learning-rates 5e-4 1e-3 2e-3
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import time
from collections.abc import Iterable
from typing import Any, Literal

import jax
import tyro
from rich.table import Table

from alignx_jax import config_files as configs
from alignx_jax import sharding
from alignx_jax.config import (
    Config,
    ContrastiveConfig,
    DataConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainingConfig,
)
from alignx_jax.console import Screen
from alignx_jax.data import pipeline, tokenizer
from alignx_jax.runs import loading
from alignx_jax.training import begin, build, metrics, stopping
from benchmarks.study.base import DATA

LANGUAGES = ("ar", "de", "fi", "fr", "hi", "ru", "sw", "th", "tr", "vi", "zh")
"""Each with English."""
STUDY = Config(
    data=DataConfig(template="sample", cutoff=192, row_length=256, limit=500, validation=300, spans="in-prompt"),
    objective=ObjectiveConfig(contrastive=ContrastiveConfig(layer=4), standardize="none"),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=10),
    training=TrainingConfig(
        rows=16, epochs=1.0, compute_dtype="float32", remat="none", validate_every=1000, save_every=50, keep=1
    ),
)
STAGE_2_STEPS = 60
OFF = {"objective.contrastive.weight": 0.0}, {"objective.language_matching.weight": 0.0}
ABLATION: dict[str, dict[str, Any]] = {
    "next-token": OFF[0] | OFF[1],
    "contrastive": OFF[1],
    "language-matching": OFF[0],
    "alignx": {},
}
CHOICES: dict[str, dict[str, Any]] = {
    "layer-2": {"objective.contrastive.layer": 2},
    "layer-6": {"objective.contrastive.layer": 6},
    "micro-batch": {"objective.negatives": "micro-batch", "mesh": "8x1"},
    "separate": {"data.spans": "separate", "data.cutoff": 384, "data.row_length": 472},
    "symmetric": {"objective.contrastive.form": "symmetric"},
    "keep": {"objective.duplicates": "keep"},
    "temperature-0.05": {"objective.contrastive.temperature": 0.05},
    "temperature-0.2": {"objective.contrastive.temperature": 0.2},
    "padded": {"data.examples_per_row": 1, "data.row_length": 192, "training.rows": 61},
    "contrastive-0.1": {"objective.contrastive.weight": 0.1},
    "contrastive-1.0": {"objective.contrastive.weight": 1.0},
    "matching-0.1": {"objective.language_matching.weight": 0.1},
    "matching-1.0": {"objective.language_matching.weight": 1.0},
}
"""Of `alignx`. `separate` and `padded` have rows that hold as many examples a step as those of the other arms."""
ARMS = ABLATION | CHOICES
TUNED, TUNING_SEED = ("next-token", "alignx"), 99


@dataclasses.dataclass(frozen=True)
class Options:
    model: pathlib.Path
    """The base model, a Hugging Face folder."""
    to: pathlib.Path
    """Folder of the runs."""
    data: pathlib.Path = DATA
    """Folder with `train_parallel` and `instruct`; default: `data` in $ALIGNX_SHARED, or in `shared` beside the
    repository."""
    arms: tuple[Literal[tuple(ARMS)], ...] = tuple(ARMS)
    seeds: tuple[int, ...] = (0, 1, 2)
    pairs: int = STUDY.data.limit
    """Translation pairs of each language in stage 1."""
    learning_rates: tuple[float, ...] = ()
    """Compares these on validation data, with `next-token` and `alignx`, and runs nothing else."""


def changed(config: Config, fields: dict[str, Any]) -> Config:
    """`config` with other values of fields named by their path, such as `data.limit`."""
    for path, value in fields.items():
        name, _, rest = path.partition(".")
        config = dataclasses.replace(config, **{name: changed(getattr(config, name), {rest: value}) if rest else value})
    return config


def stages(arm: str, seed: int, options: Options, learning_rate: float | None = None) -> dict[str, Config]:
    """The configurations of an arm's two stages; the second is that of every arm."""
    pairs, instruct = options.data / "train_parallel/pairs", options.data / "instruct"
    common = {
        "seed": seed,
        "model": str(options.model),
        "data.parallel": tuple(str(pairs / f"{code}-en.train.jsonl.gz") for code in LANGUAGES),
        "data.instructions": tuple(str(instruct / f"{code}.train.jsonl.gz") for code in ("en", *LANGUAGES)),
        "data.limit": options.pairs,
        "data.cache": str(options.to / "cache"),
        "optimizer.learning_rate": learning_rate or STUDY.optimizer.learning_rate,
    }
    second = {"stage": "2", "data.cutoff": STUDY.data.row_length, "training.steps": STAGE_2_STEPS}
    return {"1": configs.check(changed(STUDY, common | ARMS[arm])), "2": configs.check(changed(STUDY, common | second))}


def run(name: str, plan: dict[str, Config], console: Screen, folder: pathlib.Path) -> dict:
    """Both stages in `folder`; returns, and leaves in `done.json`, what they were and what they took."""
    done = folder / "done.json"
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    facts, start = {"name": name}, plan["1"].model
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        for stage, config in plan.items():
            config = dataclasses.replace(config, model=start)
            start = str(folder / f"stage{stage}")
            facts[f"stage{stage}"] = _train(name, stage, config, pathlib.Path(start), Screen(file=log, width=140))
    write_whole(done, facts)
    both = [facts[f"stage{stage}"] for stage in plan]
    took = " and ".join(f"{s['steps']} steps, {s['tokens']:,} tokens, {s['seconds']:.0f} s" for s in both)
    console.print(f"{name}: {took}", highlight=False, soft_wrap=True)
    return facts


def write_whole(file: pathlib.Path, facts: dict) -> None:
    """As JSON; a process that is stopped leaves no half of it."""
    fresh = file.with_suffix(".new")
    fresh.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    fresh.replace(file)


def _train(name: str, stage: str, config: Config, folder: pathlib.Path, console: Screen) -> dict:
    source, mesh, began = loading.find(config.model), sharding.make_mesh(config.mesh), time.monotonic()
    with jax.set_mesh(mesh):
        data = pipeline.build(config, stage, tokenizer.load(source.huggingface))
        weights, title = build.Weights(source, config, mesh), f"{name}, stage {stage}"
        result = begin.train(config, folder, weights, data, mesh, console, title, stopping.Stop())
    steps = metrics.read(folder, "train")
    return {
        "config": dataclasses.asdict(config),
        "before": result.before,
        "after": result.after,
        "steps": len(steps),
        "tokens": int(sum(step["tokens"] for step in steps)),
        "pairs": int(sum(step["pairs"] for step in steps)),
        "fill": data.train.fill,
        "dropped": data.dropped,
        "seconds": time.monotonic() - began,  # of its last start, with compilation and validation
    }


def finished(folder: pathlib.Path) -> dict[tuple[str, int], dict]:
    """`done.json` of every finished run in `folder`, by arm and seed."""
    files = [(arm, file) for arm in ARMS for file in sorted((folder / arm).glob("*/done.json"))]
    return {(arm, int(file.parent.name)): json.loads(file.read_text(encoding="utf-8")) for arm, file in files}


def show(console: Screen, found: Iterable[dict]) -> None:
    table = Table(title="validation losses, before and after: stage 1, and next token in stage 2")
    losses = ("loss", "next_token", "contrastive", "language_matching")
    for name in ("", *losses, "stage 2"):
        table.add_column(name.replace("_", " "), justify="right" if name else "left")

    def cell(stage: dict, loss: str) -> str:
        return f"{stage['before'][loss]:.3f}, {stage['after'][loss]:.3f}" if loss in stage["after"] else ""

    for facts in found:
        first = [cell(facts["stage1"], loss) for loss in losses]
        table.add_row(facts["name"], *first, cell(facts["stage2"], "next_token"))
    console.print(table)


def main(options: Options) -> None:
    console = Screen()
    sharding.prepare_devices(next((ARMS[arm]["mesh"] for arm in options.arms if "mesh" in ARMS[arm]), "1x1"))
    jax.config.update("jax_compilation_cache_dir", str(options.to / "cache/compiled"))
    if options.learning_rates:
        found = []
        for rate, arm in itertools.product(options.learning_rates, TUNED):
            plan = stages(arm, TUNING_SEED, options, rate)
            found.append(run(f"{arm}, {rate:g}", plan, console, options.to / f"tuning/{arm}-{rate:g}"))
        show(console, found)
        return
    for group in (ABLATION, CHOICES):
        for seed, arm in itertools.product(options.seeds, [arm for arm in group if arm in options.arms]):
            run(f"{arm}, seed {seed}", stages(arm, seed, options), console, options.to / arm / str(seed))
    show(console, finished(options.to).values())


if __name__ == "__main__":
    main(tyro.cli(Options))
