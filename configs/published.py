"""AlignX exactly as published, as far as a flag asks for it (docs/method.md has the table): a base for your own model.

    python run.py --config=configs/published.py --stage=1 --model=path/to/Llama-2-7b-hf --data.parallel data/opus100

Machine: one accelerator of 80 GB with --optimizer.kind=adafactor, or --mesh=8x1 on eight of them. The published losses
do next to nothing on Gemma 3 270M (dev/decisions.md); this is what to compare with.

The aligned layer is 16, half of 32: for a model of another depth give --objective.contrastive.layer. A device's
micro-batch of 4 rows of 512 tokens holds about the published 16 examples of 125 tokens; 8 of them are a step.
"""

from alignx_jax.config import Config, ContrastiveConfig, DataConfig, ObjectiveConfig, PlanConfig, TrainingConfig

config = Config(
    run="runs/published",
    data=DataConfig(
        parallel=("data/opus100",), instructions=("data/bactrian_x",), overlong="truncate", spans="in-prompt"
    ),
    objective=ObjectiveConfig(
        contrastive=ContrastiveConfig(layer=16), standardize="none", negatives="micro-batch", duplicates="keep"
    ),
    training=TrainingConfig(rows=32, accumulation=8),
    plan=PlanConfig(shapes="configs/shapes/llama2_7b"),
)
