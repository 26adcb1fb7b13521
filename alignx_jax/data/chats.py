"""Chats as tokens, with those marked that the assistant writes, by the tokenizer's own chat template."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import jinja2
import numpy as np

from alignx_jax.data.controls import MARK
from alignx_jax.data.fields import Bad
from alignx_jax.data.tokenizer import Tokenizer
from alignx_jax.exits import UserError

Messages = Sequence[dict[str, str]]
"""Of each turn role and content."""

_PROBE = "\ue000\ue001"  # stands for an answer; no text has these characters of private use
_REMEDY = "mark the assistant's turns in the template with {% generation %}, or remove the line"


def encode(messages: Messages, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a chat, [n] int32, and which of them the assistant writes, [n] bool.

    Where the template has `{% generation %}` markers, these say which. Else it is what follows the generation prompt,
    as far as the token that ends the turn: what the model has to write where it is asked to. No token is added to those
    of the template, and what the contents spell is no control token. The first is never the assistant's, as nothing
    comes before it.

    Raises:
      Bad: the template refuses the chat, or does not show which tokens are the assistant's; there is none.
      UserError: the template is no Jinja.
    """
    messages, breaker = tokenizer.controls.hide(list(messages))
    chat = _Chat(tokenizer, breaker)
    text, turns = chat.write(messages)
    if turns is None:
        turns = [_turn(text, messages, n, chat) for n, one in enumerate(messages) if one["role"] == "assistant"]
    ((ids, offsets),) = tokenizer.encode_batch([text])
    mask = np.zeros(len(ids), bool)
    for start, end in turns:
        mask |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    mask[:1] = False
    if not mask.any():
        raise Bad(f"the chat template writes no token of the assistant's; {_REMEDY}")
    return ids, mask


class _Chat(NamedTuple):
    """Writes chats whose contents are hidden (`Controls.hide`): marks stand for what the template alone spells."""

    tokenizer: Tokenizer
    breaker: str

    def write(self, messages: Messages, *, prompt: bool = False) -> tuple[str, list[tuple[int, int]] | None]:
        """As `Tokenizer.chats.render`; `prompt` adds the generation prompt."""
        try:
            text, places = self.tokenizer.chats.render(messages, add_generation_prompt=prompt)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"the model's chat template is no Jinja ({error}); copy it again") from None
        except Exception as error:  # whatever a template may do to a chat that it was not written for
            reason = str(error).strip().split("\n")[0]
            raise Bad(f"the chat template refuses the chat ({reason}); mend the line or remove it") from None
        edges = sorted({0, len(text), *(edge for place in places or () for edge in place)})
        parts = [self.shown(self.tokenizer.controls.mark(text[a:b])) for a, b in itertools.pairwise(edges)]
        at = dict(zip(edges, itertools.accumulate(map(len, parts), initial=0), strict=False))
        return "".join(parts), places and [(at[start], at[end]) for start, end in places]

    def shown(self, text: str) -> str:
        return text.replace(self.breaker, "") if self.breaker else text


def _turn(text: str, messages: Messages, place: int, chat: _Chat) -> tuple[int, int]:
    """The characters [start, end) of `text`, the whole chat, that the assistant writes in its turn at `place`.

    The turn begins where the chat before it with the generation prompt ends. What the template writes behind an answer,
    up to the first control token, ends it; white space behind that is not the model's. In between stands the answer,
    white space aside: all of it, or its last part where the template drops the beginning, as Qwen 3's drops the
    thinking of earlier turns.
    """
    before, _ = chat.write(messages[:place], prompt=True)
    probe, _ = chat.write([*messages[:place], {"role": "assistant", "content": _PROBE}])
    front, _, behind = probe.rpartition(_PROBE)
    token = MARK.search(behind)
    close = behind[: token.end()] if token else behind
    if not (text.startswith(before) and front.startswith(before) and close):
        raise Bad(f"the chat template does not show where turn {place} begins and ends; {_REMEDY}")
    start = len(before)
    first = len(front) if text.startswith(front) else start
    answer = _squeezed(chat.shown(messages[place]["content"]))
    for fits in (str.__eq__, str.endswith):
        for end in re.compile(re.escape(close)).finditer(text, first):
            part = _squeezed(text[first : end.start()])
            if part and fits(answer, part):
                return start, end.end()
    raise Bad(f"the chat template writes turn {place} otherwise than it stands in the line; {_REMEDY}")


def turn_ends(tokenizer: Tokenizer) -> list[int]:
    """The token that ends a turn of the assistant's, by the chat template; none where no control token does."""
    if tokenizer.chats is None:
        return []
    try:
        text, _ = _Chat(tokenizer, "").write(
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": _PROBE}]
        )
    except (Bad, UserError):
        return []
    token = MARK.search(text.rpartition(_PROBE)[2])
    return [tokenizer.controls.ids[token[1]]] if token else []


def _squeezed(text: str) -> str:
    return "".join(text.split())
