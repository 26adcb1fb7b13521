"""The configuration of a run: one tree of frozen dataclasses, every field with its unit and its role.

The defaults are the published settings of AlignX (arXiv 2509.24338) wherever the paper or its code fixes a value.
A file in `configs/` builds a `Config`; any field is also a flag (`--optimizer.learning-rate=1e-5`).
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import pydantic
import pydantic_core

Stage = Literal["prepare", "1", "2", "evaluate", "export", "plan", "all"]

T = TypeVar("T")


class Role(enum.Enum):
    """What a change of a setting means for a stage that was begun without it."""

    RESULT = "other weights would come out: it is refused, or accepted by --accept-changes"
    SHAPE = "the arrays of the saved state would be others: it is refused"
    CONTENTS = "a path of data or of a model: the digest of what is there counts"
    WORK = "how the work is done: the result is the same"
    PLACE = "where something is written or kept: the result is the same"
    MEASURE = "what is measured of trained models"
    OUTPUT = "what is exported or planned"


Result = Annotated[T, Role.RESULT]
Shape = Annotated[T, Role.SHAPE]
Contents = Annotated[T, Role.CONTENTS]
Work = Annotated[T, Role.WORK]
Place = Annotated[T, Role.PLACE]
Measure = Annotated[T, Role.MEASURE]
Output = Annotated[T, Role.OUTPUT]

REMOTE = "may be gs://"
"""Marks a path of what a run writes or has written."""

_STRICT = pydantic.ConfigDict(extra="forbid")

_Count = Annotated[int, pydantic.Field(ge=1, lt=2**31)]
_Size = Annotated[int, pydantic.Field(ge=0, lt=2**31)]
_Path = Annotated[str, pydantic.Field(min_length=1)]
_Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
_Factor = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
_Share = Annotated[float, pydantic.Field(ge=0, le=1)]
_Decay = Annotated[float, pydantic.Field(ge=0, lt=1)]


def _folder_name(text: str) -> str:
    if not re.fullmatch(r"\w[\w.-]{,59}", text) or text.endswith(".lock"):
        raise pydantic_core.PydanticCustomError(
            "name",
            "has to be at most 60 letters, digits, dots, - and _, a letter or digit first, and not end in .lock",
        )
    return text


_FolderName = Annotated[str, pydantic.AfterValidator(_folder_name)]


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it becomes packed rows of tokens."""

    __pydantic_config__ = _STRICT

    parallel: Contents[tuple[str, ...]] = ()
    """Parallel text: TSV or JSONL files (.gz too), folders of them, Moses pairs by prefix (`train.de-en`), a published
    pair such as `opus100/de-en`, `sample`."""
    parallel_weights: Result[tuple[_Positive, ...]] = ()
    """How many times an epoch reads each parallel source (0.5: a fresh half every epoch); empty: once each."""
    temperature: Result[Annotated[float, pydantic.Field(ge=1, allow_inf_nan=False)]] = 1.0
    """An epoch takes n^(1/temperature) of a pair of languages that has n by the weights, scaled to as many examples in
    all: 1 as they are, 5 flatter, 100 nearly the same of each."""
    pairs: Result[Literal["pivot", "all"]] = "pivot"
    """Pairs made of a multi-way line: each language with English, or every two languages."""
    instructions: Contents[tuple[str, ...]] = ()
    """Alpaca-style instructions or chats for stage 2: JSON or JSONL files (.gz too), Parquet, folders of them, a
    published language such as `bactrian_x/de`, or `sample`."""
    instruction_weights: Result[tuple[_Positive, ...]] = ()
    """How many times an epoch reads each instruction source; empty: once each."""
    translation_share: Result[_Share] = 0.5
    """Share of stage-2 examples that are translation instructions drawn from `parallel` (0 to 1)."""
    directions: Result[Literal["both", "forward", "backward"]] = "both"
    """Translation directions made of each pair: as the file gives it (forward), turned round (backward), or both."""
    template: Contents[str] = "alpaca"
    """Prompt template: a JSON file (see docs/data.md), `alpaca` (published), or `sample` (a few tokens long)."""
    cutoff: Result[Annotated[int, pydantic.Field(ge=4)]] = 512
    """Longest example, in tokens with BOS and EOS."""
    overlong: Result[Literal["drop", "truncate"]] = "drop"
    """An example longer than the cutoff is dropped and counted, or truncated as the published code does."""
    min_target_tokens: Result[_Count] = 3
    """An example with fewer target tokens before its last position is dropped and counted (published: 3)."""
    spans: Result[Literal["separate", "in-prompt"]] = "separate"
    """Where stage 1 pools a sentence: encoded once more by itself, at the cost of its tokens, which count towards the
    cutoff and have no next-token loss; or inside the prompt (published), where a target has seen its source."""
    loss_on: Result[Literal["sequence", "response"]] = "sequence"
    """Next-token loss over the whole sequence (published) or over the response only; of chats always the assistant's
    turns only."""
    row_length: Result[_Count] = 512
    """Tokens in a packed row; at least `cutoff`."""
    examples_per_row: Result[_Count] = 16
    """Most examples packed into one row."""
    validation: Result[_Size] = 2000
    """Pairs held out for validation, over all sources, at most a tenth; in stage 2 as many instructions too."""
    limit: Result[_Count | None] = None
    """Most records used of each source, spread evenly over it; unset: all."""
    on_error: Result[Literal["stop", "skip"]] = "stop"
    """A bad line stops preparation with file and line, or is skipped, counted and listed in a file."""
    cache: Place[_Path] = "~/.cache/alignx_jax"
    """Folder of the prepared (ArrayRecord) and tokenized corpora; later runs reuse them."""
    beam: Work[str | None] = None
    """Options of an Apache Beam pipeline whose workers read and check text files (docs/beam.md), such as
    `--runner=DirectRunner --direct_num_workers=4`, in one string; unset: this process does. The data are the same."""


@dataclass(frozen=True)
class ContrastiveConfig:
    """Multilingual semantic alignment (paper section 3.1), L_CTR."""

    __pydantic_config__ = _STRICT

    weight: Result[_Factor] = 0.3
    """lambda_ctr; 0 turns the loss off."""
    layer: Result[int | Literal["auto"]] = "auto"
    """Layers run before the hidden state that is aligned (published: half of the model's, 16 of 32); auto: where the
    two sentences of held-out pairs find each other best before training."""
    temperature: Result[_Positive] = 0.1
    """tau of the InfoNCE softmax over cosine similarities."""
    form: Result[Literal["published", "symmetric"]] = "published"
    """Published: each source against all targets, halved. Symmetric: the mean of both directions."""


@dataclass(frozen=True)
class LanguageMatchingConfig:
    """Language feature integration (paper section 3.2), L_LAM."""

    __pydantic_config__ = _STRICT

    weight: Shape[_Factor] = 0.4
    """lambda_lam; 0 turns the loss off."""
    layer: Result[int | None] = None
    """Layers run before the hidden state that is classified; unset: all, after the final norm (published)."""
    width: Shape[_Count] = 128
    """Hidden width of the pair classifier."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """L = L_NTP + lambda_ctr L_CTR + lambda_lam L_LAM."""

    __pydantic_config__ = _STRICT

    contrastive: ContrastiveConfig = ContrastiveConfig()
    language_matching: LanguageMatchingConfig = LanguageMatchingConfig()
    standardize: Result[Literal["batch", "none"]] = "batch"
    """Pooled states get mean 0 and deviation 1 in each dimension, over the sentences that meet, before both pair
    losses; or are taken as they are (published: none), where a pre-trained model's point all the same way."""
    negatives: Result[Literal["global", "step", "micro-batch"]] = "global"
    """Pairs meet those of all devices in their micro-batch, of all micro-batches of the step too (exact, at the cost of
    one more forward pass), or (published) those of their own device in their micro-batch."""
    duplicates: Result[Literal["mask", "keep"]] = "mask"
    """A pair that shares a sentence with the anchor's pair is no negative of it (mask), or is one (published: keep)."""
    chunk: Result[_Count | None] = None
    """Positions of each row whose logits exist at a time in the next-token loss; unset: up to 128, as many as keep
    them under 256 MB a device."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Adafactor, linear warm-up from 0 and linear decay to 0, clipping by global norm."""

    __pydantic_config__ = _STRICT

    kind: Shape[Literal["adamw", "adafactor"]] = "adamw"
    """AdamW (published), or Adafactor with the same learning rates, whose state is a few MB: no mean of the gradient,
    and of its square means over rows and columns only. The betas, epsilon and moment type are AdamW's alone."""
    learning_rate: Result[_Factor] = 2e-6
    """Peak learning rate."""
    warmup_steps: Result[_Size] = 100
    """Steps of linear warm-up; the first update has learning rate 0."""
    beta1: Result[_Decay] = 0.9
    """Decay of the gradient's running mean."""
    beta2: Result[_Decay] = 0.999
    """Decay of the squared gradient's running mean."""
    epsilon: Result[_Positive] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Result[_Factor] = 0.0
    """Decoupled weight decay, on all parameters as published."""
    clip_norm: Result[_Positive] = 1.0
    """Largest global norm of the accumulated gradient."""
    moment_dtype: Shape[Literal["float32", "bfloat16"]] = "float32"
    """Type in which the gradient's running mean is kept: bfloat16 saves 2 bytes a parameter. That of its square, whose
    changes are too small for bfloat16, is float32 always."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685): the model's weights are frozen, in bfloat16."""

    __pydantic_config__ = _STRICT

    rank: Shape[_Size] = 0
    """Rank of what is trained of a linear layer, in float32; 0: all weights are trained, and there are no adapters."""
    alpha: Shape[_Positive] = 32.0
    """An adapter's output is multiplied by alpha / rank."""
    targets: Shape[str] = ".*"
    """Linear layers with an adapter: a regular expression of Hugging Face's names of them, such as `q_proj|v_proj`;
    unset: all of attention and MLP."""


@dataclass(frozen=True)
class TrainingConfig:
    """The loop."""

    __pydantic_config__ = _STRICT

    rows: Result[_Count] = 32
    """Packed rows an optimizer step, over all devices and micro-batches."""
    accumulation: Result[_Count] = 1
    """Micro-batches a step is split into."""
    epochs: Result[_Positive] = 2.0
    """Passes over the data."""
    steps: Result[_Count | None] = None
    """Optimizer steps, instead of `epochs`."""
    compute_dtype: Result[Literal["bfloat16", "float32"]] = "bfloat16"
    """Precision of activations and matrix products; master weights, moments and sums are float32."""
    attention: Result[Literal["auto", "xla", "splash", "cudnn"]] = "auto"
    """What computes attention: a fused kernel, splash on TPU or cudnn on GPU, or xla anywhere; auto: what it can."""
    remat: Result[Literal["none", "attention", "block", "offload"]] = "block"
    """What the backward pass computes again: nothing, every layer but its attention, or every layer from its input,
    which `offload` keeps in the host's memory."""
    validate_every: Result[_Count] = 200
    """Steps between validations (and at the end)."""
    save_every: Work[_Count] = 200
    """Steps between checkpoints (and at the end)."""
    keep: Work[_Count] = 2
    """Latest checkpoints kept, besides the best by validation loss."""
    wandb: Place[_Path | None] = None
    """Project on Weights & Biases that gets settings and metrics too (needs the package wandb); unset: none."""
    stall_seconds: Work[_Positive] = 600.0
    """Seconds that a step, its data, a validation or a save may take before a stall is reported; it goes on all the
    same."""


@dataclass(frozen=True)
class TranslationConfig:
    """Translation of the evaluation sentences with the template of `data.template`."""

    __pydantic_config__ = _STRICT

    directions: Measure[tuple[str, ...]] = ("pivot",)
    """Pairs such as `de-en`, `pivot` (to and from the pivot, every language), `all` (every pair), `none`."""
    limit: Measure[_Count] = 100
    """Most sentences a direction."""
    shots: Measure[_Size] = 0
    """Translations shown before each sentence; taken from lines of the file that are not tested."""
    method: Measure[Literal["greedy", "beam", "sample"]] = "greedy"
    """How the next token is chosen."""
    beams: Measure[Annotated[int, pydantic.Field(ge=2)]] = 4
    """Hypotheses kept by beam search."""
    length_penalty: Measure[Annotated[float, pydantic.Field(allow_inf_nan=False)]] = 1.0
    """Beam search divides the log probability of a hypothesis by its length to this power."""
    temperature: Measure[_Positive] = 1.0
    """Sampling divides the logits by it."""
    top_k: Measure[_Size] = 0
    """Sampling takes one of the most probable tokens, this many; 0: of all."""
    top_p: Measure[Annotated[float, pydantic.Field(gt=0, le=1)]] = 1.0
    """Sampling takes one of the most probable tokens that together have this probability."""
    max_tokens: Measure[_Count] = 128
    """Most tokens generated a sentence."""
    rows: Measure[_Count] = 32
    """Sentences generated at a time, over all devices."""
    comet: Measure[str | None] = None
    """Checkpoint (.ckpt) of a COMET model, for the program comet-score of unbabel-comet; unset: no COMET."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured of a model: alignment layer by layer, translation, perplexity, tasks."""

    __pydantic_config__ = _STRICT

    name: Measure[_FolderName | None] = None
    """Folder in `evaluation/` of the run's; unset: from the sentences, such as `flores200-devtest`."""
    sentences: Measure[str | None] = None
    """Multi-way parallel sentences: JSONL with `{"text": {"en": ..., "de": ...}}` a line, `flores200:dev`,
    `flores200:devtest` (101 too), `ntrex128:test`, or `sample` (held out)."""
    languages: Measure[tuple[str, ...]] = ()
    """Languages compared with the pivot; empty: all in the file. English is measured besides, if all lines have it."""
    pivot: Measure[str] = "en"
    """The language that every other one is retrieved from and to."""
    limit: Measure[_Count] = 1000
    """Most sentences a language."""
    rows: Measure[_Count] = 32
    """Packed rows encoded at a time, over all devices."""
    in_prompt: Measure[bool] = False
    """Also score sentences inside the training prompt, where a target has seen its source: inflated by construction."""
    choices: Measure[tuple[str, ...]] = ()
    """Two-option items, XCOPA's JSONL (premise, choice1, choice2, question, label, lang): files or folders of them."""
    tasks: Measure[tuple[str, ...]] = ()
    """Tasks of lm-evaluation-harness by name, where `lm_eval` is installed."""
    tasks_data: Measure[str | None] = None
    """Folder of the files that the project's own offline tasks (docs/evaluation.md) read."""
    tasks_limit: Measure[_Count | None] = None
    """Most items a task; unset: all."""
    resamples: Measure[Annotated[int, pydantic.Field(ge=100)]] = 1000
    """Bootstrap resamples of the sentences for each 95 % interval."""
    translation: TranslationConfig = TranslationConfig()


@dataclass(frozen=True)
class ExportConfig:
    """A checkpoint as a Hugging Face folder."""

    __pydantic_config__ = _STRICT

    to: Output[Annotated[str | None, REMOTE]] = None
    """Folder to write; unset: `export` in the run's folder."""
    dtype: Output[Literal["original", "float32", "bfloat16", "float16"]] = "original"
    """Type of the written weights; original: that of the model training began from."""
    adapter: Output[bool] = False
    """Write the adapters of a run with `--lora.rank` alone, as a folder that PEFT loads over its base model."""
    shard_gb: Output[_Positive] = 5.0
    """Largest safetensors file, in GB (1e9 bytes)."""


@dataclass(frozen=True)
class PlanConfig:
    """The compiled step of stage 1 on machines that need not be there: docs/plan.md."""

    __pydantic_config__ = _STRICT

    shapes: Output[str | None] = None
    """Folder with the config.json of the model planned for where `model` is unset; no weights are read."""
    search: Output[bool] = False
    """Also try other meshes, micro-batches, remat policies and moment types, and name the fastest that fits."""
    compilations: Output[_Count] = 12
    """Most compilations of a search; each takes from seconds to minutes."""


@dataclass(frozen=True)
class HostsConfig:
    """The processes of a run, for where JAX does not find them as on TPU pods, GKE and SLURM: docs/multihost.md."""

    __pydantic_config__ = _STRICT

    coordinator: Work[str | None] = None
    """HOST:PORT of process 0, a free port that all processes reach."""
    count: Work[_Count | None] = None
    """Number of processes; each has the same number of devices."""
    index: Work[_Size | None] = None
    """Number of this process, from 0."""


@dataclass(frozen=True)
class Config:
    """AlignX: align the languages of a decoder LLM in its middle layers (stage 1), fine-tune (stage 2), export it."""

    __pydantic_config__ = _STRICT

    stage: Work[Stage] = "1"
    """Part of the pipeline to run; `all`: prepare, 1, 2, evaluate and export, and a control run to compare with."""
    mesh: Work[str] = "1x1"
    """Devices as data (FSDP) x model (tensor), or replicas x data x model."""
    topology: Work[str | None] = None
    """Machine that `plan` compiles for: a TPU slice such as v5e:2x4, v5p:4x4x8 or v6e:2x4; `cpu`, this host; or GPUs on
    paper, such as h100:8."""
    run: Place[Annotated[_Path, REMOTE]] = "runs/default"
    """Folder of this run; each stage writes its own folder inside."""
    model: Contents[Annotated[str | None, REMOTE]] = None
    """Model to start from: a Hugging Face folder, a stage's folder of a run, or `sample`. Unset: stage 2 starts from
    stage 1 of this run, evaluate takes all stages of the run, export its last; the model in a file of --config is not
    for these three."""
    compare: Measure[Annotated[tuple[str, ...], REMOTE]] = ()
    """Models that evaluate compares `model` with (the first is the baseline), or puts beside the stages of the run."""
    accept_changes: Work[bool] = False
    """Continue a stage with settings or data other than it was begun with; the former settings are kept beside."""
    on_nonfinite: Work[Literal["stop", "skip"]] = "stop"
    """A step whose loss or gradient is not finite stops the run and is written down, or is left out and counted."""
    profile: Work[str | None] = None
    """Steps of training to trace with JAX's profiler, such as 10 or 10-12; see the folder `profile` of the stage."""
    seed: Result[_Size] = 0
    """Seed of the data order, the pair classifier's initial weights, sampling and the bootstrap."""
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: ExportConfig = ExportConfig()
    plan: PlanConfig = PlanConfig()
    hosts: HostsConfig = HostsConfig()
