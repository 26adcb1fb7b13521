"""The JSON files that are read back after they were written: with the keys and types that are read, or one sentence."""

from __future__ import annotations

import functools
import json
from typing import Any

import pydantic

from alignx_jax import storage
from alignx_jax.exits import UserError


def read(file: storage.Path, kind: Any, hint: str) -> Any:
    """What a file holds, as JSON has it.

    Args:
      kind: what it has to have: a dataclass with the keys that are read, or a type such as `dict[str, str]`.
      hint: what to do where it does not.

    Raises:
      UserError: no such file, not JSON in UTF-8, a key that is missing, or a value of another type; names the key.
    """
    try:
        content = file.read_bytes()
        _adapter(kind).validate_json(content, strict=True)
        return json.loads(content)
    except FileNotFoundError:
        raise UserError(f"{file} is missing; {hint}") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{file} is damaged ({f'{key}: ' if key else ''}{first['msg']}); {hint}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}); {hint}") from None


@functools.cache
def _adapter(kind: Any) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(kind)
