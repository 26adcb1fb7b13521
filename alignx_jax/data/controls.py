"""Control tokens in text: templates write them, data never do.

`<|im_end|>` in a sentence or in what a user says is ten characters; in a template it is the end of a turn. So each
control token has a mark that no data can hold, and a tokenizer knows control tokens by their marks alone.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Any

from alignx_jax.exits import UserError

_OPEN = f"\ufdd0{secrets.token_hex(8)}:"  # another one in each process, so that no file can spell it
_CLOSE = "\ufdd1"
_MARK = re.compile(f"{_OPEN}(.*?){_CLOSE}", re.DOTALL)
_LOOK = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)
_PRIVATE = range(0xF0000, 0xFFFFD)  # code points of private use


def is_control(content: str, special: bool) -> bool:
    """Whether an added token controls the model: it is special, or looks so, as DeepSeek's `<｜User｜>` does.

    The looks are those of llama.cpp (`does_token_look_special` of convert_hf_to_gguf.py). Others, as `<think>`, are
    text that a model writes; so is a single character, as `!`, which some name as their padding.
    """
    return len(content) > 1 and (special or bool(_LOOK.fullmatch(content)))


def mark_of(content: str) -> str:
    """What stands for a control token in text."""
    return f"{_OPEN}{content}{_CLOSE}"


def unmark(text: str) -> str:
    """`text` with the control tokens spelled as in the tokenizer's files."""
    return _MARK.sub(r"\1", text)


class Controls:
    """The control tokens of a tokenizer."""

    def __init__(self, ids: Mapping[str, int], rows: int | None):
        """
        Args:
          ids: by what they are in the tokenizer's files.
          rows: of the model's embedding; a token beyond them is not to be written. None: any may be.
        """
        self.ids, self._rows = dict(ids), rows
        longest_first = sorted(filter(None, self.ids), key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def mark(self, text: str) -> str:
        """A template's text with marks for the control tokens that it spells.

        Raises:
          UserError: one of them is not in the model's embedding.
        """
        return self._spelled.sub(self._marked, text)

    def _marked(self, spelled: re.Match) -> str:
        content = spelled[0]
        if self._rows is not None and self.ids[content] >= self._rows:
            raise UserError(
                f"the template writes {content}, token {self.ids[content]}, and the model's embedding has only "
                f"{self._rows} rows; take the template and the tokenizer that belong to the model"
            )
        return mark_of(content)

    def hide(self, data: Any) -> tuple[Any, str]:
        """`data` for a template that spells control tokens itself: what the texts in it spell is broken up.

        Returns:
          The data, and the character that breaks: taken out of what the template makes of them, it leaves them as they
          were.
        """
        joined = "".join(_texts(data))
        if not self._spelled.search(joined):
            return data, ""
        breaker = next(c for c in map(chr, _PRIVATE) if c not in joined)

        def broken(spelled: re.Match) -> str:
            """Behind every character, so that no other control token is left that shares some of them."""
            return "".join(character + breaker for character in spelled[0])

        return _changed(data, lambda text: self._spelled.sub(broken, text)), breaker


def _texts(data: Any) -> list[str]:
    if isinstance(data, str):
        return [data]
    values = data.values() if isinstance(data, Mapping) else data if isinstance(data, list | tuple) else ()
    return [text for value in values for text in _texts(value)]


def _changed(data: Any, change) -> Any:
    if isinstance(data, str):
        return change(data)
    if isinstance(data, Mapping):
        return {key: _changed(value, change) for key, value in data.items()}
    return [_changed(value, change) for value in data] if isinstance(data, list | tuple) else data


MARK = _MARK
"""Pattern of a mark; its group is the token."""
