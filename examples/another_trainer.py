"""The two losses of AlignX in a trainer of another project: its own Flax model, padded batches and optimizer."""

import numpy as np
import optax
from flax import nnx

import alignx_jax
from alignx_jax import losses


class TheirModel(nnx.Module):  # recurrent layers over bytes; it gives logits [B,T,256] and L+1 states [B,T,D]
    def __init__(self, size: int, depth: int, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(256, size, rngs=rngs)
        self.layers = nnx.List([nnx.RNN(nnx.GRUCell(size, size, rngs=rngs)) for _ in range(depth)])
        self.pair_classifier = alignx_jax.PairClassifier(size, 128, rngs=rngs)  # trained beside it, then thrown away

    def __call__(self, bytes_BxT):
        states = [self.embed(bytes_BxT)]
        for layer in self.layers:
            states.append(states[-1] + layer(states[-1]))
        return self.embed.attend(states[-1]), states


@nnx.jit
def train_step(model: TheirModel, optimizer: nnx.Optimizer, text, source, target, language):
    def total(model: TheirModel):
        logits, states = model(text)
        token_losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], text[:, 1:])
        next_token = token_losses.mean(where=text[:, 1:] != 0)
        aligned = losses.contrastive(states[len(states) // 2], source, target)
        matched = losses.language_matching(states[-1], source, target, language, model.pair_classifier.weights())
        return next_token + 0.3 * aligned + 0.4 * matched, (next_token, aligned, matched)

    (_, parts), gradients = nnx.value_and_grad(total, has_aux=True)(model)
    optimizer.update(model, gradients)
    return parts


def padded(pairs: list[tuple[bytes, bytes]], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A newline, the source, a newline, the target, zeros; and where the two sentences are. Theirs has a loader."""
    text, source, target = np.zeros((3, len(pairs), length), np.int32)
    for row, (first, second) in enumerate(pairs):
        text[row, : len(first) + len(second) + 2] = list(b"\n" + first + b"\n" + second)
        source[row, 1 : len(first) + 1] = 1
        target[row, len(first) + 2 : len(first) + len(second) + 2] = 1
    return text, source, target
