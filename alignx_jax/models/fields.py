"""Checked access to the fields of a config.json, and of the JSON files beside it."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

from alignx_jax.exits import UserError

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", dict: "an object"}
_KINDS |= {list: "a list"}
_MOST = {"num_hidden_layers": 2**12, "vocab_size": 2**25, "hidden_size": 2**20, "intermediate_size": 2**23}
_MOST |= {"num_attention_heads": 2**14, "num_key_value_heads": 2**14, "head_dim": 2**14}
"""Some ten times what the largest models have. A larger number is damage, and lists of that length are never made."""
_POINTER = b"version https://git-lfs.github.com/spec/"
_LONGEST = 2**25  # bytes of a JSON file; the index of a model of 1,000 layers has 2**20
_SHOWN = 60  # characters of a value in a message


def read_json(file: pathlib.Path, hint: str) -> dict[str, Any]:
    """A JSON object; `hint` is what to do where there is no such file.

    Raises:
      UserError: no such file, or it is too large, may not be read, or is not a JSON object.
    """
    try:
        refuse_pointer(file)
        size = file.stat().st_size
        data = file.read_bytes() if size <= _LONGEST else b""
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; {hint}") from None
    if size > _LONGEST:
        raise UserError(f"{file}: {size:,} bytes, more than such a file has; download it again")
    try:
        parsed = json.loads(data.decode(), parse_int=_integer)
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise UserError(f"{file}: not a JSON file ({error}); download it again") from None
    if not isinstance(parsed, dict):
        raise UserError(f"{file}: not a JSON object; download it again")
    return parsed


def refuse_pointer(file: pathlib.Path) -> None:
    """
    Raises:
      UserError: the file is one of Git LFS that says where its content is, or it may not be read.
    """
    try:
        with file.open("rb") as stream:
            pointer = stream.read(len(_POINTER)) == _POINTER
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unreadable(file, error) from None
    if pointer:
        raise UserError(f"{file} is a pointer of Git LFS in the place of the file; run git lfs pull in {file.parent}")


def unreadable(file: pathlib.Path, error: OSError) -> UserError:
    """For raising: what the system says of a file that is there."""
    hint = "have its owner run chmod a+r, and a+x on the folders above" if isinstance(error, PermissionError) else ""
    return UserError(f"{file} cannot be read ({error.strerror or error}); {hint or 'give one that can'}")


def _integer(text: str) -> int:
    if math.isinf(float(text)):
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


class Fields:
    """The fields of a parsed object. Null is absent, but where `defaults` has a value: there it stands for none."""

    def __init__(self, values: dict[str, Any], where: str, defaults: dict[str, Any] | None = None):
        self._values, self._where = (defaults or {}) | values, where

    def error(self, message: str) -> UserError:
        """For raising: `message` with the file's name before it."""
        return UserError(f"{self._where}: {message}")

    def get(self, name: str, kind: type, default: Any = None, *, zero: bool = False) -> Any:
        """The value, or the default where it is absent or null; of `kind`, and above 0 if a number, or 0 with `zero`.

        Raises:
          UserError: it is not, or there is neither a value nor a default.
        """
        value = self.optional(name, kind, zero=zero)
        if value is None and default is None:
            raise self.error(f"the field {name} is missing")
        return default if value is None else value

    def optional(self, name: str, kind: type, *, zero: bool = False) -> Any:
        """The value, or None where it is absent or null.

        Raises:
          UserError: it is not of `kind`, a number that is not above 0 (or 0 with `zero`), or larger than any model's.
        """
        value = self._values.get(name)
        if value is None:
            return None
        number = kind is not bool and isinstance(value, int | float) and not isinstance(value, bool)
        if not (isinstance(value, kind) or (kind is float and number)) or (kind is int and isinstance(value, bool)):
            raise self.error(f"{name} is {_short(repr(value))}; expected {_KINDS[kind]}")
        if number and not (0 < value < math.inf or (zero and value == 0)):
            raise self.error(f"{name} is {value!r}; expected a number above 0")
        if kind is int and value > (most := _MOST.get(name, 2**31 - 1)):
            raise self.error(
                f"{name} is {_short(repr(value))}, more than any model has (at most {most:,}); download it again"
            )
        return float(value) if kind is float else value

    def only(self, name: str, plain: Any) -> None:
        """
        Raises:
          UserError: the field has another value than `plain`; absent and null count as that.
        """
        if (value := self._values.get(name)) not in (plain, None):
            raise self.error(f"{name} = {_short(repr(value))} is not supported; supported: {_short(json.dumps(plain))}")

    def within(self, name: str) -> Fields:
        """The fields of an object; of none where it is absent or null."""
        return Fields(self.optional(name, dict) or {}, f"{self._where}: {name}")

    def names(self) -> set[str]:
        """Of the fields that are there and not null."""
        return {name for name, value in self._values.items() if value is not None}
