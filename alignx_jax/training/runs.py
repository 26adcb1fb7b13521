"""Folders of runs, and models to start from: Hugging Face folders and earlier stages alike.

A stage's folder holds `config.json`, `data.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`, and in
`huggingface/` the model's configuration and tokenizer, with checksums, so that it can be evaluated, exported or trained
further by itself. One of adapters (LoRA) has `base.json` besides, and needs the model that this names.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from alignx_jax import hosts, sharding, storage
from alignx_jax.config import Config, LoraConfig
from alignx_jax.config_files import flat, from_json, to_json
from alignx_jax.data import cache
from alignx_jax.exits import UserError
from alignx_jax.models import families, huggingface, lora, other_formats, peft, weights
from alignx_jax.models.decoder import Decoder
from alignx_jax.objectives.language_matching import Classifier
from alignx_jax.training import base, companions, durable, locks
from alignx_jax.training.checkpoints import Checkpoints, Deleted
from alignx_jax.training.state import PairClassifier, Params

SAMPLE_MODEL = pathlib.Path(__file__).resolve().parent.parent / "sample" / "model"
# What may differ when a run continues, because its result does not depend on it.
_FREE = (
    "stage",
    "run",
    "mesh",
    "topology",
    "compare",
    "profile",
    "evaluation.",
    "export.",
    "plan.",
    "hosts.",
    "data.cache",
    "data.beam",
    "training.keep",
    "training.save_every",
    "training.stall_seconds",
    "training.wandb",
    "accept_changes",
    "on_nonfinite",  # a run that has come so far had no such step
)
# What the saved state's arrays depend on; `objective.language_matching.weight` by whether it is 0.
_SHAPES = ("model", "optimizer.moment_dtype", "objective.language_matching.width", "objective.language_matching.weight")
_SHAPES += ("lora.rank", "lora.alpha", "lora.targets")
_BEGUN = ("huggingface", "corpora.json", base.FILE, "config.json")  # `claim` writes them, in this order
_T = TypeVar("_T")
_ATTEMPTS = 5  # at a checkpoint that a run, which trains, deletes meanwhile
_VISIBLE = 60  # seconds for a new file to be seen on other hosts


@dataclasses.dataclass(frozen=True)
class Source:
    """A model on disk."""

    name: str
    huggingface: pathlib.Path
    """Folder with config.json and the tokenizer, of this machine; with the weights too if there is no checkpoint."""
    run: storage.Path | None = None
    """The stage's folder if it is one; the best of its checkpoints is meant."""

    def decoder_config(self) -> families.DecoderConfig:
        return families.decoder_config(huggingface.read_config(self.huggingface), str(self.huggingface / "config.json"))

    def dtype(self) -> jnp.dtype:
        """Of the weights that training began from; see `huggingface.dtype`."""
        return jnp.dtype(huggingface.dtype(self.huggingface))

    def check(self) -> None:
        """Whether the weights are there and the model's own, by the headers of their files: cheap, whatever their size.

        Checkpoints have checksums, which loading looks at.

        Raises:
          UserError: they are missing, truncated, of another format or another model; also those below adapters.
        """
        if self.run is None:
            weights.open_weights(self.huggingface, self.decoder_config())
        elif self.adapters():
            self._below_adapters(lambda source: source.check())

    def start(self) -> str:
        """The model that the stage began with: `sample`, or where it is now, if it is there."""
        model = self.config().model
        if model is None:  # whoever wrote it: training names it
            raise UserError(f"{self.run / 'config.json'}: model: names none, and a stage began with one; mend it")
        return self._moved(model)

    def _moved(self, place: str) -> str:
        """A place that the stage's folder names; of another stage of the run, its place where the run is now."""
        named, run = pathlib.PurePath(place), pathlib.PurePath(self.config().run)
        within = named.parent.parts[-len(run.parts) :] == run.parts
        beside = self.run.parent / named.name
        return str(beside) if within and run.parts and beside.is_dir() else place

    def fingerprint(self) -> str:
        """Changes with the model's configuration, and with the name or size of a file of weights or the tokenizer."""
        files = [file for file in self.huggingface.iterdir() if file.suffix in (".safetensors", ".model")]
        sizes = sorted((file.name, file.stat().st_size) for file in files)
        return cache.fingerprint(huggingface.read_config(self.huggingface), sizes)

    def config(self) -> Config | None:
        """What the stage was run with."""
        file = self.run and self.run / "config.json"
        return from_json(file.read_bytes(), str(file)) if file else None

    def load(self, mesh: Mesh, dtype=jnp.float32) -> Decoder:
        """The decoder, sharded over `mesh`, with master weights of type `dtype`; adapters are merged into them.

        Raises:
          UserError: the weights are damaged, or those below adapters are gone or others than were trained on.
        """
        if self.run is None:
            return huggingface.load(self.huggingface, mesh, dtype)
        if self.adapters():
            return lora.merge(self.load_adapted(mesh, dtype))
        graph, params = abstract_decoder(self.decoder_config())
        return nnx.merge(graph, self._restore("decoder", params, mesh, dtype))

    @functools.cached_property
    def step(self) -> int:
        """Of the stage's checkpoint that is meant: the best one that is sound. Every process has to ask.

        Raises:
          StorageError: none is.
        """
        return Checkpoints(self.run / "checkpoints").sound("best", ("decoder", "classifier"))  # all parts of the same

    def adapters(self) -> LoraConfig | None:
        """The settings of the adapters that the stage trained; None where it trained all weights, or is no stage."""
        config = self.config()
        return config.lora if config and config.lora.rank else None

    def load_adapted(self, mesh: Mesh, dtype=jnp.bfloat16) -> Decoder:
        """The decoder with frozen weights of type `dtype`, and beside them the adapters, if the stage trained such."""
        settings = self.adapters()
        if not settings:
            return self.load(mesh, dtype)
        decoder = self._below_adapters(lambda source: source.load(mesh, dtype))
        base.check(self.run, decoder)

        def adapted() -> Decoder:
            empty = random_decoder(self.decoder_config())
            lora.attach(empty, settings, seed=0)
            return empty

        graph, like, _ = nnx.split(nnx.eval_shape(adapted), nnx.LoRAParam, nnx.Param)
        trained = self._restore("decoder", nnx.to_pure_dict(like), mesh, jnp.float32)
        return nnx.merge(graph, trained, nnx.to_pure_dict(nnx.state(decoder, nnx.Param)))

    def _below_adapters(self, use: Callable[[Source], _T]) -> _T:
        """What `use` makes of the model below the stage's adapters."""
        try:
            return use(find(self.base_model()))
        except UserError as error:
            raise UserError(
                f"{self.run} holds adapters alone, and their model cannot be read: {error}; put it back, or name its "
                f"new place in {self.run / base.FILE}"
            ) from None

    def base_model(self) -> str:
        """Where the weights are that adapters are trained on: this model, or the one below its adapters."""
        if self.adapters():
            return self._moved(base.model(self.run))
        return "sample" if self.huggingface == SAMPLE_MODEL else str(storage.absolute(self.run or self.huggingface))

    def export_adapters(
        self, mesh: Mesh, folder: str | storage.Path, name: str, others: Mapping[str, bytes] = MappingProxyType({})
    ) -> None:
        """Writes the adapters alone, as a folder that PEFT loads over the model that they were trained on.

        Args:
          folder: new, or empty.
          name: of that model.
          others: files that belong beside them, by name.

        Raises:
          UserError: there are none, the folder holds something already or is in use, or as `load`.
          StorageError: a file could not be written.
        """
        settings = self.adapters()
        if not settings:
            raise UserError(
                f"--export.adapter: {self.name} has no adapters, as it was trained without --lora.rank; leave it out"
            )
        folder = storage.path(str(folder))
        with locks.hold(folder, "--export.to"):
            peft.export(self.load_adapted(mesh), settings, folder, name, others)

    def export(
        self,
        decoder: Decoder,
        folder: str | storage.Path,
        dtype: str = "original",
        shard_bytes: float = 5e9,
        others: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        """Writes `decoder`, which came from this model, as a Hugging Face folder: weights, configuration, tokenizer.

        Args:
          folder: new, or empty.
          dtype: of the written weights; original: what the model's config.json names.
          shard_bytes: largest safetensors file, in bytes.
          others: files that belong beside them, by name; in the place of those of this model.

        Raises:
          UserError: the folder holds something already or is in use, a weight is not finite or beyond the range of
            `dtype`, or the tokenizer's files lead out of the model's folder.
          StorageError: a file could not be written.
        """
        settings = huggingface.read_config(self.huggingface)
        own = {
            name: content for name, content in companions.contents(self.huggingface).items() if name != "config.json"
        }
        folder, written = storage.path(str(folder)), self.dtype() if dtype == "original" else jnp.dtype(dtype)
        with locks.hold(folder, "--export.to"):
            huggingface.export(decoder, settings, folder, written, shard_bytes, {**own, **others})

    def load_classifier(self, mesh: Mesh) -> Classifier | None:
        """The pair classifier of a stage that trained one."""
        config = self.config()
        if config is None or config.stage != "1" or not config.objective.language_matching.weight:
            return None
        size, width = self.decoder_config().hidden_size, config.objective.language_matching.width
        graph, variables = nnx.split(nnx.eval_shape(lambda: PairClassifier(size, width, rngs=nnx.Rngs(0))))
        params = nnx.to_pure_dict(variables)
        return nnx.merge(graph, self._restore("classifier", params, mesh, jnp.float32)).weights()

    def _restore(self, part: str, params: Params, mesh: Mesh, dtype) -> Params:
        like = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s),
            {part: params},
            sharding.parameter_shardings({part: params}, mesh),
        )
        for _ in range(_ATTEMPTS):
            try:
                return Checkpoints(self.run / "checkpoints").restore_part(self.step, like)[part]
            except Deleted as error:
                gone = error
            if part != "decoder" or hosts.count() > 1:
                break
            del self.__dict__["step"]
        raise UserError(
            f"{gone} was deleted while it was read: {self.run} is still being trained; give the same command again, or "
            "when it is done"
        )


def random_decoder(config: families.DecoderConfig, dtype=jnp.float32) -> Decoder:
    """A decoder that holds no checkpoint's weights; under `nnx.eval_shape` it costs nothing and gives the shapes."""
    return Decoder(config, rngs=nnx.Rngs(0), dtype=dtype)


def abstract_decoder(config: families.DecoderConfig) -> tuple[nnx.GraphDef, dict]:
    """The decoder's structure, and its parameters with shapes in the place of arrays."""
    graph, variables = nnx.split(nnx.eval_shape(lambda: random_decoder(config)))
    return graph, nnx.to_pure_dict(variables)


def find(path: str) -> Source:
    """The model at `path`: `sample`, a Hugging Face folder, or a stage's folder of a run.

    Raises:
      UserError: no such folder, neither of the two, a stage that saved nothing or whose copies have changed, or a
        config.json that names a type that weights are not written in. Weights are only looked at by `Source.check`.
    """
    if path == "sample":
        return Source("sample", SAMPLE_MODEL)
    if "://" in path and not path.startswith("gs://"):
        raise UserError(f"{path}: {other_formats.missing(path)}")
    folder = storage.path(path)
    if not folder.is_dir():
        raise UserError(f"{path}: {other_formats.file(folder) if folder.exists() else other_formats.missing(path)}")
    if (folder / "huggingface").is_dir():
        _check_finished(folder)
        copies = storage.local_copy(folder / "huggingface")
        companions.check_copies(copies, folder / "huggingface")
        source = Source(str(folder), copies, folder)
    elif storage.is_remote(folder) and (folder / "config.json").is_file():
        raise UserError(
            f"{path}: a Hugging Face folder is read from this machine's file system alone; copy it there (gcloud "
            "storage cp -r) and give the copy"
        )
    elif (folder / "config.json").is_file() and not (folder / other_formats.ADAPTERS).is_file():
        companions.refuse_pointers(folder)
        source = Source(str(folder), folder)
    else:
        raise UserError(f"{path}: {other_formats.folder(folder)}")
    huggingface.named_dtype(huggingface.read_config(source.huggingface), f"{source.huggingface / 'config.json'}")
    return source


def _check_finished(folder: storage.Path) -> None:
    if Checkpoints(folder / "checkpoints").latest is None:
        raise UserError(f"{folder}: this stage has no checkpoint, it has saved none yet or they are gone; run it first")


def can_continue(folder: storage.Path, config: Config, corpora: dict[str, str]) -> bool:
    """Whether `folder` is a stage's folder of `config` already; a new or empty one is not.

    With `config.accept_changes`, settings and data may have changed: the new ones are written down, and the former
    ones stay beside as `config.1.json` and `corpora.1.json`, and so on.

    Args:
      corpora: fingerprint of each source of data.

    Raises:
      UserError: the folder belongs to another configuration, or the data have changed, and that is not accepted or
        cannot be, as the state's arrays depend on it; names what differs.
    """
    saved = folder / "config.json"
    if saved.is_file():
        old = from_json(saved.read_bytes(), str(saved))
        differences = _differences(old, config)
        listed = "; ".join(f"{k}: {there} there, {here} here" for k, (there, here) in differences.items())
        if differences and not config.accept_changes:
            raise UserError(
                f"{folder} belongs to another configuration ({listed}); give another --run, delete the folder, or "
                "--accept-changes to continue it with the changed settings"
            )
        if fixed := [k for k, (there, here) in differences.items() if _reshapes(k, there, here)]:
            raise UserError(
                f"{folder}: --accept-changes cannot change {', '.join(fixed)} ({listed}), which its checkpoints depend "
                "on; give another --run"
            )
        try:
            known = dict(json.loads((folder / "corpora.json").read_bytes()))
        except (FileNotFoundError, ValueError, TypeError) as error:
            raise UserError(
                f"{folder / 'corpora.json'} is damaged ({error}); restore it, or give another --run"
            ) from None
        changed = sorted(k for k in corpora if known.get(k) != corpora[k])
        if changed and not config.accept_changes:
            raise UserError(
                f"{folder} was begun with other content of {', '.join(changed)}; give another --run, "
                "or --accept-changes"
            )
        if (differences or changed) and hosts.is_first():
            _write_down(folder, config, corpora)
        return True
    if folder.is_dir() and {file.name.removesuffix(".new") for file in folder.iterdir()} - set(_BEGUN):
        raise UserError(f"{folder} is not empty and not a run of ours; give another --run")
    return False


def _reshapes(name: str, there: object, here: object) -> bool:
    return name in _SHAPES and not (name.endswith(".weight") and there and here)


def _write_down(folder: storage.Path, config: Config, corpora: dict[str, str]) -> None:
    number = 1 + sum(1 for _ in folder.glob("config.*.json"))
    for name, text in (("corpora", _corpora_text(corpora)), ("config", _config_text(config))):
        durable.write(folder / f"{name}.{number}.json", (folder / f"{name}.json").read_bytes())
        durable.write(folder / f"{name}.json", text)


def _config_text(config: Config) -> str:
    """Without the permission to change it, which is given once."""
    return to_json(dataclasses.replace(config, accept_changes=False)) + "\n"


def _corpora_text(corpora: dict[str, str]) -> str:
    return json.dumps(corpora, indent=2) + "\n"


def claim(
    folder: storage.Path, config: Config, source: Source, corpora: dict[str, str], below: str | None = None
) -> None:
    """Makes `folder`, new or empty or left half-made, the folder of a stage: it is one once it has its config.json.

    Args:
      below: the `base.record` where adapters are trained.
    """
    storage.remove(folder / "huggingface")  # of another model, perhaps
    storage.make(folder / "huggingface")
    companions.keep(source.huggingface, folder / "huggingface")
    durable.write(folder / "corpora.json", _corpora_text(corpora))
    if below:
        durable.write(folder / base.FILE, below)
    durable.write(folder / "config.json", _config_text(config))
    if not storage.is_remote(folder):
        durable.sync(folder.parent)


def check_shared(folder: storage.Path) -> None:
    """Whether every process sees the stage's folder, which the first one made; network storage may take a while.

    Raises:
      UserError: it does not.
    """
    deadline = time.monotonic() + _VISIBLE
    while not (folder / "config.json").is_file():
        if time.monotonic() > deadline:
            raise UserError(
                f"{folder}: process 0 made it, but it is not here; --run has to be on storage of all processes"
            )
        time.sleep(0.5)
    hosts.gather("folder", None)


def _differences(saved: Config, asked: Config) -> dict[str, tuple[object, object]]:
    """Settings that may not differ and do: by their names, as saved and as asked for."""
    old, new = flat(saved), flat(asked)
    differences = {k: (old[k], new[k]) for k in old if old[k] != new[k] and not k.startswith(_FREE)}
    shards = {sharding.data_shards(sharding.abstract_mesh(config.mesh)) for config in (saved, asked)}
    if len(shards) > 1 and _pairs_meet_by_device(saved):
        differences["mesh"] = saved.mesh, asked.mesh
    return differences


def _pairs_meet_by_device(config: Config) -> bool:
    """Whether the losses depend on how many devices the rows are divided among."""
    objective = config.objective
    pairs = config.stage == "1" and (objective.contrastive.weight or objective.language_matching.weight)
    return bool(pairs) and objective.negatives == "micro-batch"
