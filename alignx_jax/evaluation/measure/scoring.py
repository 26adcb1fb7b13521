"""Log-likelihoods of texts, and what is measured by them: perplexity, continuations told apart, two-option items.

Requests are packed into rows, where segments keep them apart. A row holds the inputs of the predictions alone, so that
a request of n tokens takes n - 1 places and the last position of its segment predicts its last token.

Shapes: R rows, T tokens, N requests or sentences, K languages, V padded vocabulary, D hidden size.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import pathlib
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
import yaml
from flax import nnx
from jax.sharding import Mesh

from alignx_jax import sharding
from alignx_jax.data import packing
from alignx_jax.data.languages import normalize
from alignx_jax.data.text_files import lines
from alignx_jax.data.tokenizer import Tokenizer
from alignx_jax.evaluation.measure.scores import Sums
from alignx_jax.exits import UserError
from alignx_jax.models.attention import soft_cap
from alignx_jax.models.decoder import Decoder

TASKS = pathlib.Path(__file__).resolve().parent / "tasks"

_CHUNK = 32  # positions of each row whose logits exist at a time
_OPTIONS = 4  # endings to choose from
_UNSPACED = {"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"}  # Unicode names begin so
_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with the numbers of requests done and given."""


class Scores(NamedTuple):
    """Of each request."""

    log_probability: np.ndarray
    """[N] float64, of the continuation after its context, natural logarithm; the sum over its tokens."""
    greedy: np.ndarray
    """[N] bool: every token of the continuation is the model's most probable one."""


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Negative log-likelihood of the sentences of a language, each after `Tokenizer.start` alone."""

    nll: np.ndarray
    """[N] float64, nats a sentence; EOS is not counted."""
    tokens: np.ndarray
    """[N] tokens of the text."""
    bytes: np.ndarray
    """[N] bytes of the text in UTF-8."""

    @property
    def value(self) -> float:
        """exp of nats a token; comparable between models with the same tokenizer."""
        return self.sums().value

    @property
    def bits_per_byte(self) -> float:
        """Comparable whatever the tokenizer, if it writes all of the text: an unknown token hides its bytes."""
        return self.bits_per_byte_sums().value

    def sums(self) -> Sums:
        """`value`, of any sentences."""
        return _of_sums(self.nll, self.tokens, lambda sums: np.exp(sums[..., 0] / sums[..., 1]))

    def bits_per_byte_sums(self) -> Sums:
        """`bits_per_byte`, of any sentences."""
        return _of_sums(self.nll, self.bytes, lambda sums: sums[..., 0] / np.log(2) / sums[..., 1])


def _of_sums(nll_N: np.ndarray, count_N: np.ndarray, score: Callable[[np.ndarray], np.ndarray]) -> Sums:
    sums_NxS = np.stack([nll_N, count_N], axis=1).astype(np.float64)
    return Sums(float(score(sums_NxS.sum(axis=0))), sums_NxS, score)


_Text = Annotated[str, pydantic.StringConstraints(strip_whitespace=True, min_length=1)]


@dataclasses.dataclass(frozen=True)
class Item:
    """An item of COPA (arXiv 2005.00333, section 3), by the names of its file's fields."""

    premise: _Text
    choice1: _Text
    choice2: _Text
    question: Literal["cause", "effect"]
    """What the right choice is of the premise."""
    label: Literal[0, 1]
    """0: `choice1` is right."""
    lang: _Text
    idx: int
    """The same of an item in every language."""


def log_likelihoods(
    decoder: Decoder,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    mesh: Mesh,
    *,
    rows: int,
    row_length: int,
    dtype: jnp.dtype,
    progress: Progress | None = None,
) -> Scores:
    """How probable each continuation is after its context, in the order given.

    Log-probabilities of tokens are float32 (float64 under float64 compute) and summed in float64. Of a request longer
    than `row_length` + 1 tokens, or than the model's context by more than one, the context is cut from the left, as
    `hf` of lm-evaluation-harness does (lm_eval/models/huggingface.py); a warning counts them.

    Args:
      requests: token ids (context, continuation), at least one in each.
      rows: rows of `row_length` tokens scored at a time, over all devices, a multiple of the mesh's data shards.
      dtype: of activations and products.

    Raises:
      UserError: a continuation longer than a row or the model's context.
      ValueError: a context or a continuation is empty.
    """
    texts = _cut(requests, row_length, decoder.config.max_positions)
    scores = Scores(np.zeros(len(requests)), np.ones(len(requests), bool))
    plan = packing.plan(np.array([len(t) - 1 for t in texts]), row_length, row_length, np.arange(len(texts)))
    graph, params = nnx.split(decoder)
    done = 0
    for first in range(0, len(plan), rows):
        tokens_RxT, labels_RxT, positions_RxT, segments_RxT = np.zeros((4, rows, row_length), np.int32)
        ends = []  # (request, row, end of its segment)
        for r in range(min(rows, len(plan) - first)):
            end = 0
            for segment, n in enumerate(plan[first + r], 1):
                start, end = end, end + len(texts[n]) - 1
                tokens_RxT[r, start:end], labels_RxT[r, start:end] = texts[n][:-1], texts[n][1:]
                positions_RxT[r, start:end], segments_RxT[r, start:end] = np.arange(end - start), segment
                ends.append((n, r, end))
        with jax.set_mesh(mesh):
            arrays = (sharding.place_rows(a, mesh) for a in (tokens_RxT, labels_RxT, positions_RxT, segments_RxT))
            found = _scored(params, *arrays, graph=graph, dtype=dtype)
        log_probability_RxT, greedy_RxT = sharding.to_host(found)
        for n, r, end in ends:
            continuation = r, slice(end - len(requests[n][1]), end)
            scores.log_probability[n] = log_probability_RxT[continuation].sum(dtype=np.float64)
            scores.greedy[n] = greedy_RxT[continuation].all()
        done += len(ends)
        if progress:
            progress(done, len(requests))
    return scores


def _cut(requests: Sequence[tuple[Sequence[int], Sequence[int]]], row_length: int, context: int) -> list[np.ndarray]:
    """Context and continuation as one text, of which a row holds all but the last token."""
    if not all(len(part) for request in requests for part in request):
        raise ValueError("a context or a continuation is empty; give it one token at least")
    longest = max((len(continuation) for _, continuation in requests), default=0)
    if longest > context:
        raise UserError(f"a text to score has {longest} tokens, the model's context {context}; leave it out")
    if longest > row_length:
        raise UserError(f"a text to score has {longest} tokens, a row {row_length}; raise --data.row-length")
    room = min(row_length, context) + 1
    if cut := sum(len(a) + len(b) > room for a, b in requests):
        _log.warning("%d of %d texts to score are cut to their last %d tokens", cut, len(requests), room)
    return [np.concatenate(request).astype(np.int32)[-room:] for request in requests]


@functools.partial(jax.jit, static_argnames=("graph", "dtype"))
def _scored(params, tokens_RxT, labels_RxT, positions_RxT, segments_RxT, *, graph, dtype):
    """Log-probability of the label at each position, and whether it is the most probable token, [R,T] both."""
    decoder = nnx.merge(graph, params)
    out = decoder(tokens_RxT, positions_RxT, segments_RxT, compute_dtype=dtype, remat="none")
    high = jnp.promote_types(dtype, jnp.float32)
    embedding_VxD = sharding.constrain(decoder.output_embedding.astype(dtype), "model")  # gathered here, not by chunk
    real_Vx1 = jnp.arange(embedding_VxD.shape[0])[:, None] < decoder.config.vocab_size

    def at_position(states_and_labels: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        states_RxD, labels_R = states_and_labels
        logits_VxR = jnp.einsum("vd,rd->vr", embedding_VxD, states_RxD, preferred_element_type=high)
        logits_VxR = jnp.where(real_Vx1, soft_cap(logits_VxR, decoder.config.logit_cap), -jnp.inf)
        label_R = jnp.take_along_axis(logits_VxR, labels_R[None], axis=0)[0]
        return label_R - jax.nn.logsumexp(logits_VxR, axis=0), jnp.argmax(logits_VxR, axis=0) == labels_R

    by_position = jnp.moveaxis(out.hidden_RxTxD, 1, 0), labels_RxT.T
    log_probability_TxR, greedy_TxR = jax.lax.map(at_position, by_position, batch_size=_CHUNK)
    return log_probability_TxR.T, greedy_TxR.T


def encode(tokenizer: Tokenizer, pairs: Iterable[tuple[str, str]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids of (context, continuation), for `log_likelihoods`.

    Both are encoded as one text, behind BOS where the tokenizer adds it; a token that ends beyond the context belongs
    to the continuation. Where none does, they are encoded apart. What has no context comes after `Tokenizer.start`.

    Raises:
      UserError: a continuation that the tokenizer writes with no token.
    """
    pairs = list(pairs)
    requests = []
    for (ids, offsets), (context, continuation) in zip(
        tokenizer.encode_batch([context + continuation for context, continuation in pairs]), pairs, strict=True
    ):
        count = np.searchsorted(offsets[:, 1], len(context), side="right") if context else 0
        before, after = ids[:count], ids[count:]
        if not len(after):
            (before, _), (after, _) = tokenizer.encode_batch([context, continuation])
        if not len(after):
            raise UserError(f"the tokenizer writes {continuation!r:.60}, to be scored, with no token; leave it out")
        start = tokenizer.prefix if len(before) else tokenizer.start
        requests.append((np.array([*start, *before], np.int32), after))
    return requests


def perplexity(
    decoder: Decoder, tokenizer: Tokenizer, sentences: Mapping[str, Sequence[str]], mesh: Mesh, **options
) -> dict[str, Perplexity]:
    """By language; `options` are those of `log_likelihoods`.

    Raises:
      UserError: a sentence longer than a row.
    """
    found = {}
    requests = {code: encode(tokenizer, (("", text) for text in texts)) for code, texts in sentences.items()}
    nll = -log_likelihoods(decoder, [r for of in requests.values() for r in of], mesh, **options).log_probability
    for code, texts in sentences.items():
        own, nll = nll[: len(texts)], nll[len(texts) :]
        tokens = np.array([len(ids) for _, ids in requests[code]])
        found[code] = Perplexity(own, tokens, np.array([len(text.encode()) for text in texts]))
    return found


def continuation_choice(
    decoder: Decoder, tokenizer: Tokenizer, sentences: Mapping[str, Sequence[str]], mesh: Mesh, *, seed: int, **options
) -> dict[str, np.ndarray]:
    """Whether the model finds the ending of each sentence among endings of three others, [N'] bool by language.

    A sentence is cut in two where a word begins, nearest its middle; in scripts written without spaces, between any two
    characters. An ending's score is its log-likelihood after the sentence's beginning, per byte of UTF-8; a hit is
    better than all others, so that chance is 25 %. The other sentences have the same numbers in all languages, and
    depend on the sentences and `seed` alone.

    Sentence numbers that cannot be cut in some language, or have not three others whose endings differ from theirs and
    from each other in every language, are left out of all: N' may be 0.

    Args:
      sentences: sentence n says the same in every language.
      options: those of `log_likelihoods`.
    """
    halves = {code: [_halves(text) for text in texts] for code, texts in sentences.items()}
    options_of = _draw({n: endings for n, endings in enumerate(zip(*halves.values(), strict=True))}, seed)
    pairs = [(of[n][0], of[m][1]) for of in halves.values() for n, chosen in options_of.items() for m in chosen]
    score = log_likelihoods(decoder, encode(tokenizer, pairs), mesh, **options).log_probability
    score /= [len(ending.encode()) for _, ending in pairs]
    score_KxNxO = score.reshape(len(sentences), len(options_of), _OPTIONS)
    hits_KxN = score_KxNxO[:, :, 0] > score_KxNxO[:, :, 1:].max(axis=2)
    return dict(zip(sentences, hits_KxN, strict=True))


def _draw(halves: dict[int, tuple[tuple[str, str] | None, ...]], seed: int) -> dict[int, list[int]]:
    """The sentences that each sentence's endings come from, its own first.

    Args:
      halves: of each sentence, in every language.
    """
    endings = {n: [ending for _, ending in of] for n, of in halves.items() if all(of)}
    rng, drawn = np.random.default_rng(seed), {}
    for n in endings:
        chosen = [n]
        for other in rng.permutation(list(endings)).tolist():
            if all(a != b for m in chosen for a, b in zip(endings[m], endings[other], strict=True)):
                chosen.append(other)
            if len(chosen) == _OPTIONS:
                drawn[n] = chosen
                break
    return drawn


def _halves(text: str) -> tuple[str, str] | None:
    """The text cut nearest its middle; None if there is no place for it."""
    places = [i for i in range(1, len(text)) if _may_cut(text[i - 1], text[i])]
    if not places:
        return None
    cut = min(places, key=lambda i: abs(2 * i - len(text)))
    return text[:cut], text[cut:]


def _may_cut(before: str, after: str) -> bool:
    if after.isspace():
        return not before.isspace()
    unspaced = all(unicodedata.name(c, "").split(" ")[0] in _UNSPACED for c in (before, after))
    return unspaced and not unicodedata.category(after).startswith("M")  # a mark belongs to the character before it


def read_choices(paths: Iterable[str]) -> dict[str, list[Item]]:
    """Two-option items by language code, from XCOPA's JSONL files (.gz too) or folders of them.

    Of a folder with files that say `test` in their names, these alone are read.

    Raises:
      UserError: no such file, none in a folder, no items, or a bad line, with its place and field.
    """
    items: dict[str, list[Item]] = {}
    for path in paths:
        numbered = ((f"{file}:{number}", line) for file in _choice_files(path) for number, line in lines(file))
        found = [_item(line, place) for place, line in numbered if line.strip()]
        if not found:
            raise UserError(f"--evaluation.choices: {path}: empty; it needs XCOPA's items, one a line")
        for item in found:
            items.setdefault(item.lang, []).append(item)
    return items


def _choice_files(path: str) -> list[pathlib.Path]:
    given = pathlib.Path(path).expanduser()
    if given.is_file():
        return [given]
    if not given.is_dir():
        raise UserError(f"--evaluation.choices: {path}: no such file or folder")
    files = sorted(file for file in given.iterdir() if file.name.removesuffix(".gz").endswith(".jsonl"))
    if not files:
        raise UserError(f"--evaluation.choices: {path}: no .jsonl or .jsonl.gz file in this folder")
    return [file for file in files if "test" in file.name.split(".")] or files


@functools.cache
def _adapter() -> pydantic.TypeAdapter[Item]:
    return pydantic.TypeAdapter(Item)


def _item(line: bytes, place: str) -> Item:
    try:
        item = _adapter().validate_json(line)
        return dataclasses.replace(item, lang=normalize(item.lang))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = "".join(f"field {name!r}: " for name in first["loc"])
        reason = f"{field}{first['msg'][0].lower()}{first['msg'][1:]}"
    except UserError as error:
        reason = f"field 'lang': {error}"
    raise UserError(
        f"{place}: {reason}; a line is a JSON object with premise, choice1, choice2, question (cause or effect), label "
        "(0 or 1), lang and idx"
    )


@functools.cache
def _connectors() -> dict[str, dict[str, str]]:
    return yaml.safe_load((TASKS / "xcopa.yaml").read_text(encoding="utf-8"))["languages"]


def two_option_accuracy(
    decoder: Decoder, tokenizer: Tokenizer, items: Mapping[str, Sequence[Item]], mesh: Mesh, **options
) -> dict[str, np.ndarray]:
    """Whether the right choice is the more probable one after the premise, [N] bool by language; chance is 50 %.

    Premise and choice are one sentence, joined by "because" or "therefore" of the language: the prompts of
    lm-evaluation-harness (lm_eval/tasks/xcopa/utils.py; for English super_glue/copa/utils.py). In a language that
    `tasks/xcopa.yaml` does not know they follow each other as they are. `options` are those of `log_likelihoods`.
    """
    pairs = [pair for code, of in items.items() for item in of for pair in _prompts(item, code)]
    score = log_likelihoods(decoder, encode(tokenizer, pairs), mesh, **options).log_probability.reshape(-1, 2)
    found = {}
    for code, of in items.items():
        own, score = score[: len(of)], score[len(of) :]
        found[code] = own.argmax(axis=1) == np.array([item.label for item in of], int)
    return found


def _prompts(item: Item, code: str) -> list[tuple[str, str]]:
    choices = (item.choice1, item.choice2)
    if code not in _connectors():
        return [(item.premise, f" {choice}") for choice in choices]
    connector = _connectors()[code]["because" if item.question == "cause" else "therefore"]
    context = f"{item.premise[:-1]} {connector}"  # without the full stop
    return [(context, f" {choice[0].lower()}{choice[1:]}") for choice in choices]
