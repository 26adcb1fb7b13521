"""Every family of decoders beside transformers and PyTorch, on small random models with every feature switched on.

python -m benchmarks.parity [--save=docs/families.md]     # writes the table between the marks of that file

Logits and hidden states are float32, of packed rows on our side and of each sequence alone on theirs, beyond windows
and original contexts. Gradients are those of stage 1 (next token, contrastive, language matching) in float64, of
left-padded rows. Checkpoints are float32, bfloat16 and float16.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
import pathlib
import tempfile
import types
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
import tyro
from flax import nnx
from safetensors.torch import load_file
from transformers import modeling_rope_utils

from alignx_jax import sharding
from alignx_jax.models import families, generation, huggingface
from alignx_jax.models.decoder import Decoder
from alignx_jax.training import state, step
from benchmarks.torch_reference import AlignXTorch, collate
from tests.models import llamas
from tests.training import published

FEATURES = {
    "gqa": "Llama 2: grouped queries",
    "llama3_rope": "Llama 3.1: `llama3` RoPE, `head_dim` of its own",
    "linear_rope": "Llama 2, long: `linear` RoPE",
    "tied_head_dim": "Llama 3.2: tied embeddings",
    "biases": "Llama: biases on every product",
    "mistral": "Mistral 0.1: window in every layer",
    "mistral_nemo": "Mistral Nemo: no window, `head_dim` of its own, base 1e6",
    "qwen2": "Qwen 2.5: bias on q, k, v; `yarn` RoPE; window from a layer on; tied embeddings",
    "qwen3": "Qwen 3: q/k norms, `head_dim` of its own, `yarn` RoPE, window from a layer on, `attention_bias`",
    "gemma": "Gemma 1: scaled embeddings, norms less 1, GeGLU, tied embeddings",
    "gemma2": "Gemma 2: both soft caps, `query_pre_attn_scalar`, alternating windows, post-norms",
    "gemma3": "Gemma 3: q/k norms, five local layers to a global one, two RoPE bases, `linear` RoPE, post-norms",
}
_LENGTHS = [[36, 5, 1, 4], [3, 45]]  # of the packed sequences; the first row ends with 2 tokens of padding
_ROW = 48
_PROMPTS = [llamas.random_tokens(1, n, seed=n)[0].tolist() for n in (5, 1, 30, 17, 3, 8)]
_TOKENS = 12
_DTYPES = ("float32", "bfloat16", "float16")
_BEGIN, _END = "<!-- parity -->\n", "<!-- end of parity -->\n"


@dataclasses.dataclass(frozen=True)
class Parity:
    """Largest differences between our side and theirs."""

    logits: float
    states: float
    """Of all layers' hidden states, after the final norm too."""
    gradients: float
    """Norm of the difference over the norm, of the parameter where it is largest."""
    generations: int
    """Prompts continued token by token as transformers does, from the model and from its export."""
    round_trips: int
    """Checkpoints, a type each, that are exported bit for bit."""


def measure(variant: str, folder: pathlib.Path) -> Parity:
    """A variant of `tests/models/llamas.py`; `folder` is for its checkpoints."""
    source = llamas.save(llamas.make(variant), folder / "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    decoder = huggingface.load(source, sharding.make_mesh("1x1"))
    states, logits = forward_errors(model, decoder)
    round_trips = sum(round_trip(variant, dtype, folder) for dtype in _DTYPES)
    exported = transformers.AutoModelForCausalLM.from_pretrained(folder / "float32-exported").eval()
    generations = same_generations(decoder, model, exported)
    return Parity(logits, states, gradient_error(source), generations, round_trips)


def forward_errors(model: transformers.PreTrainedModel, decoder: Decoder) -> tuple[float, float]:
    """Of hidden states and of logits, over the tokens of packed rows."""
    tokens = llamas.random_tokens(2, _ROW)
    positions, segments, places = np.zeros_like(tokens), np.zeros_like(tokens), []
    for row, lengths in enumerate(_LENGTHS):
        ends = itertools.accumulate(lengths)
        for slot, (length, end) in enumerate(zip(lengths, ends, strict=True), start=1):
            here = slice(end - length, end)
            positions[row, here], segments[row, here] = np.arange(length), slot
            places.append((row, here))
    ours = [np.asarray(x) for x in llamas.our_states(decoder, tokens, positions, segments)]
    found = []
    for row, here in places:
        theirs = llamas.states(model, tokens[row : row + 1, here])
        found.append([np.abs(o[..., row, here, :] - t[..., 0, :, :]).max() for o, t in zip(ours, theirs, strict=True)])
    states, logits = np.max(found, axis=0)
    return float(states), float(logits)


def round_trip(variant: str, dtype: str, folder: pathlib.Path) -> bool:
    """Whether a checkpoint of a type is exported bit for bit."""
    source, exported = folder / dtype, folder / f"{dtype}-exported"
    if dtype != "float32":
        llamas.save(llamas.make(variant, getattr(torch, dtype)), source)
    decoder = huggingface.load(source, sharding.make_mesh("1x1"))
    huggingface.export(decoder, huggingface.read_config(source), exported, jnp.dtype(dtype), 5e9)
    before, after = (load_file(f / "model.safetensors") for f in (source, exported))
    same = before.keys() == after.keys()
    return same and all(t.dtype == after[k].dtype and torch.equal(t, after[k]) for k, t in before.items())


def same_generations(decoder: Decoder, *models: transformers.PreTrainedModel) -> int:
    """Prompts that we and all models continue with the same tokens, by greedy search."""
    ours = generation.generate(
        decoder,
        _PROMPTS,
        sharding.make_mesh("1x1"),
        max_tokens=_TOKENS,
        eos_ids=[llamas.VOCABULARY - 1],
        rows=len(_PROMPTS),
        dtype=jnp.float32,
    )
    return sum(
        all(continuation(model, p) == found for model in models) for p, found in zip(_PROMPTS, ours, strict=True)
    )


def continuation(model: transformers.PreTrainedModel, prompt: list[int]) -> list[int]:
    tokens, end = torch.tensor([prompt]), llamas.VOCABULARY - 1
    options = {"max_new_tokens": _TOKENS, "eos_token_id": end, "pad_token_id": 0, "do_sample": False}
    with torch.no_grad():
        (out,) = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    return list(itertools.takewhile(lambda t: t != end, out[len(prompt) :].tolist()))


def stage_1_inputs() -> dict[str, torch.Tensor]:
    """`examples`, padded as the published code does."""
    inputs = collate(examples(), pad_id=0)
    begins = inputs["attention_mask"].argmax(dim=1)
    inputs["labels"][torch.arange(len(begins)), begins] = -100  # nothing predicts a row's first token
    return inputs


def stage_1_gradients(decoder: Decoder, reference: AlignXTorch, inputs: dict[str, torch.Tensor]) -> state.Params:
    """Ours by all that is trained, with the reference's pair classifier: NumPy, in float64 where it is switched on."""
    classifier = state.PairClassifier(decoder.config.hidden_size, 128, rngs=nnx.Rngs(0), dtype=jnp.float64)
    for name, kernel in reference.language_matching_classifier.named_parameters():
        setattr(classifier, name.partition("_")[0], nnx.Param(jnp.asarray(kernel.detach().numpy().T)))
    graph, params, frozen = state.split(state.AlignX(decoder, classifier))
    plan = published.recipe(1, decoder.config.num_layers, jnp.float64)
    batch = published.batch({name: x.numpy() for name, x in inputs.items()})
    return jax.device_get(
        jax.jit(functools.partial(step.gradients, graph=graph, recipe=plan))(params, batch, frozen=frozen)[0]
    )


def gradient_error(folder: pathlib.Path) -> float:
    """Of the gradient of stage 1 by each of the decoder's parameters, in float64."""
    family = huggingface.read_config(folder)["model_type"].removesuffix("_text")
    with float64(importlib.import_module(f"transformers.models.{family}.modeling_{family}")):
        torch.manual_seed(0)
        reference = AlignXTorch(folder, 1, attn_implementation="eager", dtype=torch.float64)
        inputs = stage_1_inputs()
        reference(inputs)["loss"].backward()
    with jax.enable_x64(True), jax.set_mesh(mesh := sharding.make_mesh("1x1")):
        decoder = huggingface.load(folder, mesh, jnp.float64)
        found = stage_1_gradients(decoder, reference, inputs)["decoder"]
    errors = []
    for weight in families.FAMILIES[decoder.config.family].table(decoder.config):
        parameter = functools.reduce(dict.__getitem__, weight.path, found)
        sizes = [size for factors in weight.split(decoder.config) for size in factors]
        for key, part in zip(weight.keys(decoder.config), parameter if weight.stacked else [parameter], strict=True):
            ours = part.transpose(np.argsort(weight.axes))[tuple(map(slice, sizes))]  # without the vocabulary's padding
            theirs = reference.llm.get_parameter(key).grad.numpy()
            errors.append(np.linalg.norm(ours.reshape(theirs.shape) - theirs) / np.linalg.norm(theirs))
    return float(max(errors))


def examples() -> list[dict]:
    """Six pairs of sentences of three languages, longer than the windows."""
    rng = np.random.default_rng(0)
    examples = []
    for n, (before, source, between, target) in enumerate(rng.integers(4, 14, (6, 4))):
        marks = [0] * before + [1] * source + [0] * between + [2] * target + [0]
        tokens = rng.integers(1, llamas.VOCABULARY, len(marks)).tolist()
        examples.append(
            {"input_ids": tokens, "src_tgt_index": marks, "src_lang": n % 3, "tgt_lang": (n + 1 + n % 2) % 3}
        )
    return examples


@contextlib.contextmanager
def float64(*modules: types.ModuleType) -> Iterator[None]:
    """Where modules of transformers widen to float32 (norms, rotary tables, eager softmax), they widen to float64."""

    class Wide(types.ModuleType):
        def __getattr__(self, name):
            return torch.float64 if name in ("float", "float32") else getattr(torch, name)

    with contextlib.ExitStack() as stack:
        for module in (*modules, modeling_rope_utils):
            stack.enter_context(mock.patch.object(module, "torch", Wide("torch")))
        stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        yield


def table(found: dict[str, Parity]) -> str:
    lines = ["| | logits | hidden states | gradients | generations | round trips |", "|---|---|---|---|---|---|"]
    for variant, parity in found.items():
        errors = " | ".join(f"{e:.0e}" for e in (parity.logits, parity.states, parity.gradients))
        counts = f"{parity.generations} of {len(_PROMPTS)} | {parity.round_trips} of {len(_DTYPES)}"
        lines.append(f"| {FEATURES[variant]} | {errors} | {counts} |")
    return "\n".join(lines) + "\n"


@dataclasses.dataclass(frozen=True)
class Options:
    save: pathlib.Path | None = None
    """A file whose table is written anew."""


def main(options: Options) -> None:
    found = {}
    for variant in FEATURES:
        with tempfile.TemporaryDirectory() as folder:
            found[variant] = measure(variant, pathlib.Path(folder))
        print(variant, found[variant], flush=True)
    if options.save:
        before, _, rest = options.save.read_text().partition(_BEGIN)
        options.save.write_text(before + _BEGIN + table(found) + _END + rest.partition(_END)[2])


if __name__ == "__main__":
    main(tyro.cli(Options))
