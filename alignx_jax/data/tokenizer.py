"""The tokenizer of a Hugging Face folder: what becomes of a text, everywhere in this package.

Ids are those of the folder's own files. A text is taken to the letter; control tokens are what templates write
(`controls`). BOS comes before a text where the folder's tokenizer puts it there, and only once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from alignx_jax.data.backends import Encoding, Fast, SentencePiece, added_tokens
from alignx_jax.data.controls import Controls
from alignx_jax.exits import UserError

_LARGEST = 2**28  # bytes of a tokenizer's file; published ones have up to 35 MB
_LIBRARIES = ("tokenizers", "sentencepiece", "transformers", "jinja2")

_MARKERS = re.compile(r"{%-?\s*generation\s*-?%}")  # as transformers finds them
_FIXED_DATE = """{% macro strftime_now(format) %}\
{{ format.replace('%Y', '2024').replace('%m', '07').replace('%d', '26').replace('%b', 'Jul').replace('%B', 'July') }}\
{% endmacro %}
"""
"""What is prepared may not change from day to day; Llama 3.1's template takes this date where it is told none."""


class _Backend(Protocol):
    controls: Controls
    prefix: tuple[int, ...]
    size: int
    text_size: int

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]: ...
    def ids_of_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


@dataclasses.dataclass(frozen=True)
class Chats:
    """How a tokenizer writes chats."""

    template: str
    """Jinja."""
    names: Mapping[str, str]
    """Control tokens by the names that a template has for them, as `eos_token`."""

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, continues: bool = False
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """What the template makes of a chat, and the characters [start, end) that its `{% generation %}` markers hold.

        The second is None where it has no markers.

        Args:
          add_generation_prompt: as of `apply_chat_template` of transformers.
          continues: its `continue_final_message`.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        marked = _MARKERS.search(self.template) is not None
        (text,), places = render_jinja_template(
            [list(messages)],
            chat_template=_FIXED_DATE + self.template,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continues,
            **self.names,
        )
        return text, places[0] if marked else None


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer that adds no special token by itself."""

    bos_id: int | None
    """Token named as BOS; whether it comes before a text, `prefix` says."""
    eos_id: int
    unk_id: int | None
    """Token of what the tokenizer cannot write; None if it writes everything, byte by byte at worst."""
    vocab_size: int
    """One more than the largest token id."""
    fingerprint: str
    """Changes with whatever decides the ids of a text or chat: the files, and the libraries that read them."""
    backend: _Backend
    prefix: tuple[int, ...] = ()
    """Tokens that the folder's own tokenizer puts before a text: BOS of most models, none of many."""
    eos: str = ""
    """How the end token is spelled."""
    chats: Chats | None = None
    """None where no chat template is."""

    @property
    def start(self) -> tuple[int, ...]:
        """What the first token of a text is predicted from: `prefix`, else BOS, else EOS (as `hf` of the harness)."""
        return self.prefix or (self.eos_id if self.bos_id is None else self.bos_id,)

    @property
    def controls(self) -> Controls:
        """Marks for the control tokens that a template spells."""
        return self.backend.controls

    def begin(self, ids: Sequence[int]) -> list[int]:
        """`ids` behind `prefix`, unless they begin with it: a template may write BOS itself."""
        return [*self.before(ids), *ids]

    def before(self, ids: Sequence[int]) -> tuple[int, ...]:
        """What `begin` puts before `ids`."""
        return () if tuple(ids[: len(self.prefix)]) == self.prefix else self.prefix

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """Ids and character offsets of each text, taken to the letter; marks (`controls`) are control tokens.

        Tokens that are bytes of one character all cover that character.

        Raises:
          UserError: a regular expression of the tokenizer that never ends on such a text.
        """
        return self.backend.encode_batch(texts)

    def ids_of_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_batch` without the offsets, which take a third of its time."""
        return self.backend.ids_of_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens and those that the tokenizer does not have."""
        return self.backend.decode([int(i) for i in ids])


def load(folder: str | pathlib.Path, rows: int | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.json as it is written, else tokenizer.model or vocab.json.

    Args:
      rows: of the model's embedding, which has to hold every token that text can give.

    Raises:
      UserError: no tokenizer in the folder, one that cannot be read, that has no fast form, no end-of-text token, or
        more tokens of text than `rows`.
    """
    folder = pathlib.Path(folder).expanduser()
    try:
        made = _load(folder, rows)
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the libraries raise whatever their parsers do; a panic of Rust is no Exception
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{folder}: the tokenizer cannot be read ({reason}); copy its files again") from error
    if made.eos_id is None:
        raise UserError(f"{folder}: the tokenizer has no end-of-text token; set eos_token in tokenizer_config.json")
    needed = max(made.backend.text_size, *(i + 1 for i in (made.eos_id, *made.start)))
    if rows is not None and needed > rows:
        raise UserError(
            f"{folder}: text can give the tokenizer's tokens up to {needed - 1}, but the model's embedding has only "
            f"{rows} rows; take the tokenizer that belongs to the model"
        )
    return made


def _load(folder: pathlib.Path, rows: int | None) -> Tokenizer:
    config = _config(folder / "tokenizer_config.json")
    names = {"tokenizer.json", *(config.get("fast_tokenizer_files") or ())}
    if written := [folder / name for name in names if (folder / name).is_file()]:
        return _fast(folder, rows, set.union(*map(added_tokens, written)))
    if (folder / "tokenizer.model").is_file():
        return _sentencepiece(folder, rows)
    if (folder / "vocab.json").is_file():
        return _fast(folder, rows, None)
    raise UserError(f"{folder}: no tokenizer here; it needs tokenizer.json or tokenizer.model of the model")


def _config(file: pathlib.Path) -> dict[str, Any]:
    for other in file.parent.glob("*tok*"):
        if other.is_file() and other.stat().st_size > _LARGEST:
            raise UserError(f"{other}: {other.stat().st_size:,} bytes, more than any tokenizer has; copy it again")
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if config.get("auto_map"):  # transformers would refuse it too, or silently take another class in its place
        raise UserError(
            f"{file}: auto_map names code of the tokenizer's own, which is never run; if tokenizer.json does without "
            "it, remove auto_map"
        )
    return config


def _fast(folder: pathlib.Path, rows: int | None, own: set[str] | None) -> Tokenizer:
    """transformers' classes of models build tokenizers of their own in the place of tokenizer.json; its base does not.

    Where the files name no end token, as old ones do, the class knows it.

    Args:
      own: added tokens of tokenizer.json; None without that file.
    """
    import transformers

    def by_class():
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    kind = transformers.PreTrainedTokenizerFast
    read = kind.from_pretrained(folder, local_files_only=True) if own is not None else by_class()
    if not read.is_fast:
        raise UserError(f"{folder}: the tokenizer has no fast form; save one that has a tokenizer.json")
    written = read.backend_tokenizer.to_str()
    backend = Fast(written, own, rows)
    named = read
    if not read.eos_token:
        with contextlib.suppress(Exception):  # there may be no class, and what it raises is its own affair
            named = by_class()
    names = {name: str(token) for name, token in named.special_tokens_map.items() if not isinstance(token, list)}

    def number(name: str) -> int | None:
        return None if name not in names else backend.number(names[name])

    ids = [number(f"{name}_token") for name in ("bos", "eos", "unk")]
    return _tokenizer(backend, ids, names, read.chat_template, [_hash(written.encode())])


def _sentencepiece(folder: pathlib.Path, rows: int | None) -> Tokenizer:
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    file = folder / "tokenizer.model"
    # `legacy` is read here: where it is off transformers wants a version of protobuf that Apache Beam does not allow.
    read = SentencePieceBackend.from_pretrained(folder, local_files_only=True, legacy=True)
    config = folder / "tokenizer_config.json"
    read.legacy = bool(json.loads(config.read_text(encoding="utf-8")).get("legacy", True)) if config.is_file() else True
    backend = SentencePiece(file, read, rows)
    names = {name: str(token) for name, token in read.special_tokens_map.items() if not isinstance(token, list)}
    ids = [backend.number(names.get(f"{name}_token"), name) for name in ("bos", "eos", "unk")]
    for name, i in zip(("bos_token", "eos_token", "unk_token"), ids, strict=True):
        if i is not None:
            names.setdefault(name, backend.spelled(i))
    content = [_hash(file.read_bytes()), repr(read.added_tokens_decoder), read.legacy]
    return _tokenizer(backend, ids, names, read.chat_template, content)


def _tokenizer(
    backend: Fast | SentencePiece, ids: list[int | None], names: dict[str, str], template: Any, content: list[Any]
) -> Tokenizer:
    if isinstance(template, dict):  # by name
        template = template.get("default")
    versions = [importlib.metadata.version(library) for library in _LIBRARIES]
    decisive = [content, ids, backend.prefix, names, template, versions]
    digest = _hash(json.dumps(decisive, sort_keys=True).encode())
    chats = None if template is None else Chats(template, names)
    bos, eos, unk = ids
    return Tokenizer(bos, eos, unk, backend.size, digest, backend, backend.prefix, names.get("eos_token", ""), chats)


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=10).hexdigest()
