"""SmolLM2-135M-Instruct, a real Llama of English, on a laptop of 8 GB or any GPU: both stages and evaluation.

    python -m benchmarks.real.models --to models
    python run.py --config=configs/smollm2_135m.py --stage=1 --model=models/smollm2-135m
    python run.py --config=configs/smollm2_135m.py --stage=2
    python run.py --config=configs/smollm2_135m.py --stage=evaluate

Machine: as for gemma3_270m.py, with half of the memory: weights, gradients and both moments take 2.2 GB. The vocabulary
has 49,152 tokens.

Expect less than of Gemma. This model has seen next to nothing but English: a sentence of another language is cut into
many tokens, and its vectors say little of what it means. The next-token loss falls; retrieval begins near chance.

Which data to provide, and what is our choice: as in gemma3_270m.py. Against Gemma, a sentence of FLORES-200 has 1.3 to
2.7 times as many tokens in Latin script, 2 to 7 times in others; `--stage=prepare` counts what is beyond the cutoff.
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
    run="runs/smollm2_135m",
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
