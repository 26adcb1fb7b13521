"""Llama 2 7B: stage 1 on OPUS-100, stage 2 on Bactrian-X, as AlignX was published but for the defaults of ours.

    python run.py --config=configs/llama2_7b_opus100.py --stage=1 --model=path/to/Llama-2-7b-hf
    python run.py --config=configs/llama2_7b_opus100.py --stage=2
    python run.py --config=configs/llama2_7b_opus100.py --stage=evaluate --evaluation.sentences=flores200:devtest

Machine: one host with 8 accelerators of 80 GB. Weights, gradients and both moments are float32, 16 bytes a parameter:
13.5 GB a device before activations. It has not been run at this size. Expect what the sample shows in small: falling
contrastive and matching losses in validation, and retrieval that rises at the aligned layer.

Published, and defaults of ours: learning rate 2e-6, 2 epochs, cutoff 512, tau, both lambdas. Ours alone: standardized
states, sentences by themselves, the layer; --config=configs/published.py has the published ones.
Published as 128 examples a step, here as rows: 32 rows of 512 tokens hold about 128 examples of 125 tokens, prompt
included. `--stage=prepare` shows how many examples and steps your text gives.

Our choice: English with ar, de, es, fr, hi, ru, tr, vi and zh, and half translations in stage 2. You provide OPUS-100
in data/opus100, as Moses pairs (opus.de-en-train.de, opus.de-en-train.en) or TSV (de-en.train.tsv: a German and an
English column), and Bactrian-X in data/bactrian_x (de.json).
"""

from alignx_jax.config import Config, DataConfig, PlanConfig

config = Config(
    run="runs/llama2_7b_opus100",
    mesh="8x1",
    data=DataConfig(parallel=("data/opus100",), instructions=("data/bactrian_x",)),
    plan=PlanConfig(shapes="configs/shapes/llama2_7b"),
)
