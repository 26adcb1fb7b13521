"""Checked access to the fields of a config.json."""

from __future__ import annotations

import json
import math
from typing import Any

from alignx_jax.exits import UserError

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", dict: "an object"}
_KINDS |= {list: "a list"}


class Fields:
    """The fields of a parsed object. Null is absent, but where `defaults` has a value: there it stands for none."""

    def __init__(self, values: dict[str, Any], where: str, defaults: dict[str, Any] | None = None):
        self._values, self._where = (defaults or {}) | values, where

    def error(self, message: str) -> UserError:
        """For raising: `message` with the file's name before it."""
        return UserError(f"{self._where}: {message}")

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """The value, or the default where it is absent or null; of `kind`, and above 0 if a number.

        Raises:
          UserError: it is not, or there is neither a value nor a default.
        """
        value = self.optional(name, kind)
        if value is None and default is None:
            raise self.error(f"the field {name} is missing")
        return default if value is None else value

    def optional(self, name: str, kind: type) -> Any:
        """The value, or None where it is absent or null.

        Raises:
          UserError: it is not of `kind`, or a number that is not above 0.
        """
        value = self._values.get(name)
        if value is None:
            return None
        number = kind is not bool and isinstance(value, int | float) and not isinstance(value, bool)
        if not (isinstance(value, kind) or (kind is float and number)) or (kind is int and isinstance(value, bool)):
            raise self.error(f"{name} is {value!r}; expected {_KINDS[kind]}")
        if number and not 0 < value < math.inf:
            raise self.error(f"{name} is {value!r}; expected a number above 0")
        return float(value) if kind is float else value

    def only(self, name: str, plain: Any) -> None:
        """
        Raises:
          UserError: the field has another value than `plain`; absent and null count as that.
        """
        if (value := self._values.get(name)) not in (plain, None):
            raise self.error(f"{name} = {value!r} is not supported; supported: {json.dumps(plain)}")

    def within(self, name: str) -> Fields:
        """The fields of an object; of none where it is absent or null."""
        return Fields(self.optional(name, dict) or {}, f"{self._where}: {name}")

    def names(self) -> set[str]:
        """Of the fields that are there and not null."""
        return {name for name, value in self._values.items() if value is not None}
