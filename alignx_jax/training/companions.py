"""What a model's folder holds besides weights, the tokenizer above all: runs and exports have copies of it."""

from __future__ import annotations

import pathlib

from alignx_jax import storage
from alignx_jax.exits import UserError
from alignx_jax.training import durable

_LEFT = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack", ".index.json", ".py")


def copy(source: pathlib.Path, to: storage.Path) -> None:
    """Copies what `find` finds in a Hugging Face folder; files that are there stay."""
    for file in find(source):
        if not (to / file.name).exists():
            durable.write(to / file.name, file.read_bytes())


def find(source: pathlib.Path) -> list[pathlib.Path]:
    """What a Hugging Face folder holds besides weights and code: the tokenizer above all.

    Raises:
      UserError: one of them is a link out of the folder, to a file that is perhaps not meant to be handed on. Links
        into the blobs of a model in Hugging Face's cache are none.
    """
    inside = source.resolve(), source.resolve().parent.parent / "blobs"
    files = [f for f in source.iterdir() if f.is_file() and not f.name.startswith(".") and not f.name.endswith(_LEFT)]
    for file in files:
        if not any(file.resolve().is_relative_to(folder) for folder in inside):
            raise UserError(f"{file} is a link to {file.resolve()}, out of the model's folder; copy the file itself")
    return files


def check(folder: storage.Path, source: pathlib.Path) -> None:
    """Whether the model's configuration and tokenizer are those that a stage was begun with: its folder has copies.

    Raises:
      UserError: names the file that has changed.
    """
    for file in find(source):
        copy = folder / "huggingface" / file.name
        if copy.is_file() and copy.read_bytes() != file.read_bytes():
            raise UserError(f"{file} is not what {folder} was begun with ({copy}); put it back, or give another --run")
