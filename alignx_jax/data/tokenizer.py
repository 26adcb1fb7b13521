"""Tokenizers of Hugging Face folders, with the exact characters that every token covers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from alignx_jax.exits import UserError

_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)

_FIXED_DATE = """{% macro strftime_now(format) %}\
{{ format.replace('%Y', '2024').replace('%m', '07').replace('%d', '26').replace('%b', 'Jul').replace('%B', 'July') }}\
{% endmacro %}
"""
"""What is prepared may not change from day to day; Llama 3.1's template takes this date where it is told none."""

Encoding = tuple[np.ndarray, np.ndarray]
"""Token ids [n] int32, and the characters [n,2] int32 that each covers, as [start, end)."""


class _Backend(Protocol):
    chat_template: str | None
    special: tuple[str, ...]

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer that adds no special token by itself."""

    bos_id: int | None
    """Token put before a text, if the tokenizer has one."""
    eos_id: int
    unk_id: int | None
    """Token of what the tokenizer cannot write; None if it writes everything, byte by byte at worst."""
    vocab_size: int
    """One more than the largest token id."""
    fingerprint: str
    """Changes with any of the tokenizer's files."""
    backend: _Backend

    @property
    def chat_template(self) -> str | None:
        """Jinja that writes a chat; None if the tokenizer has none, or is SentencePiece's alone."""
        return self.backend.chat_template

    @property
    def special(self) -> tuple[str, ...]:
        """Tokens such as BOS and the end of a turn, as a chat template writes them; () without one."""
        return self.backend.special

    def apply_chat_template(self, messages: Sequence[dict[str, str]], **options: Any):
        """What transformers' method of this name makes of a chat with `options`; needs a `chat_template`."""
        return self.backend.apply_chat_template(messages, **options)

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """Ids and character offsets of each text.

        Tokens that are bytes of one character all cover that character.
        """
        return self.backend.encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens."""
        return self.backend.decode([int(i) for i in ids])


class _Fast:
    """`tokenizer.json` and what transformers converts to it."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._rust = tokenizer.backend_tokenizer
        self._rust.no_truncation()  # a tokenizer.json may ask for either
        self._rust.no_padding()
        self.special = tuple(token.content for token in self._rust.get_added_tokens_decoder().values() if token.special)
        template = tokenizer.chat_template
        if isinstance(template, dict):  # by name
            template = template.get("default")
        self.chat_template = None if template is None else _FIXED_DATE + template

    def apply_chat_template(self, messages: Sequence[dict[str, str]], **options: Any):
        return self._tokenizer.apply_chat_template(list(messages), chat_template=self.chat_template, **options)

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        encodings = self._rust.encode_batch(list(texts), add_special_tokens=False)
        return [(np.array(e.ids, np.int32), np.array(e.offsets, np.int32).reshape(-1, 2)) for e in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class _SentencePiece:
    """`tokenizer.model`, read by SentencePiece itself: transformers' conversion of it gives other ids."""

    chat_template = None  # SentencePiece finds no special token in the text that a template writes
    special = ()

    def __init__(self, processor):
        self._processor = processor
        self._is_byte = np.array([processor.is_byte(i) for i in range(processor.vocab_size())])

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        encodings = self._processor.encode(list(texts), return_type="offset_mapping", num_threads=-1)
        return [self._encoding(np.array(e["ids"], np.int32), e["offsets"]) for e in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(list(ids))

    def _encoding(self, ids: np.ndarray, pairs: list[tuple[int, int]]) -> Encoding:
        """SentencePiece gives a character to the last of its byte tokens; this gives it to all of them."""
        offsets = np.array(pairs, np.int32).reshape(-1, 2)
        earlier = (offsets[:, 0] == offsets[:, 1]) & self._is_byte[ids]
        for i in np.flatnonzero(earlier)[::-1]:
            offsets[i, 1] = offsets[i + 1, 1]
        return ids, offsets


def load(folder: str | pathlib.Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder: from `tokenizer.model` if that is all there is, else the fast one.

    Raises:
      UserError: no tokenizer in the folder, one that cannot be read, that has no fast form, or no end-of-text token.
    """
    folder = pathlib.Path(folder).expanduser()
    files = [folder / name for name in _FILES if (folder / name).is_file()]
    names = {file.name for file in files}
    if not names & {"tokenizer.json", "tokenizer.model", "vocab.json"}:
        raise UserError(f"{folder}: no tokenizer here; it needs tokenizer.json or tokenizer.model of the model")
    digest = hashlib.blake2b(digest_size=10)
    for file in files:
        digest.update(f"{file.name}\0{hashlib.blake2b(file.read_bytes()).hexdigest()}\0".encode())
    try:
        if "tokenizer.model" in names and "tokenizer.json" not in names:
            import sentencepiece

            processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
            special = processor.bos_id(), processor.eos_id(), processor.unk_id()
            bos, eos, unk = (i if i >= 0 else None for i in special)
            size, backend = processor.vocab_size(), _SentencePiece(processor)
        else:
            import transformers

            _refuse_code(folder / "tokenizer_config.json")
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            if not tokenizer.is_fast:
                raise UserError(f"{folder}: the tokenizer has no fast form; save one that has a tokenizer.json")
            bos, eos, unk = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
            backend = _Fast(tokenizer)
            size = max(tokenizer.get_vocab().values()) + 1
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the libraries raise whatever their parsers do; a panic of Rust is no Exception
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{folder}: the tokenizer cannot be read ({reason}); copy its files again") from error
    if eos is None:
        raise UserError(f"{folder}: the tokenizer has no end-of-text token; set eos_token in tokenizer_config.json")
    return Tokenizer(bos, eos, unk, size, digest.hexdigest(), backend)


def _refuse_code(file: pathlib.Path) -> None:
    """transformers would refuse it too, or take another class in its place without a word."""
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("auto_map"):
        raise UserError(
            f"{file}: auto_map names code of the tokenizer's own, which is never run; if tokenizer.json does without "
            "it, remove auto_map"
        )


def check(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuses a tokenizer with ids that the model's embedding of `vocab_size` rows does not hold.

    Raises:
      UserError: naming both sizes.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model's embedding only {vocab_size} rows; "
            "take the tokenizer that belongs to the model"
        )
