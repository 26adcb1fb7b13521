"""Prompts: a template is data, a JSON file with three texts and `{fields}`; nothing in it is ever run as code."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable

from alignx_jax.data.languages import language_name
from alignx_jax.exits import UserError

_HERE = pathlib.Path(__file__).resolve().parent
_PACKAGED = {"alpaca": _HERE / "alpaca.json", "sample": _HERE.parent / "sample" / "data" / "template.json"}
_FIELD = re.compile(r"\{([^{}\s]*)\}")
_FIELDS = {
    "prompt_input": {"instruction", "input"},
    "prompt_no_input": {"instruction"},
    "translation": {"source_language", "target_language"},
}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A finished prompt with its response, and where the input and the response stand in it (characters)."""

    text: str
    source: tuple[int, int]
    """[start, end) of the input; (0, 0) if there is none."""
    target: tuple[int, int]
    """[start, end) of the response."""


@dataclasses.dataclass(frozen=True)
class Template:
    """The texts of a template file.

    `prompt_input` needs `{instruction}` and `{input}`, `prompt_no_input` needs `{instruction}`; the response follows
    them directly. `translation` is the instruction of a translation pair; it may use `{source_language}` and
    `{target_language}`, the languages' English names.
    """

    prompt_input: str
    prompt_no_input: str
    translation: str

    def with_controls(self, mark: Callable[[str], str]) -> Template:
        """The template with the control tokens that it spells as marks (`controls.Controls.mark`)."""
        return Template(mark(self.prompt_input), mark(self.prompt_no_input), mark(self.translation))

    def render(self, instruction: str, input: str, output: str) -> Prompt:
        """The prompt of an instruction with its response; an empty `input` takes the prompt without input."""
        if not input:
            prompt, _ = _fill(self.prompt_no_input, {"instruction": instruction})
            source = (0, 0)
        else:
            prompt, at = _fill(self.prompt_input, {"instruction": instruction, "input": input})
            source = (at["input"], at["input"] + len(input))
        return Prompt(prompt + output, source, (len(prompt), len(prompt) + len(output)))

    def render_translation(self, source: str, target: str, source_language: str, target_language: str) -> Prompt:
        """The translation of `source` into `target` as an instruction; languages are codes."""
        names = {"source_language": language_name(source_language), "target_language": language_name(target_language)}
        return self.render(_fill(self.translation, names)[0], source, target)


def _fill(template: str, values: dict[str, str]) -> tuple[str, dict[str, int]]:
    """`template` with its fields replaced, and where each value starts. Braces inside values stay as they are."""
    text, starts = "", {}
    parts = _parts(template)
    for literal, field in zip(parts[::2], parts[1::2], strict=False):
        text += literal
        starts[field] = len(text)
        text += values[field]
    return text + parts[-1], starts


@functools.lru_cache(maxsize=16)
def _parts(template: str) -> list[str]:
    """Of a template, in turn, a text and the name of the field behind it; a text last."""
    return _FIELD.split(template)


def load(template: str) -> Template:
    """A packaged template, `alpaca` or `sample`, or one from a JSON file. Fields are plain names.

    Raises:
      UserError: no such file, not JSON, a text missing, an unknown field, or a needed field missing or used twice.
    """
    path = _PACKAGED.get(template, pathlib.Path(template))
    where = f"template {template}"
    try:
        texts = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{where}: no such file; give a JSON file, 'alpaca' or 'sample'") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}); give a JSON file, 'alpaca' or 'sample'") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON in UTF-8 ({error}); mend it") from None
    if not isinstance(texts, dict):
        raise UserError(f"{where}: has to be a JSON object with {', '.join(_FIELDS)}")
    if unknown := texts.keys() - _FIELDS.keys() - {"description"}:
        raise UserError(f"{where}: unknown entry {min(unknown)!r}; it can hold {', '.join(_FIELDS)} and description")
    for name, known in _FIELDS.items():
        if not isinstance(texts.get(name), str):
            raise UserError(f"{where}: {name!r} is missing or no text")
        if any("\ud800" <= character <= "\udfff" for character in texts[name]):
            raise UserError(f"{where}: {name!r} holds half of a surrogate pair; write the character itself")
        used = _FIELD.findall(texts[name])
        if unknown := set(used) - known:
            fields = ", ".join(f"{{{field}}}" for field in sorted(known))
            raise UserError(f"{where}: {name!r} has the unknown field {{{min(unknown)}}}; known: {fields}")
        if name != "translation":
            for field in sorted(known):
                if used.count(field) != 1:
                    raise UserError(f"{where}: {name!r} has to hold {{{field}}} exactly once")
    return Template(**{name: texts[name] for name in _FIELDS})


def place(template: str) -> str:
    """A template as any working directory has it: the absolute path, unless it is a packaged one."""
    return template if template in _PACKAGED else str(pathlib.Path(template).expanduser().absolute())
