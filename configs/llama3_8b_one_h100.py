"""Llama 3 8B, all parameters, on one GPU of 80 GB: stage 1 with Adafactor.

    python run.py --config=configs/llama3_8b_one_h100.py --stage=1 --model=path/to/Meta-Llama-3-8B
    python run.py --stage=plan --config=configs/llama3_8b_one_h100.py --topology=h100:1

Weights and gradients are float32 and take 2 x 29.9 GiB; Adafactor's state is a few MB, where AdamW's would be 44.9 GiB
with a bfloat16 first moment, 59.8 without. The compiler for an H100 counts 66.6 of its 74.5 GiB for 24 rows of 512
tokens (docs/gpu.md). It has not been run. What to expect otherwise, which data to provide and what is published: as in
llama2_7b_opus100.py.
"""

from alignx_jax.config import Config, DataConfig, OptimizerConfig, PlanConfig, TrainingConfig

config = Config(
    run="runs/llama3_8b_one_h100",
    data=DataConfig(parallel=("data/opus100",), instructions=("data/bactrian_x",)),
    optimizer=OptimizerConfig(kind="adafactor"),
    training=TrainingConfig(rows=24),
    plan=PlanConfig(shapes="configs/shapes/llama3_8b"),
)
