"""Llama 3 8B: stage 1 on OPUS-100, stage 2 on Bactrian-X, as AlignX was published but for the defaults of ours.

    python run.py --config=configs/llama3_8b_opus100.py --stage=1 --model=path/to/Meta-Llama-3-8B
    python run.py --config=configs/llama3_8b_opus100.py --stage=2
    python run.py --config=configs/llama3_8b_opus100.py --stage=evaluate --evaluation.sentences=flores200:devtest

Machine: one host with 8 accelerators of 80 GB; weights, gradients and both moments are 16.1 GB a device before
activations. It has not been run at this size. What to expect, which data to provide and what is published: as in
llama2_7b_opus100.py. Llama 3 needs fewer tokens for a sentence, so 24 rows hold about 128 examples of 95 tokens.
"""

from alignx_jax.config import Config, DataConfig, PlanConfig, TrainingConfig

config = Config(
    run="runs/llama3_8b_opus100",
    mesh="8x1",
    data=DataConfig(parallel=("data/opus100",), instructions=("data/bactrian_x",)),
    training=TrainingConfig(rows=24),
    plan=PlanConfig(shapes="configs/shapes/llama3_8b"),
)
