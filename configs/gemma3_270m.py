"""Gemma 3 270M, a real pre-trained LLM of many languages, on a laptop of 8 GB or any GPU: both stages and evaluation.

    python -m benchmarks.real.models --to models
    python run.py --config=configs/gemma3_270m.py --stage=1 --model=models/gemma3-270m
    python run.py --config=configs/gemma3_270m.py --stage=2
    python run.py --config=configs/gemma3_270m.py --stage=evaluate

Machine: a laptop with 8 GB of memory, or any GPU with 8 GB. All parameters are trained: weights, gradients and both
moments are float32 and take 4.3 GB. Every layer is computed again in the backward pass. The vocabulary has 262,144
tokens, so the logits of only 24 positions of each row exist at a time.

Expect three things of stage 1: the contrastive loss falls well below its first value; translations that it was not
trained on find each other more often, above all in languages the model is weak in; the next-token loss falls, too. The
evaluation compares the base model with both stages.

Our choice: learning rate, steps, rows and cutoff, and sentences that are pooled by themselves (`spans="separate"`), not
inside the prompt. The rest are defaults.

You provide parallel text in data/pairs (sw-en.train.jsonl) and instructions in data/instructions (sw.train.jsonl);
docs/data.md has the formats. 150 pairs of each language with English are enough for 30 steps. The evaluation reads
FLORES-200 from the network, or where docs/data.md says. The model is under Gemma's terms, which are in its folder.
"""

from alignx_jax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    TrainingConfig,
    TranslationConfig,
)

config = Config(
    run="runs/gemma3_270m",
    data=DataConfig(
        parallel=("data/pairs",),
        instructions=("data/instructions",),
        cutoff=384,
        row_length=512,
        validation=100,
    ),
    optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=3),
    training=TrainingConfig(
        rows=8, steps=30, compute_dtype="bfloat16", remat="block", validate_every=10, save_every=30, keep=1
    ),
    evaluation=EvaluationConfig(
        sentences="flores200:devtest",
        languages=("de", "fr", "zh", "ru", "ar", "vi", "th", "hi", "sw", "fi", "tr"),
        limit=100,
        rows=8,
        translation=TranslationConfig(directions=("sw-en", "en-sw", "fi-en", "en-fi"), limit=48, max_tokens=96, rows=8),
    ),
)
