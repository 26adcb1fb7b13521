"""A decoder of ours as a model of lm-evaluation-harness, and the tasks whose files are on this machine.

Everything of the harness is imported here; `harness` imports this module where the harness is installed.
"""

from __future__ import annotations

import inspect
import itertools
import json
import logging
import pathlib
from collections import Counter
from collections.abc import Sequence

import jax.numpy as jnp
import jinja2
from datasets import Dataset
from jax.sharding import Mesh
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string

from alignx_jax import sharding
from alignx_jax.data import chats
from alignx_jax.data import tokenizer as tokenizers
from alignx_jax.data.tokenizer import Tokenizer
from alignx_jax.evaluation.measure import scoring
from alignx_jax.exits import UserError
from alignx_jax.models import generation, huggingface
from alignx_jax.models.decoder import Decoder
from alignx_jax.runs import loading

_LONGEST = 2048  # tokens: of `hf` too, where a model names no context. A score's memory grows with the square of it,
# and hardly a prompt is longer: most models' own contexts, of 8,192 to 131,072 tokens, would be paid for nothing.
_SHORTEST = 256  # tokens of a row; powers of two above, so that few programs are compiled
_log = logging.getLogger(__name__)


@register_model("alignx_jax")
class AlignXLM(TemplateLM):
    """Requests of the harness, answered as its `hf` model answers them (lm_eval/models/huggingface.py, 0.4.13).

    The tokens are those of training: of tokenizer.json as it is written, with BOS where the folder's tokenizer adds it.
    Control tokens that a request spells are such, as chat templates put them there; none is added behind a text.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        folder: pathlib.Path,
        mesh: Mesh,
        *,
        rows: int,
        dtype: jnp.dtype,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        progress: scoring.Progress | None = None,
    ):
        """
        Args:
          folder: the model's Hugging Face folder: its configuration and tokenizer.
          rows: rows scored, or sequences generated, at a time, over all devices.
          max_length: most tokens of a request; a longer one loses its beginning, as with `hf`. Unset: the model's
            context, 2,048 at most. No more than that context.
          max_gen_toks: most new tokens where a task does not say.

        Raises:
          UserError: `max_length` is longer than the model's context.
        """
        super().__init__()
        context = decoder.config.max_positions
        if max_length is not None and max_length > context:
            raise UserError(f"--model_args: max_length={max_length}, and the model's context is {context}; lower it")
        self._decoder, self._tokenizer, self._mesh = decoder, tokenizer, mesh
        self._options = {"rows": rows, "dtype": dtype, "progress": progress}
        self.max_length = max_length or min(context, _LONGEST)
        self.requests: Counter[str | None] = Counter()
        """How many there were of each task, so far."""
        self.cut: Counter[str | None] = Counter()
        """How many of them lost their beginning."""
        self._asking: list[str | None] = []
        self._max_gen_toks = max_gen_toks
        self._eos_ids = {*huggingface.stop_ids(folder, tokenizer.eos_id), *chats.turn_ends(tokenizer)}

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> AlignXLM:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> AlignXLM:
        """The model that `--model_args` describe, by the names of `_load`.

        `additional_config` is the harness's batch size and device; `rows` and `mesh` say these here.
        """
        known = inspect.signature(_load).parameters
        if unknown := arg_dict.keys() - known:
            raise UserError(f"--model_args: unknown {min(unknown)!r}; it can hold {', '.join(known)}")
        if "pretrained" not in arg_dict:
            raise UserError("--model_args: give pretrained=FOLDER, a Hugging Face folder or a stage's folder of a run")
        return _load(**arg_dict)

    @property
    def tokenizer_name(self) -> str:
        """A key of the harness's cache of requests."""
        return self._tokenizer.fingerprint

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        bos = self._tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        ((ids, _),) = self._tokenizer.encode_batch([self._tokenizer.controls.mark(string)])
        if add_special_tokens is None:
            return self._tokenizer.begin(ids.tolist())
        return [*(self._tokenizer.prefix if add_special_tokens else ()), *ids.tolist()]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template of `--apply_chat_template`; None without that."""
        if not chat_template:
            return None
        if chat_template not in (True, "default"):
            raise UserError(f"--apply_chat_template={chat_template}: the default one is used; leave the name out")
        return self._chats.template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        options = {"add_generation_prompt": add_generation_prompt, "continues": not add_generation_prompt}
        try:
            return self._chats.render(chat_history, **options)[0]
        except jinja2.TemplateError:
            _log.warning("the chat template refuses a prompt with its system turn, which is left out")
            chat_history = [turn for turn in chat_history if turn["role"] != "system"]
            return self._chats.render(chat_history, **options)[0]

    @property
    def _chats(self) -> tokenizers.Chats:
        if self._tokenizer.chats is None:
            raise UserError("--apply_chat_template: the model's tokenizer has no chat template; leave the flag out")
        return self._tokenizer.chats

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._asking = [request.task_name for request in requests]  # which the tokens come without
        return self._loglikelihood_tokens([(request.args, *self._tokens(*request.args)) for request in requests])

    def _tokens(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As `TemplateLM` has them; where the encoding of both as one leaves the continuation none, both apart.

        Raises:
          UserError: a continuation without a token.
        """
        before, after = self._encode_pair(context, continuation) if context else ([], [])
        if not after:
            start = context.rstrip()
            before = self.tok_encode(start) if start else []
            after = self.tok_encode(context[len(start) :] + continuation, add_special_tokens=False)
        if not before and after[:1] != [self.prefix_token_id]:
            before = [self.prefix_token_id]
        if not before:
            before, after = after[:1], after[1:]
        if not after:
            raise UserError(f"--evaluation.tasks: an option to score, {continuation!r:.60}, has no token; leave it out")
        return before, after

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs
    ) -> list[tuple[float, bool]]:
        for _, _, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"--evaluation.tasks: a continuation to score has {len(continuation)} tokens, and a request at "
                    f"most {self.max_length}; leave the task out"
                )
        self._count(self._asking, [len(a) + len(b) > self.max_length + 1 for _, a, b in requests], self.max_length)
        return self._scored([(context, continuation) for _, context, continuation in requests])

    def _count(self, tasks: Sequence[str | None], cut: Sequence[bool], length: int) -> None:
        self.requests.update(tasks)
        self.cut.update(itertools.compress(tasks, cut))
        if any(cut):
            _log.warning("%d of %d requests are cut to their last %d tokens", sum(cut), len(cut), length)

    def _scored(self, requests: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        longest = max((len(a) + len(b) - 1 for a, b in requests), default=1)
        row_length = min(self.max_length, max(_SHORTEST, 1 << (longest - 1).bit_length()))
        scores = scoring.log_likelihoods(self._decoder, requests, self._mesh, row_length=row_length, **self._options)
        return list(zip(scores.log_probability.tolist(), scores.greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        windows = [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
                )
            ]
            for request in requests
        ]
        self._count([request.task_name for request in requests], [], self.max_length)  # windows hold all of a text
        scores = iter(self._scored([window for of in windows for window in of]))
        return [sum(next(scores)[0] for _ in of) for of in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        texts = [""] * len(requests)
        by_settings: dict[str, list[int]] = {}
        for n, request in enumerate(requests):
            by_settings.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(n)
        for settings, numbers in by_settings.items():
            some = [requests[n] for n in numbers]
            for n, text in zip(numbers, self._generated(some, json.loads(settings)), strict=True):
                texts[n] = text
        return texts

    def _generated(self, requests: Sequence[Instance], settings: dict) -> list[str]:
        settings = dict(normalize_gen_kwargs(settings, self._max_gen_toks))
        stops = [stop for stop in handle_stop_sequences(settings.pop("until"), self._tokenizer.eos) if stop]
        count = settings.pop("max_gen_toks")
        if count >= self.max_length:
            raise UserError(
                f"--evaluation.tasks: a task asks for {count} new tokens, and a request has at most {self.max_length} "
                "with them; leave the task out"
            )
        encoded = [self.tok_encode(request.args[0]) for request in requests]
        room = self.max_length - count
        self._count([request.task_name for request in requests], [len(ids) > room for ids in encoded], room)
        found = generation.generate(
            self._decoder,
            [ids[-room:] for ids in encoded],
            self._mesh,
            max_tokens=count,
            eos_ids=sorted(self._eos_ids | self._stop_tokens(stops)),
            decoding=_decoding(settings),
            **self._options,
        )
        return [postprocess_generated_text(self._tokenizer.decode(ids), stops, None) for ids in found]

    def _stop_tokens(self, stops: Sequence[str]) -> set[int]:
        """Tokens whose text begins with a stop: what follows is cut off, so that generation may end with them.

        Wherever they stand: a text's first token may lose its space. And not of a stop that the end of one may run
        into, as a line's end into an empty line: the cut could be earlier then.
        """
        alone = tuple(
            stop
            for stop in stops
            if not any(end.startswith(stop) or stop.startswith(end) for s in stops for end in _ends(s))
        )
        decode = self._tokenizer.decode
        ((before, _),) = self._tokenizer.encode_batch(["a"])
        start, tokens = len(decode(before)), range(self._tokenizer.vocab_size)
        inside = (token for token in tokens if decode([*before, token])[start:].startswith(alone))
        return {token for token in inside if decode([token]).startswith(alone)}


def _ends(text: str) -> list[str]:
    return [text[i:] for i in range(1, len(text))]


def _decoding(settings: dict) -> generation.Decoding:
    """What the settings of a task ask for, those of `generate` of transformers."""
    sample, beams = settings.pop("do_sample"), settings.pop("num_beams", 1)
    temperature = settings.pop("temperature", 0.0)
    sampling = {name: settings.pop(name) for name in ("top_k", "top_p") if name in settings}
    length_penalty = settings.pop("length_penalty", 1.0)
    if settings or (sample and beams > 1):
        names = ", ".join(settings) or "do_sample with num_beams"
        raise UserError(f"a task's generation_kwargs ask for {names}, which alignx_jax has not; leave the task out")
    if sample:
        return generation.Decoding("sample", temperature=temperature, **sampling)
    if beams > 1:
        return generation.Decoding("beam", beams=beams, length_penalty=length_penalty)
    return generation.Decoding()


def _load(
    pretrained: str,
    mesh: str = "1x1",
    rows: int = 32,
    max_length: int | None = None,
    dtype: str = "bfloat16",
    max_gen_toks: int = 256,
) -> AlignXLM:
    sharding.prepare_devices(mesh)
    on, source = sharding.make_mesh(mesh), loading.find(pretrained)
    sharding.check(source.decoder_config(), on, rows, flag="model_args rows")
    tokenizer = tokenizers.load(source.huggingface, source.decoder_config().vocab_size)
    return AlignXLM(
        source.load(on),
        tokenizer,
        source.huggingface,
        on,
        rows=rows,
        dtype=jnp.dtype(dtype),
        max_length=max_length,
        max_gen_toks=max_gen_toks,
    )


class OfflineTask(ConfigurableTask):
    """A task whose items are given, and not fetched."""

    def __init__(self, items: list[dict], config: dict):
        self._items = items
        super().__init__(config=config)

    def download(self, *args, **kwargs) -> None:
        self.dataset = {"test": Dataset.from_list(self._items)}
