"""Models that can be loaded: Hugging Face folders and the stages of runs (`stage_folder`) alike."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from alignx_jax import hosts, sharding, storage
from alignx_jax.config import Config, DataConfig, LoraConfig
from alignx_jax.config_files import from_json
from alignx_jax.data import cache
from alignx_jax.exits import UserError
from alignx_jax.models import families, huggingface, lora, other_formats, peft, weights
from alignx_jax.models.decoder import Decoder
from alignx_jax.objectives.language_matching import Classifier
from alignx_jax.runs import companions, lineage, locks
from alignx_jax.training.checkpoints import Checkpoints, Deleted
from alignx_jax.training.state import PairClassifier, Params

SAMPLE_MODEL = pathlib.Path(__file__).resolve().parent.parent / "sample" / "model"
_T = TypeVar("_T")
_ATTEMPTS = 5  # at a checkpoint that a run, which trains, deletes meanwhile
_DIGESTS = "digests"  # in the folder of caches: those of weights


@dataclasses.dataclass(frozen=True)
class Source:
    """A model on disk."""

    name: str
    huggingface: pathlib.Path
    """Folder with config.json and the tokenizer, of this machine; with the weights too if there is no checkpoint."""
    run: storage.Path | None = None
    """The stage's folder if it is one; the best of its checkpoints is meant."""
    cache: str = DataConfig.cache
    """Folder where the digests of weights are kept."""

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

    @functools.cached_property
    def lineage(self) -> lineage.Lineage:
        """Of a stage: what it was begun with.

        Raises:
          UserError: the record is gone or damaged.
        """
        return lineage.read(self.run)

    @property
    def start(self) -> str:
        """The model that the stage began with: `sample`, or the path where it was, or is if the run was moved."""
        return lineage.resolve(self.lineage.start.model, self.run)

    @functools.cached_property
    def weights(self) -> str:
        """Digest of the weights. Every process has to ask.

        Raises:
          UserError: there are none, or no record of those below adapters.
          StorageError: of the checkpoints none is sound.
        """
        step = self.step if self.run else None
        return hosts.share("weights", self._digest(step) if hosts.is_first() else None)

    def _digest(self, step: int | None) -> str:
        if self.run is None:
            return lineage.digest(weights.files(self.huggingface), pathlib.Path(self.cache) / _DIGESTS)
        trained = Checkpoints(self.run / "checkpoints").digest(step, "decoder")
        return lineage.combined([trained, self._below.weights]) if self.adapters() else trained

    @property
    def _below(self) -> lineage.Origin:
        """The model below the stage's adapters."""
        if self.lineage.below is None:
            raise lineage.damaged(self.run, "below is missing")
        return self.lineage.below

    def origin(self, folder: storage.Path) -> lineage.Origin:
        """For the record of a stage that begins with it in `folder`. Every process has to ask."""
        return lineage.Origin(lineage.place(_place(self), folder), self.weights, self.step if self.run else None)

    def origin_below(self, folder: storage.Path) -> lineage.Origin:
        """The same of the weights that adapters are trained on: this model's, or those below its own adapters."""
        if not self.adapters():
            return self.origin(folder)
        place = lineage.place(self.base_model(), folder)
        return dataclasses.replace(self._below, model=place)

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

        def adapted() -> Decoder:
            empty = random_decoder(self.decoder_config())
            lora.attach(empty, settings, seed=0)
            return empty

        graph, like, _ = nnx.split(nnx.eval_shape(adapted), nnx.LoRAParam, nnx.Param)
        trained = self._restore("decoder", nnx.to_pure_dict(like), mesh, jnp.float32)
        return nnx.merge(graph, trained, nnx.to_pure_dict(nnx.state(decoder, nnx.Param)))

    def _below_adapters(self, use: Callable[[Source], _T]) -> _T:
        """What `use` makes of the model below the stage's adapters, whose weights have to be those trained on."""
        known = self._below.weights
        try:
            source = dataclasses.replace(find(self.base_model()), cache=self.cache)
            if source.weights != known:
                raise UserError(
                    f"{source.name} has other weights than they were trained on (digest {known} then, "
                    f"{source.weights} now)"
                )
            return use(source)
        except UserError as error:
            raise UserError(
                f"{self.run} holds adapters alone, and their model cannot be read: {error}; put it back, or name its "
                f"new place in {self.run / lineage.FILE}"
            ) from None

    def base_model(self) -> str:
        """Where the weights are that adapters are trained on: this model, or the one below its adapters."""
        return lineage.resolve(self._below.model, self.run) if self.adapters() else _place(self)

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


def check_lineage(sources: Sequence[Source]) -> None:
    """Whether stages, and the models that they began with, still are those: where both are among `sources`.

    Raises:
      UserError: a model has other weights, configuration or tokenizer than a stage was begun with.
    """
    by_place = {_place(source): source for source in sources}
    for stage in (source for source in sources if source.run):
        start = by_place.get("sample" if stage.start == "sample" else str(storage.absolute(storage.path(stage.start))))
        if start is None or start is stage:
            continue
        if start.weights != stage.lineage.start.weights:
            raise UserError(
                f"{stage.run} was trained from other weights than {start.name} has now (digest "
                f"{stage.lineage.start.weights} then, {start.weights} now), so that they cannot be compared; put those "
                f"back, train {stage.name} anew (--stage=all does), or evaluate it with --model alone"
            )
        if start.run is None:
            companions.check(stage.run, start.huggingface)


def _place(source: Source) -> str:
    path = source.run or source.huggingface
    return "sample" if path == SAMPLE_MODEL else str(storage.absolute(path))
