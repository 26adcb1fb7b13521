"""`--stage=evaluate`: every measure of every model, as tables, a page and files."""

from __future__ import annotations

import dataclasses
import pathlib

from alignx_jax import hosts, sharding
from alignx_jax.config_files import STAGES
from alignx_jax.data import cache
from alignx_jax.evaluation import folders
from alignx_jax.evaluation.measure import evaluate as evaluation
from alignx_jax.exits import UserError
from alignx_jax.runs import lineage, loading, locks
from alignx_jax.stages.session import Session


def evaluate(session: Session, models: list[str]) -> None:
    """Every measure of every model: tables, and a folder with evaluation.json, report.html and TensorBoard's events."""
    from alignx_jax.evaluation.show import report  # matplotlib, a fifth of what a start of any stage imports

    session.stop.check()
    config = session.config
    session.console.rule("evaluate", align="left")
    material = evaluation.check(config)
    hosts.agree({"what --evaluation reads": cache.fingerprint(dataclasses.asdict(material))})
    session.line(
        "sentences",
        f"{config.evaluation.sentences}: {len(material.sentences[config.evaluation.pivot]):,} in "
        f"{len(material.sentences)} languages ({' '.join(material.sentences)})",
    )
    sources = [session.source(path) for path in models]
    loading.check_lineage(sources)
    subjects = evaluation.subjects(config, sources)
    for subject in subjects:
        session.show_source(subject.source)
        subject.source.check()
        sharding.check(subject.source.decoder_config(), session.mesh, config.evaluation.rows, flag="evaluation.rows")
        if material.directions:
            rows = config.evaluation.translation.rows
            sharding.check(subject.source.decoder_config(), session.mesh, rows, flag="evaluation.translation.rows")
    if material.directions or config.evaluation.in_prompt:
        session.line("template", config.data.template)
    known = evaluation.notes(config, material, subjects)
    for note in known:
        session.line("note", note)
    folder = folders.place(session.run, config.evaluation)

    def fill(partial: pathlib.Path) -> None:
        report.write(results, partial)
        report.to_tensorboard(results, partial / "tensorboard")

    def write() -> None:
        earlier = folders.write(results, folder, fill)
        session.console.print(report.terminal_table(results))
        for what, text in report.terminal_notes(results):
            if text not in known:
                session.line(what, text)
        if earlier:
            session.line("note", f"{folder} held another evaluation, which is {earlier} now (--evaluation.name)")
        session.line(
            "results", f"{folder / folders.FILE}, {folder / 'report.html'}; tensorboard --logdir {session.run}"
        )

    with locks.hold(folder, "--evaluation.name"):
        with session.bars("measuring the models") as advance:
            results = evaluation.evaluate(config, material, subjects, session.mesh, advance, session.command)
        session.console.doing("writing the report")
        hosts.first("results", write)


def models_of(session: Session) -> list[str]:
    """The models to evaluate, first what the rest are compared with: the models of --compare before --model, or the
    model that the run began with before its stages."""
    config = session.config
    if config.model:
        return list(dict.fromkeys([*config.compare, config.model]))
    there = [session.run / name for name in STAGES if (session.run / name / "config.json").is_file()]
    if not there:
        raise UserError(f"{session.run} has no stage to evaluate; run one, or give --model")
    base = lineage.resolve(lineage.read(there[0]).start.model, there[0])
    return list(dict.fromkeys([base, *map(str, there), *config.compare]))
