"""What the stages of run.py share: the settings, the mesh, the screen, and how models and data are found and shown."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Callable, Iterator

import flax
import jax
from jax.sharding import Mesh
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from alignx_jax import config_files as configs
from alignx_jax import console, hosts, storage
from alignx_jax.config import Config
from alignx_jax.config_files import STAGES
from alignx_jax.data import pipeline, tokenizer
from alignx_jax.exits import UserError
from alignx_jax.models import lora
from alignx_jax.models.architecture import DecoderConfig
from alignx_jax.planning import xla_flags
from alignx_jax.runs import loading
from alignx_jax.training import stopping


@dataclasses.dataclass(frozen=True)
class Session:
    """Of one start of the program."""

    config: Config
    mesh: Mesh
    console: console.Screen
    stop: stopping.Stop
    arguments: list[str]
    """Of the command line."""

    @property
    def run(self) -> storage.Path:
        return storage.path(self.config.run)

    @property
    def command(self) -> str:
        return f"python run.py {shlex.join(self.arguments)}"

    def source(self, path: str) -> loading.Source:
        """The model at `path`, called by its folder's name; a stage of a run by the name of the stage."""
        self.console.doing(f"reading {path}")
        found = loading.find(path)
        hosts.agree({f"the model {path}": found.fingerprint()})
        name = storage.absolute(storage.path(path)).name
        return dataclasses.replace(
            found, name=STAGES.get(name, name) if found.run else name, cache=self.config.data.cache
        )

    def line(self, what: str, text: str) -> None:
        console.say(self.console, text, what)

    def show_source(self, source: loading.Source) -> None:
        decoder = source.decoder_config()
        count = sum(x.size for x in jax.tree.leaves(loading.abstract_decoder(decoder)[1]))
        self.line(
            "model",
            f"{source.name}: {decoder.family}, {count / 1e6:,.1f} M parameters, {decoder.num_layers} layers of "
            f"{decoder.hidden_size}, vocabulary {decoder.vocab_size:,}",
        )
        if adapters := source.adapters():
            self.line("", f"with adapters of rank {adapters.rank}, trained on {source.base_model()}")

    def show_adapters(self, decoder: DecoderConfig) -> None:
        """What is trained with `--lora.rank`; a line only there."""
        if self.config.lora.rank:
            count = lora.count(self.config.lora, decoder)
            names = ", ".join(lora.targets(self.config.lora, decoder))
            self.line("adapters", f"of rank {self.config.lora.rank}, {count / 1e6:,.1f} M parameters: {names}")

    def show_flags(self) -> None:
        """The compiler's flags, ours and the user's; a line only where there are any."""
        if flags := xla_flags.shown(self.mesh.devices.flat[0].platform):
            self.line("flags", flags)

    @contextlib.contextmanager
    def bars(self, what: str) -> Iterator[Callable[[str, int, int], None]]:
        """Progress bars on a terminal, elsewhere a line now and then: a part of `what`, how much of it is done, and of
        how much."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
        )
        live = self.console.is_terminal
        with (
            self.console.under_way(what),
            Progress(*columns, console=self.console, transient=True, disable=not live) as bars,
        ):
            tasks = {}

            def advance(name: str, done: int, total: int) -> None:
                if done < total:
                    self.console.doing(name, f": {done:,} of {total:,}")
                else:
                    self.console.doing(what)
                if live:
                    self.console.moved()
                if name not in tasks:
                    tasks[name] = bars.add_task(console.printable(name), total=total)
                bars.update(tasks[name], completed=done, visible=done < total)

            yield advance

    def tokenizer(self, source: loading.Source) -> tokenizer.Tokenizer:
        decoder, cutoff = source.decoder_config(), self.config.data.cutoff
        if cutoff > decoder.max_positions:
            raise UserError(
                f"--data.cutoff={cutoff}: longer than the model's context of {decoder.max_positions} tokens; set it to "
                f"{decoder.max_positions} or less"
            )
        return tokenizer.load(source.huggingface, decoder.vocab_size)

    def read(self, stage: str) -> pipeline.Corpora:
        """Every source of a stage's data, read and found good."""
        with self.console.under_way("reading the corpora"):
            return pipeline.read(self.config, stage)

    def data(self, stage: str, encoder: tokenizer.Tokenizer, sources: pipeline.Corpora) -> pipeline.Data:
        """Encodes a stage's data, or finds them encoded, and shows what they are."""
        with self.bars("encoding the corpora") as advance:
            advance_of = lambda name, *done: advance(f"encoding {name}", *done)  # noqa: E731
            data = pipeline.build(self.config, stage, encoder, advance_of, sources)
        hosts.agree(
            {f"the content of {corpus.source}": corpus.fingerprint for corpus in data.corpora}
            | {"the packed data": [data.train.fingerprint, data.validation.fingerprint]}
        )
        train, training = data.train, self.config.training
        self.line(
            "data",
            f"{', '.join(dict.fromkeys(c.source for c in data.corpora))}: {len(data.languages)} languages "
            f"({' '.join(data.languages)}), {train.num_examples:,} examples, "
            f"{data.validation.num_examples:,} more for validation",
        )
        if data.dropped:
            self.line("", "left out: " + ", ".join(f"{n:,} {reason}" for reason, n in data.dropped.items()))
        for one in (part for examples in data.sources for part in (examples.corpus, examples)):
            if one.skipped:
                self.line("", f"left out: {one.skipped:,} bad lines, listed in {one.folder / 'skipped.txt'}")
        for note in data.notes:
            self.line("note", note)
        self.line(
            "steps",
            f"{train.steps:,} of {training.rows} rows x {self.config.data.row_length} tokens, {train.fill:.0%} full",
        )
        return data


def agree(config: Config) -> None:
    """Refuses processes that were started with different settings or versions."""
    settings = {f"--{name}": value for name, value in configs.flat(config).items() if not name.startswith("hosts.")}
    hosts.agree({"the version of jax": jax.__version__, "the version of flax": flax.__version__} | settings)
