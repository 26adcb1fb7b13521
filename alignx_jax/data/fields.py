"""What a line has to hold to be a record: fields found, checked and normalized."""

from __future__ import annotations

import json
from collections import Counter
from typing import NamedTuple

from alignx_jax.data.languages import normalize
from alignx_jax.exits import UserError, one_line

Record = dict[str, str]
"""Parallel: source, target, source_language, target_language, origin. Instructions: instruction, input, output,
language, origin; or messages, language, origin, where `messages` is JSON, a list of objects with role and content.
`origin` is `file:line`. Sentences carry no white space at their ends; the contents of messages stay as they are."""

_ROLES = ("system", "user", "assistant", "tool")
_CHATS = {  # field of a chat: what a turn's role and text are called in it, and its own names of roles
    "messages": ("role", "content", {}),
    "conversations": ("from", "value", {"human": "user", "gpt": "assistant"}),
}


class BadLine(NamedTuple):
    """A line that gives no record."""

    origin: str
    reason: str


class Bad(Exception):
    """Why the line at hand is bad."""

    def at(self, origin: str) -> BadLine:
        return BadLine(origin, one_line(str(self)))


def text(raw: bytes) -> str:
    """Raises `Bad`, as all of these do, if it is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Bad(f"not UTF-8 at byte {error.start}; save the file as UTF-8") from None


def _once(pairs: list[tuple[str, object]]) -> dict:
    """An object without a key that is there twice, of which every reader would take another one."""
    values = dict(pairs)
    if len(values) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {name!r} twice in one object")
    return values


decode = json.JSONDecoder(object_pairs_hook=_once).decode


def json_object(line: str) -> dict:
    try:
        value = decode(line)
    except (ValueError, RecursionError) as error:
        raise Bad(f"not JSON ({error}); each line has to be one JSON object") from None
    if not isinstance(value, dict):
        raise Bad("not a JSON object; each line has to be one {...}")
    return value


def exact(value, field: str) -> str:
    if not isinstance(value, str):
        raise Bad(f"field {field!r} has to be a text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Bad(f"field {field!r} holds half of a surrogate pair; write the character itself") from None
    if "\0" in value:
        raise Bad(f"field {field!r} holds a NUL character, as damaged files do; fetch the file again, or mend it")
    return value


def string(value, field: str) -> str:
    return exact(value, field).strip()


def sentence(value, field: str) -> str:
    found = string(value, field)
    if not found:
        raise Bad(f"field {field!r} is empty; both sides need a sentence: fill it in or remove the line")
    return found


def language(value, field: str) -> str:
    try:
        return normalize(string(value, field))
    except UserError as error:
        raise Bad(f"field {field!r}: {error}") from None


def get(item: dict, field: str):
    if field not in item:
        raise Bad(f"field {field!r} is missing; the line has {', '.join(map(repr, item)) or 'no fields'}")
    return item[field]


def pair(source, target, source_language, target_language) -> Record:
    return {
        "source": sentence(source, "src"),
        "target": sentence(target, "tgt"),
        "source_language": language(source_language, "src_lang"),
        "target_language": language(target_language, "tgt_lang"),
    }


def sentences(item: dict) -> dict[str, str]:
    """The sentences of a multi-way line by normalized language code."""
    texts = get(item, "text")
    if not isinstance(texts, dict):
        raise Bad(f"field 'text' has to be an object of sentences by language, not {type(texts).__name__}")
    found = {language(code, "text"): sentence(value, f"text.{code}") for code, value in texts.items()}
    if len(found) < len(texts):
        raise Bad(f"field 'text' names a language twice: {', '.join(texts)}")
    return found


def instruction(item) -> Record:
    if not isinstance(item, dict):
        raise Bad(f"not an object with instruction, input and output, but {type(item).__name__}")
    code = item.get("language", item.get("lang"))
    found = {"language": "" if code in (None, "") else language(code, "language")}
    if field := next((name for name in _CHATS if item.get(name) is not None), None):
        if item.get("tools"):
            raise Bad("field 'tools' is not supported, and the chat was held with them; remove the line, or the field")
        return {"messages": json.dumps(_messages(item[field], field), ensure_ascii=False)} | found
    given = item.get("input")
    return {
        "instruction": sentence(get(item, "instruction"), "instruction"),
        "input": "" if given is None else string(given, "input"),
        "output": sentence(get(item, "output"), "output"),
    } | found


def _messages(turns, field: str) -> list[dict[str, str]]:
    """A chat as `messages` has it, whichever of `_CHATS` it was; what a template makes of it is seen later."""
    role, content, names = _CHATS[field]
    if not isinstance(turns, list):
        raise Bad(f"field {field!r} has to be a list of turns, not {type(turns).__name__}")
    messages = []
    for place, turn in enumerate(turns):
        where = f"{field}[{place}]"
        if not isinstance(turn, dict):
            raise Bad(f"field {where!r} has to be an object with {role} and {content}, not {type(turn).__name__}")
        turn = {name: value for name, value in turn.items() if value is not None}
        if unknown := turn.keys() - {role, content}:
            raise Bad(f"field {where!r} has {min(unknown)!r}, which is not supported; it can hold {role} and {content}")
        for name in (role, content):
            if name not in turn:
                raise Bad(f"field '{where}.{name}' is missing; every turn needs {role} and {content}")
        who, said = (exact(turn[name], f"{where}.{name}") for name in (role, content))
        if (who := names.get(who, who)) not in _ROLES:
            raise Bad(f"field '{where}.{role}' is {who!r}; it has to be one of {', '.join([*_ROLES, *names])}")
        if who in ("user", "assistant") and not said.strip():
            raise Bad(f"field '{where}.{content}' is empty; fill it in or remove the line")
        messages.append({"role": who, "content": said})
    if "assistant" not in [message["role"] for message in messages]:
        raise Bad(f"field {field!r} has no turn of the assistant, so that there is nothing to learn; remove the line")
    if messages[0]["role"] == "assistant":
        raise Bad(f"field {field!r} begins with the assistant; the first turn has to be the system's or the user's")
    return messages
