"""Text to ids by the libraries themselves: `tokenizers` for tokenizer.json, SentencePiece for tokenizer.model."""

from __future__ import annotations

import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from alignx_jax.data.controls import Controls, is_control, mark_of, unmark
from alignx_jax.exits import UserError

Encoding = tuple[np.ndarray, np.ndarray]
"""Token ids [n] int32, and the characters [n,2] int32 that each covers, as [start, end)."""

_LONGEST_PATTERN = 10_000  # characters; published ones have hundreds, and one of 400,000 takes 3 GB and half a minute
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
"""Of SentencePiece's ModelProto: field 3, the normalizer, whose field 3, add_dummy_prefix, is 0. Protobuf merges what
is appended to a message; so this takes no protobuf, of which Apache Beam and SentencePiece want different versions."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Fast:
    """`tokenizer.json` as it is written, but that it knows control tokens by their marks alone.

    The tokens are renamed in a copy of the file, in its vocabulary too, so that nothing else can give their ids.
    """

    def __init__(self, written: str, own: set[str] | None, rows: int | None):
        """
        Args:
          written: what transformers has read of the file; the tokens that others name are added tokens in it.
          own: added tokens of the file itself; a character that is none of them stays text, as `!` named as padding.
            None: all that `written` has.
          rows: as of `Controls`.
        """
        import tokenizers

        parsed = json.loads(written)
        parsed |= {"truncation": None, "padding": None}  # a tokenizer.json may ask for either
        added = [
            token
            for token in parsed["added_tokens"]
            if own is None or token["content"] in own or len(token["content"]) > 1
        ]
        parsed["added_tokens"] = added
        names = {token["content"] for token in added if is_control(token["content"], token["special"])}
        self._rust = tokenizers.Tokenizer.from_str(json.dumps(_renamed(parsed, names), ensure_ascii=False))
        self.controls = Controls({name: self._rust.token_to_id(mark_of(name)) for name in sorted(names)}, rows)
        self.size = max(self._rust.get_vocab().values()) + 1
        produced = _produced(parsed["model"], names)
        produced |= {self._rust.token_to_id(token["content"]) for token in added if token["content"] not in names}
        self.text_size = max(produced, default=0) + 1
        self.prefix = self._added_before()

    def _added_before(self) -> tuple[int, ...]:
        """What the file's post-processor puts before a text."""
        for text in "a0\u4e00":
            alone, whole = (self._rust.encode(text, add_special_tokens=add).ids for add in (False, True))
            if alone:
                places = (i for i in range(len(whole)) if whole[i : i + len(alone)] == alone)
                return tuple(whole[: next(places, 0)])
        return ()

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        return [(np.array(e.ids, np.int32), _pairs(e.offsets)) for e in self._encoded(self._rust.encode_batch, texts)]

    def ids_of_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(e.ids, np.int32) for e in self._encoded(self._rust.encode_batch_fast, texts)]

    def _encoded(self, encode: Callable[..., list[Any]], texts: Sequence[str]) -> list[Any]:
        try:
            return encode(list(texts), add_special_tokens=False)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of Rust is no Exception
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"tokenizer.json cannot encode a text ({reason}); take the published file") from error

    def number(self, content: str) -> int | None:
        """The id of a token as it is spelled in the file."""
        known = self.controls.ids.get(content)
        return self._rust.token_to_id(content) if known is None else known

    def decode(self, ids: Sequence[int]) -> str:
        return unmark(self._rust.decode(list(ids), skip_special_tokens=True))


def _pairs(offsets: list[tuple[int, int]]) -> np.ndarray:
    """[n,2]; `np.array` takes twice the time for tuples."""
    return np.fromiter(itertools.chain.from_iterable(offsets), np.int32, 2 * len(offsets)).reshape(-1, 2)


def added_tokens(file: pathlib.Path) -> set[str]:
    """The added tokens of a tokenizer.json.

    Raises:
      UserError: a regular expression in it is far longer than any tokenizer's, and nobody could compile it.
    """
    parsed = json.loads(file.read_bytes())
    length = max(map(len, _patterns(parsed)), default=0)
    if length > _LONGEST_PATTERN:
        raise UserError(f"{file}: a regular expression of {length:,} characters; copy the published file again")
    return {token["content"] for token in parsed.get("added_tokens", ())}


def _patterns(parsed: Any) -> Iterator[str]:
    """Regular expressions anywhere in a tokenizer.json."""
    if isinstance(parsed, list):
        for value in parsed:
            yield from _patterns(value)
    elif isinstance(parsed, dict):
        for key, value in parsed.items():
            if key == "Regex" and isinstance(value, str):
                yield value
            elif key not in ("vocab", "merges", "added_tokens"):
                yield from _patterns(value)


def _renamed(parsed: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """A tokenizer.json with marks in the place of control tokens, and without merges that would make them."""
    model = dict(parsed["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {_name(piece, names): number for piece, number in model["vocab"].items()}
    else:
        model["vocab"] = [[_name(piece, names), score] for piece, score in model["vocab"]]
    if "merges" in model:
        model["merges"] = [m for m in map(_pair, model["merges"]) if names.isdisjoint((*m, "".join(m)))]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = _name(model["unk_token"], names)
    added = [token | {"content": _name(token["content"], names)} for token in parsed["added_tokens"]]
    return parsed | {"model": model, "added_tokens": added}


def _name(piece: str, names: set[str]) -> str:
    return mark_of(piece) if piece in names else piece


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ", 1) if isinstance(merge, str) else merge


def _produced(model: dict[str, Any], names: set[str]) -> set[int]:
    """Ids that text can give by a model of `tokenizers`, added tokens aside."""
    vocab = model["vocab"] if isinstance(model["vocab"], dict) else {v[0]: n for n, v in enumerate(model["vocab"])}
    ids = {piece: number for piece, number in vocab.items() if piece not in names}
    affixes = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
    if model.get("type") == "BPE" and not any(affixes) and not model.get("ignore_merges"):
        merged = {"".join(_pair(merge)) for merge in model["merges"]}
        ids = {p: n for p, n in ids.items() if len(p) == 1 or p in merged or _BYTE.fullmatch(p)}
    unknown = model.get("unk_token")
    return set(ids.values()) | ({vocab[unknown]} if unknown in vocab else set())


class SentencePiece:
    """`tokenizer.model`, read by SentencePiece itself: transformers' conversion of it gives other ids.

    Tokens that files beside it add are taken out of a text first, as transformers 4 did (`PreTrainedTokenizer` of
    tokenization_utils.py), control tokens by their marks.
    """

    def __init__(self, file: pathlib.Path, beside, rows: int | None):
        """
        Args:
          beside: transformers' tokenizer of the folder, which has read what stands beside the file.
          rows: as of `Controls`.
        """
        import sentencepiece

        self._whole = sentencepiece.SentencePieceProcessor(model_file=str(file))
        # For what stands behind an added token: without the space that SentencePiece puts before a text.
        self._inner = self._whole
        if not beside.legacy:
            unprefixed = file.read_bytes() + _NO_DUMMY_PREFIX
            self._inner = sentencepiece.SentencePieceProcessor(model_proto=unprefixed)
        pieces = range(self._whole.vocab_size())
        self._is_byte = np.array([self._whole.is_byte(i) for i in pieces])
        self._added = dict(beside.added_tokens_decoder)
        added = {token.content: number for number, token in self._added.items()}
        own = {self._whole.id_to_piece(i): i for i in pieces if self._whole.is_control(i)}
        spelled = {t.content: number for number, t in self._added.items() if is_control(t.content, t.special)}
        self.controls = Controls(own | spelled, rows)
        self._ids = added | self.controls.ids
        self.size = max([len(pieces) - 1, *self._ids.values()]) + 1
        text = [number for content, number in added.items() if content not in self.controls.ids]
        text += [i for i in pieces if not (self._whole.is_control(i) or self._whole.is_unused(i))]
        self.text_size = max(text, default=0) + 1
        self._token = re.compile("|".join(map(self._pattern, sorted(self._ids, key=len, reverse=True))) or "(?!)")
        bos = self.number(beside.bos_token, "bos")
        self.prefix = (bos,) if bos is not None and beside.init_kwargs.get("add_bos_token", True) else ()

    def number(self, content: str | None, name: str) -> int | None:
        """The id of a token that files beside the model name; else of the model's own `bos`, `eos` or `unk`."""
        if content is not None:
            known = self._ids.get(content, self._whole.piece_to_id(content))
            if known != self._whole.unk_id():
                return known
        own = getattr(self._whole, f"{name}_id")()
        return own if own >= 0 else None

    def spelled(self, number: int) -> str:
        """How a token is spelled in the files."""
        return self._added[number].content if number in self._added else self._whole.id_to_piece(number)

    def _pattern(self, content: str) -> str:
        token = self._added.get(self._ids[content])
        spelled = re.escape(mark_of(content) if content in self.controls.ids else content)
        left, right = (r"\s*" if token and getattr(token, strip) else "" for strip in ("lstrip", "rstrip"))
        return f"{left}(?:{spelled}){right}"

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        split = [list(self._split(text)) for text in texts]
        encoded = {}
        for processor in {self._whole, self._inner}:
            parts = [part for of in split for part in of if part[0] is processor]
            made = processor.encode([text for _, text, _ in parts], return_type="offset_mapping", num_threads=-1)
            encoded[processor] = iter(made)
        return [_joined([self._encoding(part, encoded) for part in of]) for of in split]

    def ids_of_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [ids for ids, _ in self.encode_batch(texts)]

    def _split(self, text: str) -> Iterator[tuple[Any, str, int]]:
        """What encodes it, a processor or None for an added token, the text of each part and where it begins."""
        end = 0
        for token in self._token.finditer(text):
            if token.start() > end:
                yield self._inner if end else self._whole, text[end : token.start()], end
            yield None, token[0], token.start()
            end = token.end()
        if end < len(text):
            yield self._inner if end else self._whole, text[end:], end

    def _encoding(self, part: tuple[Any, str, int], encoded: dict[Any, Iterator]) -> Encoding:
        """SentencePiece gives a character to the last of its byte tokens; this gives it to all of them."""
        processor, text, start = part
        if processor is None:
            content = unmark(text)
            number = self._ids.get(content, self._ids.get(content.strip()))
            return np.array([number], np.int32), np.array([[start, start + len(text)]], np.int32)
        made = next(encoded[processor])
        ids, offsets = np.array(made["ids"], np.int32), np.array(made["offsets"], np.int32).reshape(-1, 2)
        earlier = (offsets[:, 0] == offsets[:, 1]) & self._is_byte[ids]
        for i in np.flatnonzero(earlier)[::-1]:
            offsets[i, 1] = offsets[i + 1, 1]
        return ids, offsets + start

    def decode(self, ids: Sequence[int]) -> str:
        texts, pieces = [], []
        special = {number for number, token in self._added.items() if token.special}
        for number in ids:
            if number in self._added and number not in special:
                texts += [self._whole.decode(pieces), self._added[number].content]
                pieces = []
            elif number < len(self._is_byte) and number not in special:
                pieces.append(number)
        return "".join([*texts, self._whole.decode(pieces)])


def _joined(parts: Sequence[Encoding]) -> Encoding:
    empty = np.zeros(0, np.int32), np.zeros((0, 2), np.int32)
    return tuple(np.concatenate(arrays) for arrays in zip(empty, *parts, strict=True))
