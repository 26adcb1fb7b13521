"""The command line: flags over the settings that a command begins with, and what each stage has to be given.

The embedded sample is used where it is typed, or through configs/sample.py where nothing of the user's own is typed.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Collection, Iterator, Sequence

import tyro

from alignx_jax import config_files as configs
from alignx_jax import console, storage
from alignx_jax.config import Config
from alignx_jax.config_files import STAGES
from alignx_jax.exits import UserError
from alignx_jax.runs import lineage

_SAMPLE = pathlib.Path(__file__).parent.parent / "configs" / "sample.py"
_FROM_BASE = ("prepare", "1", "all", "plan")  # stages that start from a pre-trained model
# Of one start, not of the run: a stage does not take them from the stage before it.
_OWN = ("stage", "run", "model", "hosts.", "evaluation.", "export.", "plan.", "topology", "compare", "profile")
_OWN += ("accept_changes", "mesh")
_FIRST = """
  --stage=1                       prepare, 1, 2, evaluate, export, plan or all
  --config=configs/gemma3_270m.py what the flags go over
  --mesh=8x1                      devices: data x model
  --run=runs/mine                 folder of the run
  --model=FOLDER                  Hugging Face model to start from
  --data.parallel FILE FOLDER     translation pairs, for stage 1
  --data.instructions FILE        instructions or chats, for stage 2
  --training.rows=32              packed rows a step
  --optimizer.learning-rate=2e-6  the peak
  --evaluation.sentences=FILE     sentences in several languages, for evaluate
""".strip("\n")

# Settings that say something of another, with which alone they are taken.
_OF = {"data.parallel_weights": "data.parallel", "data.instruction_weights": "data.instructions"}
_OF |= {"training.steps": "training.epochs", "lora.alpha": "lora.rank", "lora.targets": "lora.rank"}
_EXAMPLES = {
    "model": "a Hugging Face folder, such as --model=/models/Meta-Llama-3-8B",
    "data.parallel": "parallel text, such as --data.parallel /data/opus.de-en",
    "data.instructions": "instructions, such as --data.instructions /data/bactrian/",
    "evaluation.sentences": "multi-way sentences, such as --evaluation.sentences=flores200:devtest",
}
_Over = Callable[[Config], Config]
"""Puts the flags over a base, and checks the result."""
_Tell = Callable[[Collection[str]], None]


def parse(arguments: Sequence[str], tell: _Tell = lambda names: None) -> Config:
    """The settings of a command: its flags, over those that it begins with.

    It begins with --config, or without it with those of the run's own stage 1 (stage 2), with those that the models
    were trained with (evaluate, export), or with configs/sample.py.

    Args:
      tell: called with the names of the settings that stage 2 takes from stage 1, if there are any.

    Raises:
      UserError: a setting that cannot be, or one that the stage needs and that is not given; names the flag.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    known, rest = first.parse_known_args(arguments)
    about = (
        "AlignX in JAX. --config=FILE sets the base: a file of configs/, or the folder of a run or of one of its "
        "stages; flags go over it. "
        f"The defaults shown are those of {known.config or 'configs/sample.py, for the embedded sample'}.\n\n"
        f"Needed first:\n{_FIRST}"
    )
    if wrong := configs.unknown(rest):
        console.note(f"run.py: {wrong}")
        sys.exit(2)
    typed = configs.typed(rest)

    def over(base: Config) -> Config:
        return configs.check(tyro.cli(Config, args=rest, default=base, description=about, prog="run.py"))

    if known.config is None:
        config = _without_file(over, typed, tell)
    else:
        configs.check_text("config", known.config)
        config = _with_file(known.config, _stage(rest), over, typed, tell)
    for name in _needs(config):
        if not configs.flat(config)[name]:
            raise UserError(f"--{name} is not given; give {_EXAMPLES[name]}")
    return config


def _stage(arguments: Sequence[str]) -> str | None:
    flag = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flag.add_argument("--stage", nargs="?")
    return flag.parse_known_args(arguments)[0].stage


def _with_file(path: str, stage: str | None, over: _Over, typed: Collection[str], tell: _Tell) -> Config:
    """With --config; stage 2 takes what a file leaves open, and the pairs, from the run's stage 1."""
    base = configs.load(path, stage or "1")
    saved = not path.endswith(".py")
    if saved:  # of the start that wrote it
        base = dataclasses.replace(base, hosts=Config.hosts, profile=None, model=_begun_with(path, base))
    stage = stage or base.stage
    base = dataclasses.replace(base, model=_model(base, stage, path, typed))
    config = over(base)
    if stage != "2" or (saved and base.stage == "2") or (stage_1 := _stage_1(config.run)) is None:
        return config
    own, theirs = configs.flat(base), configs.flat(stage_1)
    default = configs.flat(Config())
    taken = {name for name in own if own[name] == default[name]} | {"data.parallel", "data.parallel_weights"}
    taken = _inherited(taken, typed)
    tell([name for name in theirs if name in taken and theirs[name] != own[name]])
    return over(configs.with_values(base, {name: theirs[name] for name in taken}))


def _without_file(over: _Over, typed: Collection[str], tell: _Tell) -> Config:
    """Without --config: the run's own settings, or the sample's where nothing of the user's own is typed."""
    sample = configs.load(str(_SAMPLE))
    asked = over(dataclasses.replace(sample, model=None))
    if asked.stage in ("evaluate", "export"):
        return over(base_of_models(asked, sample))
    if asked.stage == "2" and (stage_1 := _stage_1(asked.run)) is not None:
        default, theirs = configs.flat(Config()), configs.flat(stage_1)
        taken = _inherited(theirs, typed)
        tell([name for name in theirs if name in taken and theirs[name] != default[name]])
        base = configs.with_values(Config(run=asked.run), {name: theirs[name] for name in taken})
        return over(base)
    if asked.stage == "plan" and (asked.model not in (None, "sample") or "plan.shapes" in typed):
        return over(Config())
    typed_models = () if asked.model is None else (asked.model,)
    for name, values in (
        ("model", typed_models),
        ("data.parallel", asked.data.parallel),
        ("data.instructions", asked.data.instructions),
    ):
        if values in ((), ("sample",)):
            continue
        if asked.stage == "2" and asked.model is None:
            raise no_stage_1(asked.run)
        raise UserError(
            f"--{name} is given without --config, whose default, configs/sample.py, has settings for the embedded "
            "sample alone; give --config=configs/gemma3_270m.py (a small model), configs/llama3_8b_opus100.py, "
            "configs/published.py (published settings), or your own"
        )
    return asked if asked.stage == "2" else over(sample)


def no_stage_1(run: object) -> UserError:
    return UserError(f"stage 2 starts from stage 1, which {run} does not have; run it, or give --model")


def base_of_models(asked: Config, sample: Config) -> Config:
    """The base of `evaluate` and `export` without --config.

    Template, row length and precision are those that the models were trained with: of the newest stage of --run, or
    with --model of the first run among the models. What is measured is as `Config` has it; the settings of `sample`,
    for sentences of a few words, are for runs on the embedded sample and for its model alone.
    """
    if asked.model is None:
        folders = [storage.path(asked.run) / name for name in reversed(STAGES)]
    else:
        given = [storage.path(path) for path in (asked.model, *asked.compare) if path != "sample"]
        folders = [folder for folder in given if (folder / "huggingface").is_dir()]
    stage = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    sample = dataclasses.replace(sample, model=None)
    if stage is None:
        return sample if asked.model is None or not given else Config()
    trained = configs.load(str(stage))
    base = sample if trained.data.parallel == ("sample",) else Config()
    data = dataclasses.replace(trained.data, cache=base.data.cache)  # a folder of this machine
    run = asked.run if asked.model is None else base.run
    return dataclasses.replace(base, run=run, data=data, training=trained.training)


def _model(base: Config, stage: str, path: str, typed: Collection[str]) -> str | None:
    """The model that a configuration names for `stage`: what it names is for its own stage.

    Stage 2 starts from stage 1, and evaluate and export take the run's stages, where --model is not typed.
    """
    if stage == "plan" and "plan.shapes" in typed:  # a flag goes before the file
        return None
    if stage == base.stage or {stage, base.stage} <= {*_FROM_BASE}:
        return base.model
    if stage in _FROM_BASE and base.stage == "2" and base.model:  # of a run: the model that its stage 1 began with
        beside = storage.path(path).parent / storage.path(base.model).name
        places = (beside, storage.path(base.model))
        return next((configs.load(str(x)).model for x in places if (x / "huggingface").is_dir()), base.model)
    return None


def _begun_with(path: str, base: Config) -> str | None:
    """The model that a saved stage began with, where that is now."""
    given = storage.path(path)
    folder = given.parent if given.suffix == ".json" else given
    places = (folder, *(folder / name for name in STAGES))
    for place in places:
        if (place / lineage.FILE).is_file() and configs.load(str(place)).stage == base.stage:
            return lineage.resolve(lineage.read(place).start.model, place)
    return base.model


def _stage_1(run: str) -> Config | None:
    """The settings of the run's stage 1, if it has one."""
    folder = storage.path(run) / "stage1"
    return configs.load(str(folder)) if (folder / "config.json").is_file() else None


def _inherited(names: Collection[str], typed: Collection[str]) -> set[str]:
    """Those of the settings that stage 2 may take from stage 1."""
    may = {name for name in names if not name.startswith(_OWN) and name not in typed}
    return {name for name in may if _OF.get(name, name) in may}


def _needs(config: Config) -> Iterator[str]:
    """Settings that the stage cannot do without."""
    stage, share = config.stage, config.data.translation_share
    if stage in ("prepare", "1", "all") or (stage == "plan" and not config.plan.shapes):
        yield "model"
    if stage in ("prepare", "1", "all") or (stage == "2" and share > 0):
        yield "data.parallel"
    if stage in ("prepare", "2", "all") and share < 1:
        yield "data.instructions"
    if stage in ("evaluate", "all"):
        yield "evaluation.sentences"
