"""The losses for other trainers: against the published arrays, dense NumPy in float64, and themselves on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from alignx_jax import losses, sharding
from tests.objectives.test_objectives import CASES, dense_contrastive, dense_matching, published, x64  # noqa: F401


@pytest.mark.parametrize("case", CASES)
def test_published_losses(shared, x64, case):  # noqa: F811
    inputs, expected, classifier = published(shared, case)
    index, languages = inputs["src_tgt_index"], np.stack([inputs["src_lang"], inputs["tgt_lang"]], axis=1)
    states = jnp.asarray(expected["hidden_states"])
    ctr = losses.contrastive(states[CASES[case]], index == 1, index == 2, standardize="none")
    lam = losses.language_matching(states[-1], index == 1, index == 2, languages, classifier, standardize="none")
    np.testing.assert_allclose(ctr, expected["contrastive_loss"], rtol=1e-10)
    np.testing.assert_allclose(lam, expected["language_matching_loss"], rtol=1e-10)


@pytest.fixture
def padded():
    """8 rows of 10 tokens. Row 3 has no source, row 5 no target; row 6 has the source of row 0."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(8, 10, 5))
    source, target = np.zeros((2, 8, 10), bool)
    for row, (first, second, end) in enumerate(rng.integers([1, 4, 6], [4, 6, 10], size=(8, 3))):
        source[row, first:second], target[row, second:end] = True, True
    source[3] = target[5] = False
    sentence = np.arange(16).reshape(8, 2)
    sentence[6, 0] = sentence[0, 0]
    classifier = losses.Classifier(*(rng.normal(size=shape) for shape in ((10, 6), (10, 6), (6, 2))))
    return hidden, source, target, sentence, rng.integers(3, size=(8, 2)), classifier


def means(hidden, span, shift=0):
    return np.stack([hidden[row, np.nonzero(span[row])[0] - shift].mean(axis=0) for row in (0, 1, 2, 4, 6, 7)])


def standardized(x_NxD, standardize):
    return x_NxD if standardize == "none" else (x_NxD - x_NxD.mean(axis=0)) / x_NxD.std(axis=0)


@pytest.mark.parametrize("standardize", ["batch", "none"])
@pytest.mark.parametrize("form", ["published", "symmetric"])
@pytest.mark.parametrize("known", [True, False])
def test_contrastive_is_the_dense_formula(x64, padded, form, known, standardize):  # noqa: F811
    hidden, source, target, sentence, _, _ = padded
    a, c = np.split(standardized(np.concatenate([means(hidden, source), means(hidden, target)]), standardize), 2)
    negative = np.ones((6, 6), bool)
    if known:
        negative[0, 4] = negative[4, 0] = False
    dense = dense_contrastive(a, c, 0.2, negative)
    dense += dense_contrastive(c, a, 0.2, negative) if form == "symmetric" else 0
    ids = sentence if known else None
    options = {"sentence_Bx2": ids, "temperature": 0.2, "form": form, "standardize": standardize}
    loss = losses.contrastive(jnp.asarray(hidden), source, target, **options)
    np.testing.assert_allclose(loss, dense / 6, rtol=1e-12)


@pytest.mark.parametrize("standardize", ["batch", "none"])
def test_language_matching_is_the_dense_formula(x64, padded, standardize):  # noqa: F811
    hidden, source, target, _, language, classifier = padded
    e = standardized(np.concatenate([means(hidden, source, 1), means(hidden, target, 1)]), standardize)
    kept = language[[0, 1, 2, 4, 6, 7]]
    dense = dense_matching(e, np.concatenate([kept[:, 0], kept[:, 1]]), classifier)
    states = jnp.asarray(hidden), source, target, language, classifier
    loss = losses.language_matching(*states, standardize=standardize)
    np.testing.assert_allclose(loss, dense / 12**2, rtol=1e-12)


@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_any_mesh_gives_the_same_losses_and_gradients(x64, padded, axis):  # noqa: F811
    hidden, source, target, sentence, language, classifier = padded

    def total(hidden):
        matched = losses.language_matching(hidden, source, target, language, classifier)
        return losses.contrastive(hidden, source, target, sentence_Bx2=sentence) + matched

    alone = jax.value_and_grad(total)(jnp.asarray(hidden))
    mesh = jax.make_mesh((8,), (axis,), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, jax.P(axis))
        on_mesh = jax.jit(jax.value_and_grad(total))(jax.device_put(hidden, rows))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-15), alone, on_mesh)


@pytest.mark.parametrize(
    ("shape", "axes", "compiled"),
    [
        ((4,), ("data",), True),
        ((2, 2), ("data", "model"), True),
        ((2, 2), ("x", "y"), True),
        ((2, 1), ("data", "model"), False),
    ],
)
def test_explicit_axes_give_the_same_losses_and_gradients(x64, padded, shape, axes, compiled):  # noqa: F811
    hidden, source, target, sentence, language, classifier = padded
    hidden = np.concatenate([hidden, hidden[:, :, :1]], axis=2)  # 6 features: two devices share them
    classifier = losses.Classifier(*(np.pad(kernel, ((0, 2), (0, 0))) for kernel in classifier[:2]), classifier[2])

    def total(hidden, classifier, source, target):
        matched = losses.language_matching(hidden, source, target, language, classifier)
        return losses.contrastive(hidden, source, target, sentence_Bx2=sentence) + matched

    both = jax.value_and_grad(total, argnums=(0, 1))
    alone = jax.jit(both)(hidden, classifier, source, target)
    mesh = jax.make_mesh(shape, axes, devices=jax.devices()[: np.prod(shape)])  # as JAX makes it: Explicit
    spec = jax.P(axes[0], None, *axes[1:])  # rows over the first, features over the second
    with jax.set_mesh(mesh):
        placed = jax.device_put(hidden, jax.NamedSharding(mesh, spec)), jax.tree.map(jnp.asarray, classifier)
        masks = (jax.device_put(mask, jax.NamedSharding(mesh, jax.P(axes[0]))) for mask in (source, target))
        on_mesh = (jax.jit(both) if compiled else both)(*placed, *masks)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-13), alone, on_mesh)


def test_no_pair_costs_nothing(padded):
    hidden, source, target, _, language, classifier = padded
    nothing = np.zeros_like(source)
    hidden = jnp.asarray(hidden, jnp.bfloat16)

    def total(hidden):
        matched = losses.language_matching(hidden, source, nothing, language, classifier)
        return losses.contrastive(hidden, nothing, target) + matched

    value, gradient = jax.value_and_grad(total)(hidden)
    assert value == 0 and value.dtype == jnp.float32 and not gradient.any()


def test_rows_that_do_not_divide_over_the_mesh_are_refused(padded):
    hidden, source, target, *_ = padded
    with jax.set_mesh(sharding.make_mesh("8x1")), pytest.raises(ValueError, match="7 rows do not divide over the 8"):
        losses.contrastive(jnp.asarray(hidden)[:7], source[:7], target[:7])
