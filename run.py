"""The one program of alignx_jax: `python run.py --stage=1 --mesh=8x1`; `--help` shows every setting.

Each stage prints what it loads, shows its progress, and ends with what changed and where the results lie.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shlex
import sys
from typing import NoReturn

import flax
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from alignx_jax import card, command_line, console, exits, hosts, machines, plan_table, sharding, storage, xla_flags
from alignx_jax import config_files as configs
from alignx_jax import plan as planning
from alignx_jax.config import Config
from alignx_jax.data import cache, report
from alignx_jax.data.examples import Examples
from alignx_jax.evaluation import alignment
from alignx_jax.evaluation import evaluate as evaluation
from alignx_jax.exits import UserError
from alignx_jax.session import STAGES, Session
from alignx_jax.training import (
    balance,
    checkpoints,
    durable,
    lineage,
    locks,
    loop,
    progress,
    runs,
    stage_folder,
    stopping,
    wandb_log,
)

_REMOTE = "gs://: {}; see to it that the bucket is there and may be read and written, and start the same command again"


def prepare(session: Session) -> None:
    """Both stages' data into the cache, and a report on what is in them."""
    found: dict[tuple[str, str], Examples] = {}
    for stage in ("1", "2"):
        source = session.source(session.config.model)
        session.console.rule(f"prepare stage {stage}", align="left")
        session.show_source(source)
        source.check()
        for one in session.data(stage, source).sources:
            found.setdefault((one.corpus.kind, one.corpus.source), one)

    session.console.doing("writing the report")

    def tell() -> None:
        facts = report.facts(list(found.values()))
        storage.make(session.run)
        durable.write(session.run / "corpus.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        durable.write(session.run / "corpus.html", report.html(facts))
        session.console.print(report.show(facts))

    hosts.first("corpus report", tell)
    session.line("report", f"{session.run / 'corpus.json'}, {session.run / 'corpus.html'}")
    session.line("cache", session.config.data.cache)


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
    loop.check(session.config, source, session.mesh)
    session.show_adapters(source.decoder_config())
    choice = loop.attention_kernel(session.config, source.decoder_config(), session.mesh)
    session.line("attention", f"{choice.kernel}: {choice.reason}")
    session.show_flags()
    config = dataclasses.replace(session.config, stage=stage, model=start)
    ahead: list[loop.Step | None] = []

    def compile_ahead() -> None:
        ahead.append(loop.compile_ahead(config, session.run / folder, source, session.mesh))

    data = session.data(stage, source, compile_ahead)
    weights = loop.Weights(source, config, session.mesh)
    session.console.doing("choosing the layer to align")
    config = with_layer(session, config, session.run / folder, weights, data)
    agree(config)
    session.console.doing("loading the weights")
    result = loop.train(
        config,
        session.run / folder,
        weights,
        data,
        session.mesh,
        session.console,
        STAGES[folder],
        session.stop,
        ahead[0],
    )
    if result.skipped:
        session.line("skipped", f"{result.skipped} updates that were not finite (metrics.jsonl has the steps)")
    if "loss" in result.after:
        session.console.print(progress.change_table(f"{STAGES[folder]}: validation", result.before, result.after))
    session.line("results", f"{result.folder} (best checkpoint: step {result.best_step})")
    return result


def make_anew(session: Session, folder: storage.Path, start: runs.Source) -> None:
    """Sets a stage aside that was begun with other weights than `start` has now."""
    known = lineage.read(folder).start.weights if (folder / "config.json").is_file() else start.weights
    if known != start.weights:
        set_aside(session, folder, f"{folder} was begun with other weights than {start.name} has now")


def set_aside(session: Session, folder: storage.Path, what: str) -> None:
    kept = hosts.share("aside", str(stage_folder.set_aside(folder, what)) if hosts.is_first() else None)
    session.line("anew", f"{what}: it is kept as {kept}, and made anew")


def agree(config: Config) -> None:
    """Refuses processes that were started with different settings or versions."""
    settings = {f"--{name}": value for name, value in configs.flat(config).items() if not name.startswith("hosts.")}
    hosts.agree({"the version of jax": jax.__version__, "the version of flax": flax.__version__} | settings)


def with_layer(session: Session, config: Config, folder: storage.Path, weights: loop.Weights, data) -> Config:
    """`config` with a number for `--objective.contrastive.layer=auto`, and on screen what it was chosen by."""
    contrastive, source = config.objective.contrastive, weights.source
    if contrastive.layer != "auto":
        return config
    earlier = configs.load(str(folder)) if (folder / "config.json").is_file() else source.config()
    if not earlier and data.pairs and contrastive.weight:
        config, choice = alignment.with_layer(config, weights.look(), session.tokenizer(source), data, session.mesh)
        curve = " ".join(f"{n}: {100 * share:.1f}" for n, share in enumerate(choice.retrieval))
        session.line(
            "layer",
            f"{choice.layer} is aligned: inside the model, the two sentences of {choice.pairs:,} held-out pairs",
        )
        session.line("", "find each other, among those of their languages, most often there before training")
        session.line("", f"(accuracy@1 by layer, %: {curve})")
        return config
    before = earlier.objective.contrastive.layer if earlier else "auto"
    layer = loop.align_layer(config, source.decoder_config()) if before == "auto" else before  # nothing is aligned
    objective = dataclasses.replace(config.objective, contrastive=dataclasses.replace(contrastive, layer=layer))
    return dataclasses.replace(config, objective=objective)


def stage_2_start(session: Session) -> str:
    """The model that stage 2 starts from."""
    if session.config.model:
        return session.config.model
    if not (session.run / "stage1" / "config.json").is_file():
        raise command_line.no_stage_1(session.run)
    return str(session.run / "stage1")


def evaluate(session: Session, models: list[str]) -> None:
    """Every measure of every model: tables, and a folder with evaluation.json, report.html and TensorBoard's events."""
    from alignx_jax.evaluation import folders, report  # matplotlib, a fifth of what a start of any stage imports

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
    runs.check_lineage(sources)
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
            results = evaluation.evaluate(config, material, subjects, session.mesh, advance)
        results["command"] = session.command
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


def export(session: Session) -> None:
    """The best checkpoint of the run's last stage as a Hugging Face folder, or its adapters as one of PEFT."""
    options = session.config.export
    path = session.config.model
    if not path:
        there = [str(session.run / name) for name in ("stage2", "stage1") if (session.run / name).is_dir()]
        if not there:
            raise UserError(f"{session.run} has no stage to export; run one, or give --model")
        path = there[0]
    source = session.source(path)
    folder = storage.path(options.to) if options.to else session.run / "export"
    session.console.rule("export", align="left")
    session.show_source(source)
    source.check()

    def others() -> dict[str, bytes]:
        texts = {lineage.FILE: card.lineage_text(source)}
        if source.run:
            texts["README.md"] = card.text(source, session.command, adapter=options.adapter)
        return {name: text.encode() for name, text in texts.items()}

    session.console.doing("exporting the weights")
    if options.adapter:
        source.export_adapters(session.mesh, folder, card.base_name(source), others())
        loads = f"peft.PeftModel.from_pretrained(base_model, {str(folder)!r})"
    else:
        half = options.dtype == "original" and source.dtype() == jnp.bfloat16  # rounded once in either case
        decoder = source.load(session.mesh, jnp.bfloat16 if half else jnp.float32)
        # The card after the weights: it is of the step that was read.
        source.export(decoder, folder, options.dtype, options.shard_gb * 1e9, others())
        loads = f"transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    session.line("results", f"{folder}: {loads} loads it")


def plan(session: Session, on: machines.Machine) -> None:
    """The step compiled for a machine that need not be there; plan.json in the run's folder."""
    config = session.config
    source = session.source(config.model or config.plan.shapes)
    session.console.rule("plan", align="left")
    session.show_source(source)
    decoder = source.decoder_config()
    loop.check(config, source, session.mesh)
    session.show_adapters(decoder)
    choice = loop.attention_kernel(config, decoder, session.mesh)
    session.line("attention", f"{choice.kernel}: {choice.reason}")
    session.show_flags()
    session.console.doing("compiling")
    with session.console.status("compiling"):
        plans = [planning.measure(config, decoder, on)]
    session.console.print(plan_table.of_one(plans[0], on))
    if config.plan.search:
        candidates = planning.chains(config, decoder)
        with session.bars("compiling") as advance:
            plans += planning.search(config, candidates, lambda c: planning.measure(c, decoder, on), advance)
        session.console.print(plan_table.of_search(plans))
        best = planning.fastest(plans)
        text = f"of {len(plans)} compiled: {planning.flags(best.settings)}" if best else "none of these fits"
        session.line("fastest", text)
    storage.make(session.run)
    path = session.run / "plan.json"
    results = {"command": session.command, "topology": on.topology, "plans": [one.to_dict() for one in plans]}
    durable.write(path, json.dumps(results, indent=1) + "\n")
    session.line("results", str(path))
    if on.topology == "cpu" and config.model and (source.run or any(source.huggingface.glob("*.safetensors"))):
        if config.data.parallel:
            weigh(session, source)
        else:
            session.line("losses", "not weighed against each other, for which --data.parallel is needed")


def weigh(session: Session, source: runs.Source) -> None:
    """The losses side by side as stage 1 would begin, on this host."""
    with jax.set_mesh(session.mesh):
        source.check()
        weights, data = loop.Weights(source, session.config, session.mesh), session.data("1", source)
        config = with_layer(session, session.config, session.run / "stage1", weights, data)
        decoder = source.decoder_config()
        step = loop.build_step(config, loop.recipe(config, decoder, data, session.mesh), decoder, session.mesh)
        state = step.begin(weights.take())
        batch = jax.tree.map(lambda x: sharding.place_rows(x, session.mesh), next(data.train.batches()))
        measure = balance.compiled(step.graph, step.recipe)
        values = jax.device_get(measure(state.params, batch, state.frozen))
    balance.show(session.console, values, step.recipe)


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


def _axes(mesh: Mesh) -> str:
    return " x ".join(f"{name} {size}" for name, size in mesh.shape.items())


def leave(code: int, what: object) -> NoReturn:
    """Ends with one line on stderr: what happened, and what happened besides."""
    text = exits.one_line("; ".join([str(what), *getattr(what, "__notes__", [])]))
    if code == exits.USER:
        sys.exit(f"run.py: {text}")
    console.note(f"run.py: {text}")
    stopped = SystemExit(code)
    stopped.add_note(text)
    raise stopped


@hosts.together()
def main(arguments: list[str]) -> None:
    try:
        with stopping.Stop() as stop:
            start(arguments, stop)
    except UserError as error:
        leave(exits.USER, error)
    except exits.Diverged as error:
        error.add_note(f"again: python run.py {shlex.join(arguments)}")
        leave(exits.DIVERGED, error)
    except exits.StorageError as error:
        leave(exits.STORAGE, error)
    except exits.Interrupted as error:
        leave(exits.INTERRUPTED, error)
    except OSError as error:
        if said := storage.failed(error):
            leave(exits.STORAGE, _REMOTE.format(said))
        code = exits.of_os_error(error)
        if error.filename is None and code == exits.USER:
            raise
        where = f"{error.filename}: " if error.filename else ""
        leave(code, f"{where}{error.strerror}; give a path that can be read and written")
    except Exception as error:
        if (said := storage.failed(error)) is None:
            raise
        leave(exits.STORAGE, _REMOTE.format(said))


def start(arguments: list[str], stop: stopping.Stop) -> None:
    inherited: list[str] = []
    config = command_line.parse(arguments, inherited.extend)
    xla_flags.apply()
    if config.stage == "plan":
        on = machines.find(config)
        screen = console.Screen()
        with screen.under_way("--stage=plan"):
            plan(Session(config, on.mesh(config.mesh), screen, stop, arguments), on)
        return
    if config.stage in ("1", "2", "all"):
        wandb_log.check(config)
    with console.Screen(quiet=config.hosts.index != 0).under_way("waiting for the other processes"):
        hosts.initialize(config.hosts)
    agree(config)
    sharding.prepare_devices(config.mesh, hosts.count())
    screen, mesh = console.Screen(quiet=not hosts.is_first()), sharding.make_mesh(config.mesh)
    # Several processes on CPUs run collectives of programs that are read back in different orders (docs/decisions.md).
    if hosts.count() == 1 or mesh.devices.flat[0].platform != "cpu":
        compiled = pathlib.Path(config.data.cache).expanduser() / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(compiled))
    session = Session(config, mesh, screen, stop, arguments)
    with jax.set_mesh(session.mesh), screen.under_way(f"--stage={config.stage}"):
        match config.stage:
            case "prepare":
                prepare(session)
            case "1":
                train(session, "1", "stage1", config.model)
            case "2":
                if inherited:
                    session.line("from stage 1:", ", ".join(name.replace("_", "-") for name in inherited))
                train(session, "2", "stage2", stage_2_start(session))
            case "evaluate":
                evaluate(session, models_of(session))
            case "export":
                export(session)
            case "all":
                everything(session)


if __name__ == "__main__":
    console.guard()
    checkpoints.hide_late_writes()
    main(sys.argv[1:])
