"""`--stage=1` and `--stage=2`: settings, model, data, the layer, training, and what it changed."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from alignx_jax import command_line, hosts, storage
from alignx_jax import config_files as configs
from alignx_jax.config import Config
from alignx_jax.config_files import STAGES
from alignx_jax.data import pipeline, tokenizer
from alignx_jax.evaluation.measure import alignment
from alignx_jax.runs import lineage, loading, locks, stage_folder
from alignx_jax.stages.session import Session, agree
from alignx_jax.training import begin, build, loop, progress


def train(session: Session, stage: str, folder: str, start: str) -> loop.Result:
    """Trains a stage and shows its validation losses before and after; its folder is held meanwhile."""
    session.stop.check()
    with locks.hold(session.run / folder):
        return _train(session, stage, folder, start)


def _train(session: Session, stage: str, folder: str, start: str) -> loop.Result:
    source = session.source(start)
    if session.config.stage == "all":
        make_anew(session, session.run / folder, source)
    session.console.rule(STAGES[folder], align="left")
    session.show_source(source)
    source.check()
    on = f" in {hosts.count()} processes" if hosts.count() > 1 else ""
    kind = session.mesh.devices.flat[0].device_kind
    session.line("devices", f"{session.mesh.size} x {kind}{on}, mesh {_axes(session.mesh)}")
    build.check(session.config, source, session.mesh)
    session.show_adapters(source.decoder_config())
    choice = build.attention_kernel(session.config, source.decoder_config(), session.mesh)
    session.line("attention", f"{choice.kernel}: {choice.reason}")
    session.show_flags()
    config = dataclasses.replace(session.config, stage=stage, model=start)
    encoder, sources = session.tokenizer(source), session.read(stage)
    ahead = build.compile_ahead(config, session.run / folder, source, session.mesh)  # while the data are encoded
    data = session.data(stage, encoder, sources)
    weights = build.Weights(source, config, session.mesh)
    session.console.doing("choosing the layer to align")
    config = with_layer(session, config, session.run / folder, weights, encoder, data)
    agree(config)
    session.console.doing("loading the weights")
    result = begin.train(
        config,
        session.run / folder,
        weights,
        data,
        session.mesh,
        session.console,
        STAGES[folder],
        session.stop,
        ahead,
    )
    if result.skipped:
        session.line("skipped", f"{result.skipped} updates that were not finite (metrics.jsonl has the steps)")
    if "loss" in result.after:
        session.console.print(progress.change_table(f"{STAGES[folder]}: validation", result.before, result.after))
    session.line("results", f"{result.folder} (best checkpoint: step {result.best_step})")
    return result


def make_anew(session: Session, folder: storage.Path, start: loading.Source) -> None:
    """Sets a stage aside that was begun with other weights than `start` has now."""
    known = lineage.read(folder).start.weights if (folder / "config.json").is_file() else start.weights
    if known != start.weights:
        set_aside(session, folder, f"{folder} was begun with other weights than {start.name} has now")


def set_aside(session: Session, folder: storage.Path, what: str) -> None:
    kept = hosts.share("aside", str(stage_folder.set_aside(folder, what)) if hosts.is_first() else None)
    session.line("anew", f"{what}: it is kept as {kept}, and made anew")


def with_layer(
    session: Session,
    config: Config,
    folder: storage.Path,
    weights: build.Weights,
    encoder: tokenizer.Tokenizer,
    data: pipeline.Data,
) -> Config:
    """`config` with a number for `--objective.contrastive.layer=auto`, and on screen what it was chosen by."""
    contrastive, source = config.objective.contrastive, weights.source
    if contrastive.layer != "auto":
        return config
    earlier = configs.load(str(folder)) if (folder / "config.json").is_file() else source.config()
    if not earlier and data.pairs and contrastive.weight:
        config, choice = alignment.with_layer(config, weights.look(), encoder, data, session.mesh)
        curve = " ".join(f"{n}: {100 * share:.1f}" for n, share in enumerate(choice.retrieval))
        session.line(
            "layer",
            f"{choice.layer} is aligned: inside the model, the two sentences of {choice.pairs:,} held-out pairs",
        )
        session.line("", "find each other, among those of their languages, most often there before training")
        session.line("", f"(accuracy@1 by layer, %: {curve})")
        return config
    before = earlier.objective.contrastive.layer if earlier else "auto"
    layer = build.align_layer(config, source.decoder_config()) if before == "auto" else before  # nothing is aligned
    objective = dataclasses.replace(config.objective, contrastive=dataclasses.replace(contrastive, layer=layer))
    return dataclasses.replace(config, objective=objective)


def stage_2_start(session: Session) -> str:
    """The model that stage 2 starts from."""
    if session.config.model:
        return session.config.model
    if not (session.run / "stage1" / "config.json").is_file():
        raise command_line.no_stage_1(session.run)
    return str(session.run / "stage1")


def _axes(mesh: Mesh) -> str:
    return " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
