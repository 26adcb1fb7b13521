"""One stage from its first step to its last, continuing where an earlier start of it was stopped."""

from __future__ import annotations

import dataclasses
import json
import time

from jax.sharding import Mesh

from alignx_jax import hosts, storage
from alignx_jax.config import Config
from alignx_jax.console import Screen, say
from alignx_jax.data import cache, corpora, pipeline, prompts
from alignx_jax.exits import UserError
from alignx_jax.runs import companions, lineage, loading, stage_folder
from alignx_jax.training import profiling, stopping
from alignx_jax.training.build import Step, Weights, build_step, check, most_pairs, recipe
from alignx_jax.training.loop import Result, Stage


def train(
    config: Config,
    folder: storage.Path,
    weights: Weights,
    data: pipeline.Data,
    mesh: Mesh,
    console: Screen,
    title: str,
    stop: stopping.Stop,
    ahead: Step | None = None,
) -> Result:
    """Runs a stage to its end and leaves its folder behind; started again, it continues from its last checkpoint.

    Args:
      ahead: of `compile_ahead`, taken if it has room for the pairs of `data`.

    Raises:
      UserError: settings that do not fit the model, the mesh or the folder; before anything is compiled.
      Diverged: a loss or the gradient is not finite, or an auxiliary loss is 0 or without gradient.
      StorageError: something could not be written, or no checkpoint can be read.
      Interrupted: `stop` was requested; the state is saved.
    """
    since, source = time.monotonic(), weights.source
    check(config, source, mesh)
    plan = recipe(config, source.decoder_config(), data, mesh)
    met = most_pairs(config, data, mesh) * (plan.groups if plan.scope == "global" else 1)
    if "contrastive" in plan.weights and met < 2:
        raise UserError(
            "no pair ever meets another, so the contrastive loss has no negatives; raise --training.rows, lower "
            "--training.accumulation, or set --objective.negatives=global"
        )
    if plan.two_passes:
        share = "quarter" if plan.remat == "block" else "third"  # of 4 forward passes' products, or of 3
        say(
            console,
            f"--objective.negatives=step: pairs meet those of all {plan.accumulation} micro-batches, "
            f"and each step runs the layers forward once more (at most a {share} more computation)",
        )
    profiling.steps(config.profile, data.train.steps)  # refuses those that are not in the run
    step = ahead if ahead and ahead.recipe == plan else build_step(config, plan, source.decoder_config(), mesh)
    begun = begun_with(config, folder, source, data)
    state = hosts.share("state", stage_folder.state(folder, config, begun))
    facts = json.dumps(data.facts(), indent=2) + "\n"

    def accept() -> None:
        stage_folder.accept(folder, config, begun)
        storage.write(folder / "data.json", facts)

    if state == "new":
        weights.look()  # before the folder is there: a spoilt model leaves none behind
        hosts.gather("loaded", None)
        hosts.first("claim", lambda: stage_folder.claim(folder, config, source, begun))
    else:
        companions.check(folder, source.huggingface)
    stage_folder.check_shared(folder)
    if state != "changed":
        hosts.first("data", lambda: storage.write(folder / "data.json", facts))
    stage = Stage(config, folder, step, data, mesh, console, stop, since, accept if state == "changed" else None)
    return stage.train(title, weights.take)


def begun_with(config: Config, folder: storage.Path, source: loading.Source, data: pipeline.Data) -> lineage.Lineage:
    """What a stage in `folder` stands on, as it is now. Every process has to ask."""
    template = dataclasses.asdict(prompts.load(config.data.template))
    contents = [lineage.Content(c.kind, corpora.place(c.kind, c.source), c.content) for c in data.corpora]
    contents.append(lineage.Content("template", prompts.place(config.data.template), cache.fingerprint(template)))
    below = source.origin_below(folder) if config.lora.rank else None
    return lineage.Lineage(source.origin(folder), tuple(contents), below)
