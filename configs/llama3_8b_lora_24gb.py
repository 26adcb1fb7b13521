"""Llama 3 8B by low-rank adapters on one card of 24 GB: both stages, base weights frozen in bfloat16.

    python run.py --config=configs/llama3_8b_lora_24gb.py --stage=1 --model=path/to/Meta-Llama-3-8B
    python run.py --stage=plan --config=configs/llama3_8b_lora_24gb.py --topology=rtx4090:1

The frozen weights take 15.0 GiB, and adapters of rank 16 with their moments 0.5. The compiler for an RTX 4090 counts
18.0 GiB of 22.4 for 32 rows of 512 tokens in four micro-batches (docs/lora.md). It has not been run. The learning rate
is one that adapters are often trained with, 50 times the published one of all weights; it has not been tuned. What to
expect otherwise, which data to provide and what is published: as in llama2_7b_opus100.py.
"""

from alignx_jax.config import Config, DataConfig, LoraConfig, OptimizerConfig, PlanConfig, TrainingConfig

config = Config(
    run="runs/llama3_8b_lora_24gb",
    data=DataConfig(parallel=("data/opus100",), instructions=("data/bactrian_x",)),
    optimizer=OptimizerConfig(learning_rate=1e-4),
    lora=LoraConfig(rank=16),
    training=TrainingConfig(rows=32, accumulation=4),
    plan=PlanConfig(shapes="configs/shapes/llama3_8b"),
)
