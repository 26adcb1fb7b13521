"""What a model's folder holds besides weights, the tokenizer above all: runs and exports have copies of it."""

from __future__ import annotations

import fnmatch
import hashlib
import pathlib
import re

from alignx_jax import storage
from alignx_jax.data import cache
from alignx_jax.exits import UserError
from alignx_jax.models import fields, huggingface

_READ = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.*.json",  # of a version of transformers, which tokenizer_config.json may name
    "tokenizer.model",
    "tokenizer.model.v[0-9]*",
    "tekken.json",
    "tiktoken.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""What transformers and we look for in the folder of a decoder; patterns of fnmatch."""
_TEMPLATES = "additional_chat_templates/*.jinja"
"""Chat templates by name, besides the tokenizer's own; a pattern of glob."""
_SAID = re.compile(r"readme\.md|(licen[cs]e|notice|use_policy)([-_]\w+)?(\.(md|txt))?", re.IGNORECASE)
"""What is said of a model, and has to go with it."""


def copy(source: pathlib.Path, to: storage.Path) -> None:
    """Copies what `find` finds in a Hugging Face folder; files that are there stay."""
    for name, content in contents(source).items():
        if not (to / name).exists():
            _write(to / name, content)


def contents(source: pathlib.Path) -> dict[str, bytes]:
    """What `find` finds in a Hugging Face folder, by its path in it."""
    return {str(file.relative_to(source)): file.read_bytes() for file in find(source)}


def find(source: pathlib.Path) -> list[pathlib.Path]:
    """What of a Hugging Face folder is handed on besides weights: configuration, tokenizer, licence and README.

    Whatever else lies there is its owner's: keys, notes, code.

    Raises:
      UserError: one of them is a link out of the folder, to a file that is perhaps not meant to be handed on. Links
        into the blobs of a model in Hugging Face's cache are none.
    """
    inside, files = (source.resolve(), source.resolve().parent.parent / "blobs"), _files(source)
    for file in files:
        if not any(file.resolve().is_relative_to(folder) for folder in inside):
            raise UserError(f"{file} is a link to {file.resolve()}, out of the model's folder; copy the file itself")
    return files


def refuse_pointers(source: pathlib.Path) -> None:
    """
    Raises:
      UserError: a file that `find` finds is a pointer of Git LFS, or may not be read.
    """
    for file in _files(source):
        fields.refuse_pointer(file)


def _files(source: pathlib.Path) -> list[pathlib.Path]:
    named = [f for f in source.iterdir() if _is_read(f.name) or _SAID.fullmatch(f.name)]
    return [file for file in [*named, *source.glob(_TEMPLATES)] if file.is_file()]


def keep(source: pathlib.Path, to: storage.Path) -> None:
    """Copies what `find` finds into an empty folder of a stage, and beside it the checksums of what was copied.

    The weights stay behind: where config.json does not name their type, the copy of it does.
    """
    kept = contents(source) | {"config.json": _with_dtype(source)}
    for name, content in kept.items():
        _write(to / name, content)
    sums = (f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in kept.items())
    storage.write(to / cache.SUMS, "".join(sums))


def _with_dtype(source: pathlib.Path) -> bytes:
    """The config.json of a Hugging Face folder, with the type of its weights."""
    settings, file = huggingface.read_config(source), source / "config.json"
    if huggingface.named_dtype(settings, str(file)):
        return file.read_bytes()
    return huggingface.to_json(settings | {"dtype": huggingface.dtype(source)})


def _write(file: storage.Path, content: bytes) -> None:
    storage.make(file.parent)
    storage.write(file, content)


def check_copies(copies: pathlib.Path, where: storage.Path) -> None:
    """Whether the copies that `keep` made are as they were made. Those of before it made checksums are not checked.

    Args:
      copies: of this machine.
      where: they are kept.

    Raises:
      UserError: names the file that is changed, gone or new.
    """
    if not (copies / cache.SUMS).is_file():
        return
    try:
        known = cache.read_sums(copies)
    except ValueError as error:
        raise UserError(
            f"{where / cache.SUMS} is damaged ({error}); delete it, and copy the files beside it again from the folder "
            "of the model that the stage was begun with"
        ) from None
    for name in sorted(known.keys() | {str(file.relative_to(copies)) for file in find(copies)}):
        file = copies / name
        if not file.is_file() or cache.digest(file) != known.get(name):
            raise UserError(
                f"{where / name} is not what was copied there when the stage was begun, by {cache.SUMS} beside it; "
                "make it what it is in the folder of the model that the stage was begun with, or, if it is, delete "
                f"{cache.SUMS}"
            )


def check(folder: storage.Path, source: pathlib.Path) -> None:
    """Whether the model's configuration and tokenizer are those that a stage was begun with: its folder has copies.

    Raises:
      UserError: names the file that has changed, of the model or of the copies.
    """
    where = folder / "huggingface"
    copies = storage.local_copy(where)
    check_copies(copies, where)
    read = {str(file.relative_to(one)) for one in (source, copies) for file in find(one)}
    for name in sorted(name for name in read if not _SAID.fullmatch(name)):
        if not (copies / name).is_file():
            raise UserError(f"{source / name} was not there when {folder} was begun; remove it, or give another --run")
        if not (source / name).is_file() or not _is_copy(source, copies, name):
            raise UserError(
                f"{source / name} is not what {folder} was begun with ({where / name}); put it back, or give another "
                "--run"
            )


def _is_copy(source: pathlib.Path, copies: pathlib.Path, name: str) -> bool:
    if cache.digest(source / name) == cache.digest(copies / name):
        return True
    if name != "config.json":
        return False
    given, kept = huggingface.read_config(source), huggingface.read_config(copies)
    return not huggingface.named_dtype(given, name) and given | {"dtype": None} == kept | {"dtype": None}


def _is_read(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _READ)
