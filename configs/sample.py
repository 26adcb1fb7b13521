"""The embedded sample: ten languages, a tiny Llama. The default of run.py.

    python run.py --stage=1 --mesh=8x1       stage 1 alone
    python run.py --stage=all --mesh=8x1     the whole demonstration

Expect bitext retrieval at the aligned layer well above both the base model and the control run without the two losses.
The learning rate is that of a model of 2 M parameters, not the published one; prompt, batch and length are scaled down.
"""

from alignx_jax.config import Config, DataConfig, EvaluationConfig, OptimizerConfig, TrainingConfig, TranslationConfig

config = Config(
    run="runs/sample",
    model="sample",
    data=DataConfig(
        parallel=("sample",),
        instructions=("sample",),
        template="sample",
        cutoff=128,
        row_length=256,
        limit=5000,
        validation=100,
        instruction_weights=(4.0,),
    ),
    optimizer=OptimizerConfig(learning_rate=6e-3, warmup_steps=10),
    training=TrainingConfig(
        rows=16, epochs=1.0, compute_dtype="float32", remat="attention", validate_every=50, save_every=50
    ),
    evaluation=EvaluationConfig(sentences="sample", translation=TranslationConfig(limit=20, max_tokens=48)),
)
