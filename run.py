"""The one program of alignx_jax: `python run.py --stage=1 --mesh=8x1`; `--help` shows every setting.

Each stage prints what it loads, shows its progress, and ends with what changed and where the results lie.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import shlex
import sys

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from alignx_jax import config as configs
from alignx_jax import sharding
from alignx_jax.config import Config, UserError
from alignx_jax.data import pipeline, tokenizer
from alignx_jax.evaluation import alignment
from alignx_jax.models import huggingface
from alignx_jax.training import loop, progress, runs

STAGES = {"stage1": "stage 1", "control": "next-token only", "stage2": "stage 2"}
"""A run's folders, and what tables call their models."""


def parse(arguments: list[str]) -> Config:
    """Flags over a base configuration, by default configs/sample.py."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    known, rest = first.parse_known_args(arguments)
    sample = known.config is None
    about = "AlignX in JAX. --config=FILE sets the base: a file of configs/ or the folder of a run; flags go over it."
    base = pathlib.Path(__file__).parent / "configs" / "sample.py" if sample else known.config
    config = configs.check(
        tyro.cli(Config, args=rest, default=configs.load(str(base)), description=about, prog="run.py")
    )
    if sample and config.stage not in ("evaluate", "export"):
        for flag, sources in (("parallel", config.data.parallel), ("instructions", config.data.instructions)):
            if sources != ("sample",):
                raise UserError(
                    f"--data.{flag} is given without --config, whose default, configs/sample.py, has settings for the "
                    "embedded sample alone; give --config=configs/llama2_7b_opus100.py (published settings) or your own"
                )
    return config


@dataclasses.dataclass(frozen=True)
class Session:
    """What the stages share."""

    config: Config
    mesh: Mesh
    console: Console

    @property
    def run(self) -> pathlib.Path:
        return pathlib.Path(self.config.run).expanduser()

    def source(self, path: str) -> runs.Source:
        """The model at `path`; a stage of this run under the name of the stage."""
        found = runs.find(path)
        name = pathlib.Path(path).name
        return dataclasses.replace(found, name=STAGES.get(name, found.name)) if found.checkpoints else found

    def line(self, what: str, text: str) -> None:
        self.console.print(f"[bold]{what:<9}[/bold] {text}", highlight=False, soft_wrap=True)

    def show_source(self, source: runs.Source) -> None:
        decoder = source.decoder_config()
        count = sum(x.size for x in jax.tree.leaves(runs.abstract_decoder(decoder)[1]))
        self.line(
            "model",
            f"{source.name}: {decoder.family}, {count / 1e6:,.1f} M parameters, {decoder.num_layers} layers of "
            f"{decoder.hidden_size}, vocabulary {decoder.vocab_size:,}",
        )

    def tokenizer(self, source: runs.Source) -> tokenizer.Tokenizer:
        found = tokenizer.load(source.huggingface)
        tokenizer.check(found, source.decoder_config().vocab_size)
        return found

    def data(self, stage: str, source: runs.Source) -> pipeline.Data:
        """Builds a stage's data, or finds it built, and shows what it is."""
        with Progress(console=self.console, transient=True, disable=not self.console.is_terminal) as bars:
            tasks = {}

            def advance(name: str, done: int, total: int) -> None:
                if name not in tasks:
                    tasks[name] = bars.add_task(f"encoding {name}", total=total)
                bars.update(tasks[name], completed=done)

            data = pipeline.build(self.config, stage, self.tokenizer(source), advance)
        train, training = data.train, self.config.training
        self.line(
            "data",
            f"{', '.join(dict.fromkeys(c.source for c in data.corpora))}: {len(data.languages)} languages "
            f"({' '.join(data.languages)}), {train.num_examples:,} examples, "
            f"{data.validation.num_examples:,} more for validation",
        )
        if data.dropped:
            self.line("", "left out: " + ", ".join(f"{n:,} {reason}" for reason, n in data.dropped.items()))
        for corpus in data.corpora:
            if corpus.skipped:
                self.line("", f"left out: {corpus.skipped:,} bad lines, listed in {corpus.folder / 'skipped.txt'}")
        self.line(
            "steps",
            f"{train.steps:,} of {training.rows} rows x {self.config.data.row_length} tokens, {train.fill:.0%} full",
        )
        return data


def prepare(session: Session) -> None:
    """Both stages' data into the cache."""
    for stage in ("1", "2"):
        source = session.source(session.config.model or "sample")
        session.console.rule(f"prepare stage {stage}", align="left")
        session.show_source(source)
        session.data(stage, source)
    session.line("cache", session.config.data.cache)


def train(session: Session, stage: str, folder: str, start: str) -> loop.Result:
    """Trains a stage and shows its validation losses before and after."""
    source = session.source(start)
    session.console.rule(STAGES[folder], align="left")
    session.show_source(source)
    session.line(
        "devices", f"{session.mesh.size} x {session.mesh.devices.flat[0].device_kind}, mesh {_axes(session.mesh)}"
    )
    loop.check(session.config, source, session.mesh)
    data = session.data(stage, source)
    result = loop.train(
        dataclasses.replace(session.config, stage=stage, model=start),
        session.run / folder,
        source,
        data,
        session.mesh,
        session.console,
        STAGES[folder],
    )
    if "loss" in result.after:
        session.console.print(progress.change_table(f"{STAGES[folder]}: validation", result.before, result.after))
    session.line("results", f"{result.folder} (best checkpoint: step {result.best_step})")
    return result


def stage_2_start(session: Session) -> str:
    """The model that stage 2 starts from."""
    if session.config.model:
        return session.config.model
    if not (session.run / "stage1" / "config.json").is_file():
        raise UserError(f"stage 2 starts from stage 1, which {session.run} does not have; run it, or give --model")
    return str(session.run / "stage1")


def evaluate(session: Session, models: list[str]) -> None:
    """Bitext retrieval of every model at every layer: a table, and evaluation.json in the run's folder."""
    options = session.config.evaluation
    languages = options.languages and tuple(dict.fromkeys([options.pivot, *options.languages]))
    sentences = pipeline.multiway(options.sentences, languages, options.limit)
    if options.pivot not in sentences or len(sentences) < 2:
        raise UserError(
            f"{options.sentences}: retrieval compares the pivot {options.pivot} (--evaluation.pivot) with other "
            f"languages; there are {', '.join(sentences)}"
        )
    session.console.rule("evaluate", align="left")
    session.line("sentences", f"{options.sentences}: {len(sentences[options.pivot]):,} in {len(sentences)} languages")
    found, layer = {}, None
    for path in models:
        source = session.source(path)
        layer = loop.align_layer(session.config, source.decoder_config())
        sharding.check(source.decoder_config(), session.mesh, options.rows, flag="evaluation.rows")
        session.show_source(source)
        vectors = alignment.all_vectors(
            source.load(session.mesh),
            session.tokenizer(source),
            sentences,
            session.mesh,
            rows=options.rows,
            row_length=session.config.data.row_length,
            dtype=jnp.dtype(session.config.training.compute_dtype),
        )
        found[source.name] = (layer, alignment.retrieval(vectors, options.pivot))
    chance = 100 / len(sentences[options.pivot])
    session.line(
        "retrieval", f"between {options.pivot} and each language at the aligned layer, sentences encoded apart;"
    )
    session.line("", f"accuracy@1 in %, mean of both directions; chance is {chance:.1f}")
    session.console.print(_retrieval_table(found))
    session.run.mkdir(parents=True, exist_ok=True)
    record = {
        name: {"align_layer": layer, "retrieval": [dataclasses.asdict(r) for r in results]}
        for name, (layer, results) in found.items()
    }
    path = session.run / "evaluation.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    session.line("results", str(path))


def _retrieval_table(found: dict[str, tuple[int, list[alignment.Retrieval]]]) -> Table:
    """Accuracy in %: a column for each model, a row for each language."""
    table = Table()
    table.add_column("language")
    for name, (layer, _) in found.items():
        table.add_column(f"{name}\nlayer {layer}", justify="right")
    columns = [[100 * r.mean[layer] for r in results] for layer, results in found.values()]
    for row, result in enumerate(next(iter(found.values()))[1]):
        table.add_row(result.language, *(f"{column[row]:.1f}" for column in columns))
    table.add_section()
    table.add_row("mean", *(f"{sum(column) / len(column):.1f}" for column in columns), style="bold")
    return table


def models_of(session: Session) -> list[str]:
    """The models to evaluate: those named, or the run's stages after the model they began with."""
    named = [session.config.model] if session.config.model else []
    if not named:
        there = [session.run / name for name in STAGES if (session.run / name / "config.json").is_file()]
        if not there:
            raise UserError(f"{session.run} has no stage to evaluate; run one, or give --model")
        base = configs.load(str(there[0])).model
        named = [*([base] if base else []), *map(str, there)]
    return list(dict.fromkeys([*named, *session.config.compare]))


def export(session: Session) -> None:
    """The best checkpoint of the run's last stage as a Hugging Face folder."""
    options = session.config.export
    path = session.config.model
    if not path:
        there = [str(session.run / name) for name in ("stage2", "stage1") if (session.run / name).is_dir()]
        if not there:
            raise UserError(f"{session.run} has no stage to export; run one, or give --model")
        path = there[0]
    source = session.source(path)
    folder = pathlib.Path(options.to).expanduser() if options.to else session.run / "export"
    session.console.rule("export", align="left")
    session.show_source(source)
    settings = huggingface.read_config(source.huggingface)
    original = settings.get("dtype") or settings.get("torch_dtype") or "float32"
    dtype = original if options.dtype == "original" else options.dtype
    huggingface.export(source.load(session.mesh), settings, folder, jnp.dtype(dtype), options.shard_gb * 1e9)
    runs.copy_companions(source.huggingface, folder)
    session.line("results", f"{folder}: transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}) loads it")


def everything(session: Session) -> None:
    """The whole demonstration: every stage, and a control run without the two losses of AlignX."""
    config = session.config
    base = config.model or "sample"
    prepare(session)
    train(session, "1", "stage1", base)
    off = dataclasses.replace(
        config.objective,
        contrastive=dataclasses.replace(config.objective.contrastive, weight=0.0),
        language_matching=dataclasses.replace(config.objective.language_matching, weight=0.0),
    )
    train(dataclasses.replace(session, config=dataclasses.replace(config, objective=off)), "1", "control", base)
    train(session, "2", "stage2", str(session.run / "stage1"))
    if not (session.run / "export").exists():  # a restart may find it done
        export(dataclasses.replace(session, config=dataclasses.replace(config, model=str(session.run / "stage2"))))
    evaluate(session, [base, *(str(session.run / name) for name in STAGES)])


def _axes(mesh: Mesh) -> str:
    return " x ".join(f"{name} {size}" for name, size in mesh.shape.items())


def main(arguments: list[str]) -> None:
    console = Console(stderr=False)
    try:
        config = parse(arguments)
        sharding.prepare_devices(config.mesh)
        cache = pathlib.Path(config.data.cache).expanduser() / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        session = Session(config, sharding.make_mesh(config.mesh), console)
        with jax.set_mesh(session.mesh):
            match config.stage:
                case "prepare":
                    prepare(session)
                case "1":
                    train(session, "1", "stage1", config.model or "sample")
                case "2":
                    train(session, "2", "stage2", stage_2_start(session))
                case "evaluate":
                    evaluate(session, models_of(session))
                case "export":
                    export(session)
                case "all":
                    everything(session)
    except UserError as error:
        sys.exit(f"run.py: {error}")
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(f"run.py: {error.filename}: {error.strerror}; give a path that can be read and written")
    except loop.Diverged as error:
        sys.exit(f"run.py: training stopped: {error}\nagain: python run.py {shlex.join(arguments)}")


if __name__ == "__main__":
    main(sys.argv[1:])
