"""The folder of a stage: whose it is, how it is begun, and what may change when it goes on.

It holds `config.json`, `lineage.json`, `data.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`, and in
`huggingface/` the model's configuration and tokenizer, with checksums, so that it can be evaluated, exported or trained
further by itself. One of adapters (LoRA) needs the model below them besides.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Literal

from alignx_jax import hosts, sharding, storage
from alignx_jax.config import Config, Role
from alignx_jax.config_files import flat, from_json, roles, to_json
from alignx_jax.data import corpora, prompts
from alignx_jax.exits import UserError
from alignx_jax.runs import companions, lineage, loading
from alignx_jax.runs.lineage import Lineage

_BEGUN = ("huggingface", lineage.FILE, "config.json")  # `claim` writes them, in this order
_VISIBLE = 60  # seconds for a new file to be seen on other hosts

State = Literal["new", "same", "changed"]


def state(folder: storage.Path, config: Config, now: Lineage) -> State:
    """Whether `folder` is new or empty, a stage's of this very configuration and data, or one of others that
    `config.accept_changes` lets go on. Writes nothing.

    Raises:
      UserError: the folder belongs to another configuration, other data or another model, and that is not accepted or
        cannot be, as the state's arrays depend on it; names what differs.
    """
    saved = folder / "config.json"
    if not saved.is_file():
        if folder.is_dir() and {file.name.removesuffix(".new") for file in folder.iterdir()} - set(_BEGUN):
            raise UserError(f"{folder} is not empty and not a run of ours; give another --run")
        return "new"
    differences = _differences(from_json(saved.read_bytes(), str(saved)), config)
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
    begun = lineage.read(folder)
    for name, then, here in (("model", begun.start, now.start), ("model below the adapters", begun.below, now.below)):
        if then and here and then.weights != here.weights:
            raise UserError(
                f"{folder} was begun with another {name} than {lineage.resolve(here.model, folder)} is now (digest of "
                f"the weights {then.weights} then, {here.weights} now); put that back, give another --run, or delete "
                "the folder to train it anew (--stage=all does so, and keeps the former)"
            )
    changed = _changed_data(begun, now)
    if changed and not config.accept_changes:
        raise UserError(
            f"{folder} was begun with other content of {', '.join(changed)}; give another --run, or --accept-changes"
        )
    return "changed" if differences or changed else "same"


def _changed_data(begun: Lineage, now: Lineage) -> list[str]:
    """The sources, by the names that they have now, with other contents than those in their places then."""
    then, here = ([(content.kind, content.digest) for content in one.data] for one in (begun, now))
    if len(then) != len(here):
        return [content.source for content in now.data]
    return [content.source for content, before, after in zip(now.data, then, here, strict=True) if before != after]


def _reshapes(name: str, there: object, here: object) -> bool:
    """Whether the saved arrays depend on it; of a loss's weight, on whether it is 0."""
    return roles()[name] is Role.SHAPE and not (name.endswith(".weight") and there and here)


def _differences(saved: Config, asked: Config) -> dict[str, tuple[object, object]]:
    """Settings that may not differ and do: by their names, as saved and as asked for."""
    old, new = flat(saved), flat(asked)
    counts = (Role.RESULT, Role.SHAPE)
    differences = {k: (old[k], new[k]) for k in old if old[k] != new[k] and roles()[k] in counts}
    shards = {sharding.data_shards(sharding.abstract_mesh(config.mesh)) for config in (saved, asked)}
    if len(shards) > 1 and _pairs_meet_by_device(saved):
        differences["mesh"] = saved.mesh, asked.mesh
    return differences


def _pairs_meet_by_device(config: Config) -> bool:
    """Whether the losses depend on how many devices the rows are divided among."""
    objective = config.objective
    pairs = config.stage == "1" and (objective.contrastive.weight or objective.language_matching.weight)
    return bool(pairs) and objective.negatives == "micro-batch"


def claim(folder: storage.Path, config: Config, source: loading.Source, begun: Lineage) -> None:
    """Makes `folder`, new or empty or left half-made, the folder of a stage: it is one once it has its config.json.

    Args:
      source: the model that it begins with.
    """
    storage.remove(folder / "huggingface")  # of another model, perhaps
    storage.make(folder / "huggingface")
    companions.keep(source.huggingface, folder / "huggingface")
    storage.write(folder / lineage.FILE, lineage.text(begun))
    storage.write(folder / "config.json", _config_text(config))
    if not storage.is_remote(folder):
        storage.sync(folder.parent)


def accept(folder: storage.Path, config: Config, now: Lineage) -> None:
    """Writes changed settings and data down; the former ones stay beside, as `config.1.json` and `lineage.1.json`, and
    so on. What the stage began with stays."""
    kept = dataclasses.replace(lineage.read(folder), data=now.data)
    number = 1 + sum(1 for _ in folder.glob("config.*.json"))
    for name, text in (("lineage", lineage.text(kept)), ("config", _config_text(config))):
        storage.write(folder / f"{name}.{number}.json", (folder / f"{name}.json").read_bytes())
        storage.write(folder / f"{name}.json", text)


def _config_text(config: Config) -> str:
    """With paths as any working directory has them, and without the permission to change it, which is given once."""
    data = dataclasses.replace(
        config.data,
        parallel=tuple(corpora.place("parallel", source) for source in config.data.parallel),
        instructions=tuple(corpora.place("instructions", source) for source in config.data.instructions),
        template=prompts.place(config.data.template),
    )
    model = config.model if config.model in (None, "sample") else str(storage.absolute(storage.path(config.model)))
    return to_json(dataclasses.replace(config, model=model, data=data, accept_changes=False)) + "\n"


def set_aside(folder: storage.Path, what: str) -> storage.Path:
    """Renames a folder that something else takes the place of, to the first free `NAME.1`, `NAME.2`; its new path.

    Args:
      what: a sentence on why.

    Raises:
      UserError: it is in object storage, where nothing is renamed.
    """
    if storage.is_remote(folder):
        raise UserError(f"{what}; delete {folder}, or give another --run")
    kept = storage.free(folder)
    folder.rename(kept)
    storage.sync(folder.parent)
    return kept


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
