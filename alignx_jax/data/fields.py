"""What a line has to hold to be a record: fields found, checked and normalized."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import unicodedata
from collections import Counter
from typing import NamedTuple

from alignx_jax.data.languages import normalize
from alignx_jax.exits import UserError, one_line

Record = dict[str, str]
"""Parallel: source, target, source_language, target_language, origin; of a multi-way line also `line`, the hash of its
meaning. Instructions: instruction, input, output,
language, origin; or messages, language, origin, where `messages` is JSON, a list of objects with role and content.
`origin` is `file:line`. Sentences carry no white space at their ends; the contents of messages stay as they are."""

_ROLES = ("system", "user", "assistant", "tool")
_CHATS = {  # field of a chat: what a turn's role and text are called in it, and its own names of roles
    "messages": ("role", "content", {}),
    "conversations": ("from", "value", {"human": "user", "gpt": "assistant"}),
}
_SYSTEM = ("system", "system_prompt", "system_message")  # columns beside a chat that hold its system turn
_CHANGE_A_PROMPT = (  # what a chat or an answer was given with besides, which no prompt made here would hold
    "tools", "functions", "function_call", "tool_choice", "tool_calls", "documents", "chat_template_kwargs",
    "chat_template", "enable_thinking", "add_generation_prompt", "continue_final_message", "history", "context",
    "prefix", "suffix", "reasoning_content", "images", "image", "videos", "video", "audios", "audio",
)  # fmt: skip
# Of what has no category of control, format or space, this is blank: fillers, selectors, the empty braille pattern.
_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8\U000e0000-\U000e0fff]"
)
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp", "Zs")


class BadLine(NamedTuple):
    """A line that gives no record."""

    origin: str
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"

    def error(self, *, skip_helps: bool) -> UserError:
        """What stops the preparation; `skip_helps` if there are good lines too."""
        hint = " (--data.on-error=skip leaves bad lines out and lists them)" if skip_helps else ""
        return UserError(f"{self}{hint}")


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


def present(value):
    """`value` without the nulls that stand for absent fields, at every depth."""
    if isinstance(value, dict):
        return {key: present(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [present(inner) for inner in value]
    return value


def json_object(line: str) -> dict:
    """The object in a line, as `present` has it."""
    try:
        value = present(decode(line))
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


def is_visible(text: str) -> bool:
    """Whether any character of `text` would be seen: no space, control, format character, filler or selector."""
    return any(unicodedata.category(c) not in _UNSEEN and not _BLANK.match(c) for c in text)


def sentence(value, field: str) -> str:
    found = string(value, field)
    if not found:
        raise Bad(f"field {field!r} is empty; both sides need a sentence: fill it in or remove the line")
    if not is_visible(found):
        raise Bad(f"field {field!r} is empty: it has no visible character; fill it in or remove the line")
    return found


@functools.lru_cache(maxsize=1 << 12)  # a pair is asked for in both directions
def text_hash(text: str) -> int:
    """A signed 32-bit hash of the text whatever its case, width, Unicode form and spaces, the same on every machine."""
    text = " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()[:4], "little", signed=True)


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
    """An instruction with its answer, or a chat. Fields that would have changed the prompt are used, or refused."""
    if not isinstance(item, dict):
        raise Bad(f"not an object with instruction, input and output, but {type(item).__name__}")
    code = item.get("language", item.get("lang"))
    found = {"language": "" if code in (None, "") else language(code, "language")}
    refused, system, chat = (
        [name for name in names if not _is_empty(item.get(name))] for names in (_CHANGE_A_PROMPT, _SYSTEM, _CHATS)
    )
    if refused:
        raise Bad(
            f"field {refused[0]!r} is not supported, which the answer was given with; remove the field or the line"
        )
    if "instruction" not in item:
        chat = chat or [name for name in _CHATS if item.get(name) is not None]
    for names in (system, chat):
        if len(names) > 1:
            raise Bad(f"both {names[0]!r} and {names[1]!r} are there; keep one of them")
    if chat:
        (field,) = chat
        messages = _messages(item[field], field)
        if system:
            messages = _with_system(exact(item[system[0]], system[0]), system[0], messages)
        _check_prompt(item.get("prompt"), messages)
        return {"messages": json.dumps(messages, ensure_ascii=False)} | found
    if system:
        raise Bad(f"field {system[0]!r} has no place in a prompt template; write the line as a chat ('messages')")
    given = string("" if item.get("input") is None else item["input"], "input")
    return {
        "instruction": sentence(get(item, "instruction"), "instruction"),
        "input": given if is_visible(given) else "",
        "output": sentence(get(item, "output"), "output"),
    } | found


def _is_empty(value) -> bool:
    """Whether a field says nothing: null, an empty text, list or object, or such a list as text."""
    return value is None or value in ({}, [], "[]") or (isinstance(value, str) and not is_visible(value))


def _with_system(text: str, field: str, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    if messages[0]["role"] == "system":
        raise Bad(f"the chat has a turn of the system, and field {field!r} has another; keep one of them")
    return [{"role": "system", "content": text}, *messages]


def _check_prompt(prompt, messages: list[dict[str, str]]) -> None:
    """Some data sets repeat the first question as `prompt`; anything else there is not in the chat."""
    if isinstance(prompt, str) and prompt.strip() not in ("", *(one["content"].strip() for one in messages)):
        raise Bad(
            "field 'prompt' is no turn of the chat, and the answer was given with it; remove the line, or the field"
        )


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
        kept = {name for name, value in turn.items() if value is not None}
        turn = {name: turn[name] for name in kept if name in (role, content) or not _is_empty(turn[name])}
        if unknown := turn.keys() - {role, content}:
            raise Bad(f"field {where!r} has {min(unknown)!r}, which is not supported; it can hold {role} and {content}")
        for name in (role, content):
            if name not in turn:
                raise Bad(f"field '{where}.{name}' is missing; every turn needs {role} and {content}")
        who, said = (exact(turn[name], f"{where}.{name}") for name in (role, content))
        if (who := names.get(who, who)) not in _ROLES:
            raise Bad(f"field '{where}.{role}' is {who!r}; it has to be one of {', '.join([*_ROLES, *names])}")
        if who in ("user", "assistant") and not is_visible(said):
            raise Bad(f"field '{where}.{content}' is empty; fill it in or remove the line")
        messages.append({"role": who, "content": said})
    if "assistant" not in [message["role"] for message in messages]:
        raise Bad(f"field {field!r} has no turn of the assistant, so that there is nothing to learn; remove the line")
    if messages[0]["role"] == "assistant":
        raise Bad(f"field {field!r} begins with the assistant; the first turn has to be the system's or the user's")
    return messages
