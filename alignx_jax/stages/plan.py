"""`--stage=plan`: the training step compiled for a machine that need not be there, and its losses weighed."""

from __future__ import annotations

import json

import jax

from alignx_jax import sharding, storage
from alignx_jax.planning import machines, table
from alignx_jax.planning import plan as planning
from alignx_jax.runs import loading
from alignx_jax.stages.session import Session
from alignx_jax.stages.train import with_layer
from alignx_jax.training import balance, build


def plan(session: Session, on: machines.Machine) -> None:
    """The step compiled for a machine that need not be there; plan.json in the run's folder."""
    config = session.config
    source = session.source(config.model or config.plan.shapes)
    session.console.rule("plan", align="left")
    session.show_source(source)
    decoder = source.decoder_config()
    build.check(config, source, session.mesh)
    session.show_adapters(decoder)
    choice = build.attention_kernel(config, decoder, session.mesh)
    session.line("attention", f"{choice.kernel}: {choice.reason}")
    session.show_flags()
    session.console.doing("compiling")
    with session.console.status("compiling"):
        plans = [planning.measure(config, decoder, on)]
    session.console.print(table.of_one(plans[0], on))
    if config.plan.search:
        candidates = planning.chains(config, decoder)
        with session.bars("compiling") as advance:
            plans += planning.search(config, candidates, lambda c: planning.measure(c, decoder, on), advance)
        session.console.print(table.of_search(plans))
        best = planning.fastest(plans)
        text = f"of {len(plans)} compiled: {planning.flags(best.settings)}" if best else "none of these fits"
        session.line("fastest", text)
    storage.make(session.run)
    path = session.run / "plan.json"
    results = {"command": session.command, "topology": on.topology, "plans": [one.to_dict() for one in plans]}
    storage.write(path, json.dumps(results, indent=1) + "\n")
    session.line("results", str(path))
    if on.topology == "cpu" and config.model and (source.run or any(source.huggingface.glob("*.safetensors"))):
        if config.data.parallel:
            weigh(session, source)
        else:
            session.line("losses", "not weighed against each other, for which --data.parallel is needed")


def weigh(session: Session, source: loading.Source) -> None:
    """The losses side by side as stage 1 would begin, on this host."""
    with jax.set_mesh(session.mesh):
        source.check()
        weights = build.Weights(source, session.config, session.mesh)
        encoder = session.tokenizer(source)
        data = session.data("1", encoder, session.read("1"))
        config = with_layer(session, session.config, session.run / "stage1", weights, encoder, data)
        decoder = source.decoder_config()
        step = build.build_step(config, build.recipe(config, decoder, data, session.mesh), decoder, session.mesh)
        state = step.begin(weights.take())
        batch = jax.tree.map(lambda x: sharding.place_rows(x, session.mesh), next(data.train.batches()))
        measure = balance.compiled(step.graph, step.recipe)
        values = jax.device_get(measure(state.params, batch, state.frozen))
    balance.show(session.console, values, step.recipe)
