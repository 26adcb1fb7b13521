"""`--stage=export`: a stage's best checkpoint as a Hugging Face folder, or its adapters as one of PEFT."""

from __future__ import annotations

import jax.numpy as jnp

from alignx_jax import storage
from alignx_jax.exits import UserError
from alignx_jax.runs import lineage
from alignx_jax.stages import card
from alignx_jax.stages.session import Session


def export(session: Session) -> None:
    """The best checkpoint of the run's last stage as a Hugging Face folder, or its adapters as one of PEFT."""
    options = session.config.export
    path = session.config.model
    if not path:
        there = [str(session.run / name) for name in ("stage2", "stage1") if (session.run / name).is_dir()]
        if not there:
            raise UserError(f"{session.run} has no stage to export; run one, or give --model")
        path = there[0]
    source = session.source(path)
    folder = storage.path(options.to) if options.to else session.run / "export"
    session.console.rule("export", align="left")
    session.show_source(source)
    source.check()

    def others() -> dict[str, bytes]:
        texts = {lineage.FILE: card.lineage_text(source)}
        if source.run:
            texts["README.md"] = card.text(source, session.command, adapter=options.adapter)
        return {name: text.encode() for name, text in texts.items()}

    session.console.doing("exporting the weights")
    if options.adapter:
        source.export_adapters(session.mesh, folder, card.base_name(source), others())
        loads = f"peft.PeftModel.from_pretrained(base_model, {str(folder)!r})"
    else:
        half = options.dtype == "original" and source.dtype() == jnp.bfloat16  # rounded once in either case
        decoder = source.load(session.mesh, jnp.bfloat16 if half else jnp.float32)
        # The card after the weights: it is of the step that was read.
        source.export(decoder, folder, options.dtype, options.shard_gb * 1e9, others())
        loads = f"transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    session.line("results", f"{folder}: {loads} loads it")
