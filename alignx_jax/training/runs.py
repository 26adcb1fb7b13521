"""Folders of runs, and models to start from: Hugging Face folders and earlier stages alike.

A stage's folder holds `config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`, and in `huggingface/` the
model's configuration and tokenizer, so that it can be evaluated, exported or trained further by itself.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from alignx_jax import hosts, sharding
from alignx_jax.config import Config, UserError, flat, from_json, to_json
from alignx_jax.data import cache
from alignx_jax.models import families, huggingface
from alignx_jax.models.decoder import Decoder
from alignx_jax.objectives.language_matching import Classifier
from alignx_jax.training.checkpoints import Checkpoints
from alignx_jax.training.state import PairClassifier, Params

SAMPLE_MODEL = pathlib.Path(__file__).resolve().parent.parent / "sample" / "model"
# What may differ when a run continues, because its result does not depend on it.
_FREE = (
    "stage",
    "run",
    "mesh",
    "topology",
    "compare",
    "evaluation.",
    "export.",
    "plan.",
    "hosts.",
    "data.cache",
    "training.keep",
    "training.save_every",
)
_VISIBLE = 60  # seconds for a new file to be seen on other hosts
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


@dataclasses.dataclass(frozen=True)
class Source:
    """A model on disk."""

    name: str
    huggingface: pathlib.Path
    """Folder with config.json and the tokenizer; with the weights too if there is no checkpoint."""
    run: pathlib.Path | None = None
    """The stage's folder if it is one; the best of its checkpoints is meant."""

    def decoder_config(self) -> families.DecoderConfig:
        return families.decoder_config(huggingface.read_config(self.huggingface), str(self.huggingface / "config.json"))

    def fingerprint(self) -> str:
        """Changes with the model's configuration, and with the name or size of a file of weights or the tokenizer."""
        files = [file for file in self.huggingface.iterdir() if file.suffix in (".safetensors", ".model")]
        sizes = sorted((file.name, file.stat().st_size) for file in files)
        return cache.fingerprint(huggingface.read_config(self.huggingface), sizes)

    def config(self) -> Config | None:
        """What the stage was run with."""
        file = self.run and self.run / "config.json"
        return from_json(file.read_text(encoding="utf-8"), str(file)) if file else None

    def load(self, mesh: Mesh, dtype=jnp.float32) -> Decoder:
        """The decoder, sharded over `mesh`, with master weights of type `dtype`."""
        if self.run is None:
            return huggingface.load(self.huggingface, mesh, dtype)
        graph, params = abstract_decoder(self.decoder_config())
        return nnx.merge(graph, self._restore("decoder", params, mesh, dtype))

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
        checkpoints = Checkpoints(self.run / "checkpoints")
        try:
            return checkpoints.restore_part(hosts.share("best checkpoint", checkpoints.best), like)[part]
        finally:
            checkpoints.close()


def random_decoder(config: families.DecoderConfig) -> Decoder:
    """A decoder that holds no checkpoint's weights; under `nnx.eval_shape` it costs nothing and gives the shapes."""
    return Decoder(config, rngs=nnx.Rngs(0))


def abstract_decoder(config: families.DecoderConfig) -> tuple[nnx.GraphDef, dict]:
    """The decoder's structure, and its parameters with shapes in the place of arrays."""
    graph, variables = nnx.split(nnx.eval_shape(lambda: random_decoder(config)))
    return graph, nnx.to_pure_dict(variables)


def find(path: str) -> Source:
    """The model at `path`: `sample`, a Hugging Face folder, or a stage's folder of a run.

    Raises:
      UserError: no such folder, or neither of the two.
    """
    if path == "sample":
        return Source("sample", SAMPLE_MODEL)
    folder = pathlib.Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder; give a Hugging Face folder, a stage's folder of a run, or `sample`")
    if (folder / "huggingface").is_dir():
        _check_finished(folder)
        return Source(str(folder), folder / "huggingface", folder)
    if (folder / "config.json").is_file():
        return Source(str(folder), folder)
    stages = [f"{folder / s}" for s in ("stage2", "stage1") if (folder / s).is_dir()]
    hint = f"; did you mean {' or '.join(stages)}?" if stages else " (it has no config.json)"
    raise UserError(f"{path}: neither a Hugging Face folder nor a stage of a run{hint}")


def _check_finished(folder: pathlib.Path) -> None:
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        if checkpoints.latest is None:
            raise UserError(f"{folder}: this stage has saved no checkpoint yet; run it first")
    finally:
        checkpoints.close()


def can_continue(folder: pathlib.Path, config: Config, corpora: dict[str, str]) -> bool:
    """Whether `folder` is a stage's folder of `config` already; a new or empty one is not.

    Args:
      corpora: fingerprint of each source of data.

    Raises:
      UserError: the folder belongs to another configuration, or the data have changed; names what differs.
    """
    saved = folder / "config.json"
    if saved.is_file():
        differences = _differences(from_json(saved.read_text(encoding="utf-8"), str(saved)), config)
        if differences:
            raise UserError(
                f"{folder} belongs to another configuration ({'; '.join(differences)}); "
                "give another --run, or delete the folder"
            )
        known = json.loads((folder / "corpora.json").read_text(encoding="utf-8"))
        if changed := sorted(k for k in corpora if known.get(k) != corpora[k]):
            raise UserError(f"{folder} was begun with other content of {', '.join(changed)}; give another --run")
        return True
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and not a run of ours; give another --run")
    return False


def claim(folder: pathlib.Path, config: Config, source: Source, corpora: dict[str, str]) -> None:
    """Makes `folder`, new or empty, the folder of a stage; it is whole or not there."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    (fresh / "huggingface").mkdir(parents=True)
    copy_companions(source.huggingface, fresh / "huggingface")
    (fresh / "corpora.json").write_text(json.dumps(corpora, indent=2) + "\n", encoding="utf-8")
    (fresh / "config.json").write_text(to_json(config) + "\n", encoding="utf-8")
    if folder.is_dir():
        folder.rmdir()
    fresh.rename(folder)


def check_shared(folder: pathlib.Path) -> None:
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


def copy_companions(source: pathlib.Path, to: pathlib.Path) -> None:
    """Copies what a Hugging Face folder holds besides weights, tokenizer above all; files that are there stay."""
    for file in source.iterdir():
        wanted = file.is_file() and not file.name.startswith(".") and not file.name.endswith(_WEIGHTS)
        if wanted and not (to / file.name).exists():
            shutil.copyfile(file, to / file.name)


def _differences(saved: Config, asked: Config) -> list[str]:
    old, new = flat(saved), flat(asked)
    return [f"{k}: {old[k]} there, {new[k]} here" for k in old if old[k] != new[k] and not k.startswith(_FREE)]
