"""`--stage=all`: the whole demonstration, and a control run without the two losses of AlignX."""

from __future__ import annotations

import dataclasses

from alignx_jax import config_files as configs
from alignx_jax import hosts, storage
from alignx_jax.config_files import STAGES
from alignx_jax.runs import lineage
from alignx_jax.stages.evaluate import evaluate
from alignx_jax.stages.export import export
from alignx_jax.stages.prepare import prepare
from alignx_jax.stages.session import Session
from alignx_jax.stages.train import set_aside, train


def everything(session: Session) -> None:
    """The whole demonstration: every stage, and a control run without the two losses of AlignX."""
    config = session.config
    base = config.model
    prepare(session)
    train(session, "1", "stage1", base)
    config = dataclasses.replace(config, objective=configs.load(str(session.run / "stage1")).objective)  # no `auto`
    off = dataclasses.replace(
        config.objective,
        contrastive=dataclasses.replace(config.objective.contrastive, weight=0.0),
        language_matching=dataclasses.replace(config.objective.language_matching, weight=0.0),
    )
    train(dataclasses.replace(session, config=dataclasses.replace(config, objective=off)), "1", "control", base)
    train(dataclasses.replace(session, config=config), "2", "stage2", str(session.run / "stage1"))
    evaluate(session, [base, *(str(session.run / name) for name in STAGES)])
    last, to = str(session.run / "stage2"), storage.path(config.export.to or str(session.run / "export"))
    weights = session.source(last).weights
    is_there, known = hosts.share("exported", [(to / "config.json").exists(), lineage.exported(to)])
    if is_there and known == weights:  # a restart may find it done
        return
    if is_there:
        set_aside(session, to, f"{to} is of other weights than stage 2 has now")
    export(dataclasses.replace(session, config=dataclasses.replace(config, model=last)))
