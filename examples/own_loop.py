"""A training loop of your own around the step of alignx_jax: data, model, steps, Hugging Face folder."""

import jax
from flax import nnx

import alignx_jax


def train(config: alignx_jax.Config, to: str) -> list[dict[str, float]]:
    """Stage 1 of `config`, without checkpoints or validation; gives every step's metrics."""
    alignx_jax.prepare_devices(config.mesh)  # before JAX is used: a CPU host simulates them
    mesh, source = alignx_jax.make_mesh(config.mesh), alignx_jax.find(config.model)
    rows = jax.NamedSharding(mesh, jax.P(mesh.axis_names[:-1]))  # over all axes but the model's
    history = []
    with jax.set_mesh(mesh):
        decoder, tokenizer = source.load(mesh), alignx_jax.load_tokenizer(source.huggingface)
        data = alignx_jax.build_data(config, "1", tokenizer)
        config, _ = alignx_jax.with_layer(config, decoder, tokenizer, data, mesh)
        recipe, steps = alignx_jax.recipe(config, decoder.config, data, mesh), data.train.steps
        step = alignx_jax.build_step(config, recipe, decoder.config, mesh)
        state = step.begin(decoder)
        for batch in data.train.batches():
            state, metrics = step.train_step(state, jax.device_put(batch, rows), steps)
            history.append({name: float(value) for name, value in metrics.items()})
        source.export(nnx.merge(step.graph, state.params).decoder, to)
    return history


if __name__ == "__main__":
    for step, metrics in enumerate(train(alignx_jax.load_config("configs/sample.py"), "trained"), start=1):
        print(step, " ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
