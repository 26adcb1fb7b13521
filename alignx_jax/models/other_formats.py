"""What a path is that is no Hugging Face folder with safetensors, and what to do with it, as the end of a sentence."""

from __future__ import annotations

import pathlib
import re

import huggingface_hub

from alignx_jax import storage

ADAPTERS = "adapter_config.json"
"""The file that makes a folder one of PEFT; transformers too reads another model's weights then, not this folder's."""
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2", ".zst", ".7z")
_FOREIGN = {".h5": "TensorFlow", ".msgpack": "Flax", ".onnx": "ONNX", ".mlpackage": "Core ML"}
_GGUF = "which are of llama.cpp, quantized most often; give the Hugging Face folder that they were made from"
_CONVERT = "transformers.AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
_NEITHER = "neither a Hugging Face folder nor a stage of a run"
_LISTED = 3


def missing(name: str) -> str:
    """Of a path where nothing is."""
    if re.match(r"(?!gs:)\w+://", name):
        return "an address; download the model (hf download NAME --local-dir=FOLDER), and give its folder"
    usual = "no such folder; give a Hugging Face folder, a stage's folder of a run, or `sample`"
    if not re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", name):
        return usual
    cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return (
            f"no such folder; if it is the model on the Hub, give its copy in the cache, {pathlib.Path(cached).parent}"
        )
    if "/" not in name:
        return usual
    return f"{usual}; a model on the Hub is downloaded before (hf download {name} --local-dir=FOLDER)"


def file(path: pathlib.Path) -> str:
    """Of a file in the place of a folder."""
    kind, whole = path.suffix.lower(), (path.parent / "config.json").is_file()
    if kind == ".gguf" or _starts(path, b"GGUF"):
        return f"a file of GGUF weights, {_GGUF}"
    if path.name.startswith("adapter_"):
        return f"part of {adapters(path.parent)}"
    if kind in _ARCHIVES:
        return "an archive; unpack it, and give the folder"
    if whole:
        return f"a file; give its folder, {path.parent}"
    if kind in (".safetensors", *_PICKLED):
        return "a file of weights alone; download the whole model, with config.json and tokenizer, and give its folder"
    return "a file; give a Hugging Face folder, a stage's folder of a run, or `sample`"


def folder(path: storage.Path) -> str:
    """Of a folder that is no model, and no stage of a run."""
    stages = [path / name for name in ("stage2", "stage1", "control") if (path / name).is_dir()]
    stages += [up for up in path.parents if (up / "huggingface").is_dir() and (up / "checkpoints").is_dir()]
    if stages:
        return f"{_NEITHER}; did you mean {' or '.join(map(str, stages))}?"
    return (None if storage.is_remote(path) else _other(path)) or f"{_NEITHER} (it has no config.json)"


def _other(path: pathlib.Path) -> str | None:
    if (path / ADAPTERS).is_file():
        return adapters(path)
    if path.name.startswith("models--") or (path / "snapshots").is_dir():
        return _cached(path)
    if models := sorted(path.glob("models--*")):
        return f"a cache of Hugging Face; give a folder of weights in it, such as {_snapshot(models[0]) or models[0]}"
    if sorted(path.glob("*.gguf")):
        return f"a folder of GGUF weights, {_GGUF}"
    if (path / "params.json").is_file():
        return "a model in its maker's own layout (params.json); give its Hugging Face folder, which has a config.json"
    if (path / "model_index.json").is_file():
        return "a pipeline of diffusers; give the folder of a decoder"
    if models := sorted(file.parent for file in path.glob("*/config.json")):
        more = f" and {len(models) - _LISTED} more" if len(models) > _LISTED else ""
        return f"a folder of folders; did you mean {' or '.join(map(str, models[:_LISTED]))}{more}?"
    return None


def adapters(path: pathlib.Path) -> str:
    """Of a folder of PEFT."""
    merged = f"; if its model.safetensors has them merged already, delete {ADAPTERS}"
    return (
        "adapters of PEFT (LoRA) without their model; export the run without --export.adapter, or merge them into it: "
        "peft.PeftModel.from_pretrained(MODEL, FOLDER).merge_and_unload().save_pretrained(NEW_FOLDER)"
    ) + (merged if (path / "model.safetensors").is_file() else "")


def in_place_of_weights(path: pathlib.Path) -> str:
    """Of a folder that has a config.json and no weights that are read."""
    usual = "it needs model.safetensors, or model.safetensors.index.json and the files that this names"
    names = {file.suffix.lower(): file.name for file in sorted(path.iterdir(), reverse=True)}
    if dangling := sorted(f.name for f in path.iterdir() if f.is_symlink() and not f.exists()):
        return f"no weights; {dangling[0]} is a link to a file that is gone; download it again"
    if path.name == "huggingface" and (path.parent / "checkpoints").is_dir():
        return f"no weights, but the configuration and tokenizer of a stage; give the stage's folder, {path.parent}"
    if ".gguf" in names:
        return f"its weights are GGUF files, {_GGUF}"
    for kind in _PICKLED:
        if kind in names:
            return (
                f"its weights are pickled {kind} files, which can run code when read; convert them with transformers: "
                + _CONVERT
            )
    if foreign := [said for kind, said in _FOREIGN.items() if kind in names]:
        return f"its weights are files of {foreign[0]}; {usual}"
    if ".safetensors" in names:
        return f"{names['.safetensors']} is not the whole model; {usual}; download it again"
    return f"no weights; {usual}"


def _cached(path: pathlib.Path) -> str:
    name = path.name.removeprefix("models--").replace("--", "/")
    if snapshot := _snapshot(path):
        return f"a folder of Hugging Face's cache; give the snapshot in it, {snapshot}"
    return f"a folder of Hugging Face's cache without a whole model; download it again (hf download {name})"


def _snapshot(path: pathlib.Path) -> pathlib.Path | None:
    """That of the main branch if it is there."""
    snapshots = [file.parent for file in path.glob("snapshots/*/config.json")]
    main = path / "refs" / "main"
    named = main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else None
    return max(snapshots, key=lambda one: (one.name == named, one.stat().st_mtime), default=None)


def _starts(path: pathlib.Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(len(magic)) == magic
    except OSError:
        return False
