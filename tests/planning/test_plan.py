"""Plans: the step that trains, what it has to be like on a simulated mesh, on a v5e where libtpu is installed."""

import dataclasses
import importlib.util
import io
import json
import math
import pathlib
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import run
from alignx_jax import command_line, sharding
from alignx_jax import config_files as configs
from alignx_jax.config import (
    Config,
    ContrastiveConfig,
    DataConfig,
    LanguageMatchingConfig,
    LoraConfig,
    ObjectiveConfig,
    PlanConfig,
    TrainingConfig,
)
from alignx_jax.data import packing
from alignx_jax.exits import UserError
from alignx_jax.models import lora as adapters
from alignx_jax.models.architecture import DecoderConfig
from alignx_jax.models.rope import Rope
from alignx_jax.planning import chips, hlo, hlo_cost, machines, plan, table
from alignx_jax.runs import loading
from alignx_jax.training import optimizer, state

ROOT = pathlib.Path(__file__).resolve().parents[2]
LENGTH, ROWS = 128, 8
DECODER = DecoderConfig(
    family="llama",
    vocab_size=250,
    hidden_size=64,
    intermediate_size=160,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    norm_epsilon=1e-5,
    rope=Rope(),
    tie_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
    activation="silu",
    initializer_range=0.02,
    max_positions=LENGTH,
)
CPU = machines.Machine("cpu", None, None)
CHUNK = 32
BOTH = ObjectiveConfig(chunk=CHUNK)
NEXT_TOKEN = ObjectiveConfig(ContrastiveConfig(weight=0.0), LanguageMatchingConfig(weight=0.0), chunk=CHUNK)


def settings(mesh: str = "8x1", objective: ObjectiveConfig = BOTH, **training) -> Config:
    base = Config(stage="plan", mesh=mesh, topology="cpu", objective=objective)
    data = DataConfig(cutoff=LENGTH, row_length=LENGTH, examples_per_row=2)
    return dataclasses.replace(base, data=data, training=dataclasses.replace(base.training, rows=ROWS, **training))


@pytest.fixture(scope="module")
def compiled():
    """The step on eight devices: the executable, its module, and its plan."""
    mesh = sharding.make_mesh("8x1")
    program, state_bytes, _ = plan.compile_step(settings(), DECODER, mesh)
    return program, hlo.Module(program.as_text()), state_bytes


def layer_weights() -> float:
    d = DECODER
    heads = (2 * d.num_heads + 2 * d.num_kv_heads) * d.head_dim
    return d.hidden_size * heads + 3 * d.hidden_size * d.intermediate_size


def test_model_flops_are_six_for_each_weight_and_token_and_attention():
    _, params = loading.abstract_decoder(dataclasses.replace(DECODER, vocab_size=256))
    products = [x for path, x in jax.tree_util.tree_leaves_with_path(params) if path[0].key != "embedding"]
    weights = sum(x.size for x in products if x.ndim > 2 or x.shape == (256, 64))  # norms multiply no matrix
    # Forward: logits and values, T x T x h each for every head; backward twice that.
    attention = 3 * 2 * (2 * LENGTH**2 * DECODER.head_dim) * DECODER.num_heads * DECODER.num_layers
    padded = dataclasses.replace(DECODER, vocab_size=256)
    for causal, share in ((False, 1), (True, 0.5)):
        found = chips.model_flops(padded, ROWS, LENGTH, causal=causal)
        assert found == ROWS * LENGTH * 6 * weights + ROWS * attention * share


@pytest.mark.parametrize(("remat", "again"), [("none", 0), ("block", 1)])
def test_a_step_of_adapters_computes_no_gradient_of_what_is_frozen(remat, again):
    """A count by hand: forward and the gradient of the input for each frozen weight, all three for A and B."""
    lora = LoraConfig(rank=8)
    config = dataclasses.replace(settings("1x1", NEXT_TOKEN, remat=remat), lora=lora)
    found = plan.measure(config, DECODER, CPU)
    d, tokens, count = DECODER, ROWS * LENGTH, adapters.count(lora, DECODER) / DECODER.num_layers
    last = d.intermediate_size * d.hidden_size + 8 * d.hidden_size  # of down; what the backward pass needs not again
    layers = 4 * layer_weights() + 6 * count + again * 2 * (layer_weights() + count - last)
    head = 4 * tokens * d.padded_vocab_size * d.hidden_size
    attention = (6 + 1 + again) * d.num_layers * ROWS * 2 * LENGTH**2 * d.head_dim * d.num_heads
    assert found.compiled_flops == d.num_layers * tokens * layers + head + attention
    model = tokens * (4 * (d.num_layers * layer_weights() + d.vocab_size * d.hidden_size) + 6 * count * d.num_layers)
    assert found.model_flops == model + ROWS * 12 * d.num_layers * LENGTH**2 / 2 * d.head_dim * d.num_heads
    assert found.aliased_bytes == found.state_bytes, "updated in place"
    _, params = loading.abstract_decoder(DECODER)
    frozen = sum(x.size for x in jax.tree.leaves(params))
    assert found.state_bytes == 2 * frozen + 3 * 4 * count * d.num_layers + 3 * 4, "bfloat16; float32 and two moments"


def test_model_flops_of_a_window_are_of_the_tokens_within_it():
    config = dataclasses.replace(DECODER, window=48, local_layers=(True, True, False) * 2)
    for causal in (False, True):
        pairs = [sum(min(t + 1 if causal else LENGTH, w) for t in range(LENGTH)) for w in (48, 48, LENGTH)]
        if causal:  # the diagonal is counted half, as in T^2 / 2
            pairs = [n - w / 2 for n, w in zip(pairs, (48, 48, LENGTH), strict=True)]
        attention = 12 * DECODER.head_dim * DECODER.num_heads * 2 * sum(pairs)
        weights = 6 * ROWS * LENGTH * (DECODER.num_layers * layer_weights() + DECODER.vocab_size * DECODER.hidden_size)
        assert chips.model_flops(config, ROWS, LENGTH, causal=causal) == weights + ROWS * attention


@pytest.mark.parametrize(("remat", "again"), [("none", 0), ("block", 1)])
def test_compiled_flops_of_the_next_token_step_are_a_count_by_hand(remat, again):
    found = plan.measure(settings("1x1", NEXT_TOKEN, remat=remat), DECODER, CPU)
    d, tokens = DECODER, ROWS * LENGTH
    down = d.hidden_size * d.intermediate_size  # its product is no part of what the backward pass needs again
    layers = d.num_layers * tokens * (6 * layer_weights() + again * 2 * (layer_weights() - down))
    head = 6 * tokens * d.padded_vocab_size * d.hidden_size
    # Two products forward and four backward; the logits are always formed again, by a layer's remat the output too.
    products = 6 + 1 + again
    attention = products * d.num_layers * ROWS * 2 * LENGTH**2 * d.head_dim * d.num_heads
    assert found.compiled_flops == layers + head + attention


def test_the_step_that_is_planned_runs_as_it_is(compiled):
    """On a real state and a placed batch: their shapes, types and shardings are those planned for."""
    program, _, state_bytes = compiled
    config, mesh, rng = settings(), sharding.make_mesh("8x1"), np.random.default_rng(0)
    example = packing.assemble([], LENGTH, config.data.examples_per_row)
    batch = jax.tree.map(lambda x: np.stack([rng.integers(0, 2, x.shape).astype(x.dtype)] * ROWS), example)
    model = state.build(loading.random_decoder(DECODER), config.objective.language_matching.width, seed=0)
    now = state.create(state.split(model)[1], optimizer.build(config.optimizer, 1), mesh)
    assert sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(now)) == state_bytes
    placed, last = jax.tree.map(lambda x: sharding.place_rows(x, mesh), batch), jnp.int32(1)
    after, metrics = program(now, placed, jax.device_put(last, now.step.sharding))
    assert all(x.is_deleted() for x in jax.tree.leaves(now)), "donated"
    assert after.step == 1 and metrics["tokens"] == batch.loss_weights[:, 1:].sum()
    assert metrics["next_token"] == pytest.approx(np.log(DECODER.vocab_size), rel=0.02), "of a random model"


def test_the_state_is_updated_in_place(compiled):
    program, _, state_bytes = compiled
    assert program.memory_analysis().alias_size_in_bytes == state_bytes


def whole(module: hlo.Module) -> set[tuple[int, ...]]:
    """Shapes of all arrays of a program, without dimensions of 1."""
    arrays = (a for computation in module.computations.values() for one in computation.values() for a in one.arrays)
    return {tuple(d for d in a.dims if d > 1) for a in arrays}


def test_weights_are_gathered_one_layer_at_a_time(compiled):
    _, module, _ = compiled
    _, params = loading.abstract_decoder(DECODER)
    there = whole(module)
    for name, like in params["layers"].items():
        if like.ndim > 2:
            assert like.shape not in there, f"{name} of all layers on one device"
            assert like.shape[1:] in there, f"{name} of one layer, as it is gathered"
    gathers = [c for c in hlo_cost.cost(module).collectives if c.kind == "all-gather" and "dot_general" in c.operation]
    in_layers = sum(c.times * c.operand_bytes * c.group for c in gathers if c.times == DECODER.num_layers)
    # Forward and once more backward, in the compute type or, as a CPU has it, in float32.
    assert in_layers in {passes * DECODER.num_layers * layer_weights() * size for passes in (2, 3) for size in (2, 4)}


def test_no_logits_of_all_tokens_exist(compiled):
    """In any type: the vocabulary, or a device's part of it, meets the tokens of one chunk of each row."""
    _, module, _ = compiled
    vocabulary = {DECODER.padded_vocab_size, DECODER.padded_vocab_size // 8}
    of_logits = [dims for dims in whole(module) if len(dims) == 2 and set(dims) & vocabulary]
    assert (DECODER.padded_vocab_size // 8, ROWS * CHUNK) in of_logits
    assert max(map(math.prod, of_logits)) <= DECODER.padded_vocab_size * ROWS * CHUNK < LENGTH * ROWS * 256 / 2


def test_no_copy_of_the_stacked_weights_is_made(compiled):
    """Outside the loops nothing is made of a stack alone, whole or in part, that is larger than a layer.

    The update takes a stack with its gradient and moments, and writes in place.
    """
    _, module, _ = compiled
    _, params = loading.abstract_decoder(DECODER)
    sizes = {x.size // 8 for x in params["layers"].values() if x.ndim > 2}  # of a device
    entry = module.computations[module.entry]
    stacks = {i.name for i in entry.values() if i.opcode == "parameter" and math.prod(i.arrays[0].dims) in sizes}
    assert len(stacks) == 3 * 7, "weights and moments"
    for one in entry.values():
        large = [name for name in one.operands if entry[name].arrays and math.prod(entry[name].arrays[0].dims) > 1]
        if len(large) == 1 and large[0] in stacks and one.opcode != "bitcast":
            of = entry[large[0]].arrays[0].dims
            assert math.prod(one.arrays[0].dims) <= math.prod(of[1:]), f"{one.name} is made of {large[0]}"


def test_the_program_does_not_grow_with_depth(compiled):
    deeper = dataclasses.replace(DECODER, num_layers=4 * DECODER.num_layers)
    program, _, _ = plan.compile_step(settings(), deeper, sharding.make_mesh("8x1"))
    size = sum(map(len, hlo.Module(program.as_text()).computations.values()))
    assert size == pytest.approx(sum(map(len, compiled[1].computations.values())), rel=0.02)


@pytest.mark.parametrize(
    ("topology", "mesh", "says"),
    [
        (None, "8x1", "--topology is not set"),
        ("v9:2x2", "4x1", "--topology=v9:2x2: no such machine; give one of v5e:..., v5p:..., v6e:..., h100:..."),
        ("h100:8", "4x1", "--topology=h100:8: --mesh=4x1 is a mesh of 4; give h100:4"),
        ("v5e:2x4", "oops", "--mesh=oops"),
    ],
)
def test_a_machine_that_cannot_be(topology, mesh, says):
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        machines.find(dataclasses.replace(settings(mesh), topology=topology))
    assert str(error.value).startswith(says)


def test_without_libtpu_the_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'libtpu package; install it with: pip install "jax\[tpu\]"$'):
        machines.find(dataclasses.replace(settings(), topology="v5e:2x4"))


def test_a_mesh_has_to_be_of_all_chips():
    slice_of_8 = machines.Machine("v5e:2x4", tuple(jax.devices()), None)
    with pytest.raises(UserError, match=r"--mesh=4x1 is a mesh of 4 chips, but --topology=v5e:2x4 has 8; .* 8x1"):
        slice_of_8.mesh("4x1")
    assert slice_of_8.mesh("4x2").shape == {"data": 4, "model": 2}


def a_plan(config: Config, fits: bool, seconds: float = 1.0) -> plan.Plan:
    refusal = None if fits else "RESOURCE_EXHAUSTED"
    training = config.training
    chosen = {"mesh": config.mesh, "accumulation": training.accumulation, "remat": training.remat}
    chosen |= {"optimizer": config.optimizer.kind, "moment_dtype": config.optimizer.moment_dtype}
    return plan.Plan(chosen, fits, refusal, 0.0, 1.0, model_flops=1.0, seconds={"arithmetic": seconds}, mfu=0.5)


@pytest.mark.parametrize("first", [0, 3, 7, 9])
def test_search_finds_the_first_of_a_chain_that_fits(first):
    chain = [settings(steps=n + 1) for n in range(10)]
    tried, bar = [], []

    def compile_one(config):
        tried.append(config.training.steps - 1)
        return a_plan(config, tried[-1] >= first, seconds=tried[-1])

    found = plan.search(settings(), [chain], compile_one, lambda *progress: bar.append(progress))
    assert plan.fastest(found).seconds["arithmetic"] == first
    assert len(tried) <= 4 and len(set(tried)) == len(tried)
    assert bar[-1] == ("compiling", 4, 4) and [done for _, done, _ in bar[:-1]] == list(range(len(tried)))


def test_search_keeps_to_its_compilations_and_may_find_nothing():
    config = dataclasses.replace(settings(), plan=PlanConfig(search=True, compilations=5))
    chains = plan.chains(config, DECODER)
    assert [chain[0].mesh for chain in chains] == ["8x1", "4x2"]  # two key/value heads
    of_one_batch = 2 * len(typing.get_args(typing.get_type_hints(TrainingConfig)["remat"]))
    # Eight rows are one micro-batch on eight shards, and also two on four.
    assert [len(chain) for chain in chains] == [of_one_batch, of_one_batch + 2]
    tried = []
    found = plan.search(config, chains, lambda c: tried.append(c) or a_plan(c, False), lambda *progress: None)
    assert len(tried) == 5 and plan.fastest(found) is None


def test_the_table_of_a_search_shows_all_that_varies():
    plans = [a_plan(settings("4x2", accumulation=2, remat="none"), True, 0.5), a_plan(settings("8x1"), False)]
    console = Console(width=80, file=io.StringIO())
    console.print(table.of_search(plans))
    lines = console.file.getvalue().splitlines()
    rows = [" ".join(line.split()) for line in lines if re.match(r"\s*\d+x\d+ ", line)]
    assert rows == ["4x2 2 none float32 0.00 0.500 50%", "8x1 1 block float32 does not fit"]


def test_flags_of_a_plan_are_flags_of_the_program():
    best = a_plan(settings("4x2", accumulation=2, remat="none"), True)
    parsed = command_line.parse(["--stage=plan", "--topology=cpu", *plan.flags(best.settings).split()])
    assert a_plan(parsed, True).settings == best.settings


def test_the_program_plans_the_sample_on_this_host(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "compile_step", lambda *args: (no_memory, 0, 1.0))
    no_memory = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, 16.61G of 15.75G"
    monkeypatch.setattr("alignx_jax.stages.plan.weigh", lambda session, source: None)
    run.main(["--stage=plan", "--topology=cpu", "--mesh=8x1", f"--run={tmp_path}"])
    shown = capsys.readouterr().out
    assert "sample: llama" in shown and "16.61G" in shown
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert saved["topology"] == "cpu" and saved["command"].startswith("python run.py --stage=plan")
    assert saved["plans"][0]["fits"] is False and saved["plans"][0]["refusal"] == no_memory


def test_where_weights_are_there_the_losses_are_weighed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "compile_step", lambda *args: ("no memory", 0, 1.0))
    small = ["--data.limit=60", "--data.validation=20", "--training.rows=2", f"--data.cache={tmp_path / 'cache'}"]
    run.main(["--stage=plan", "--topology=cpu", f"--run={tmp_path / 'run'}", *small])
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("next-token", "contrastive", "matching", "mean cosine of translations"))
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["plan.json"]


def test_without_pairs_the_losses_are_not_weighed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "compile_step", lambda *args: ("no memory", 0, 1.0))
    run.main(["--stage=plan", "--topology=cpu", f"--model={loading.SAMPLE_MODEL}", f"--run={tmp_path}"])
    assert "not weighed against each other, for which --data.parallel is needed" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["llama3_8b_opus100", "llama2_7b_opus100"])
def test_a_configuration_gives_the_shapes_of_its_model(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    shapes = configs.load(f"configs/{name}.py").plan.shapes
    counts = {"llama3_8b": 8_030_261_248, "llama2_7b": 6_738_415_616}  # as published with the weights
    _, params = loading.abstract_decoder(loading.find(shapes).decoder_config())
    assert sum(x.size for x in jax.tree.leaves(params)) == counts[pathlib.Path(shapes).name]


@pytest.fixture
def v5e(monkeypatch):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip('needs libtpu: pip install "jax[tpu]"')
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD", "TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE"):
        monkeypatch.setenv(name, "")  # put back what was there
    return machines.find(dataclasses.replace(settings(), topology="v5e:2x4"))


def stack_in_bfloat16(shape: str, shards: set[tuple[int, ...]]) -> bool:
    found = re.findall(r"bf16\[([\d,]+)\]", shape)
    return any(tuple(map(int, dims.split(","))) in shards for dims in found)


def test_a_slice_that_does_not_exist(v5e):
    with pytest.raises(UserError, match=r"^--topology=v5e:3x3: libtpu knows no such slice \(.*\); give one"):
        machines.find(dataclasses.replace(settings("9x1"), topology="v5e:3x3"))


def test_a_step_for_a_v5e(v5e, compiled, monkeypatch):
    made, compile_step = [], plan.compile_step
    monkeypatch.setattr(plan, "compile_step", lambda *args: made.append(compile_step(*args)) or made[0])
    found = plan.measure(settings(), DECODER, v5e)
    module = hlo.Module(made[0][0].as_text())
    _, params = loading.abstract_decoder(DECODER)
    places = sharding.parameter_shardings(params, v5e.mesh("8x1"))["layers"]
    shards = {places[k].shard_shape(x.shape) for k, x in params["layers"].items() if x.ndim > 2}
    casts = [i.name for i in module.computations[module.entry].values() if stack_in_bfloat16(i.shape, shards)]
    assert not casts, "stacks are cast layer by layer, and no copy of one is kept"
    assert found.fits and 0 < found.total_bytes < found.capacity
    assert found.aliased_bytes >= found.state_bytes, "updated in place; a TPU pads arrays to its tiles"
    # Splash attention's backward kernel forms the logits once more than the written-out form, which shares them.
    logits = DECODER.num_layers * ROWS / 8 * 2 * LENGTH**2 * DECODER.head_dim * DECODER.num_heads
    assert found.compiled_flops == pytest.approx(hlo_cost.cost(compiled[1]).flops + logits, rel=1e-3)
    assert found.bound and found.step_seconds == max(found.seconds.values()) and 0 < found.mfu < 1
    assert set(found.sent_bytes) >= {"all-gather", "all-to-all"}
    assert table.of_one(found, v5e).row_count > 10


def test_a_step_of_adapters_for_a_card_of_24_gb():
    if not machines.cuda_plugin():
        pytest.skip('needs XLA\'s compiler for GPUs: pip install "jax[cuda13]"; no GPU is needed')
    config = dataclasses.replace(settings("1x1"), topology="rtx4090:1", lora=LoraConfig(rank=8))
    found = plan.measure(config, DECODER, machines.find(config))
    assert found.fits and found.capacity == 24e9 and found.aliased_bytes == found.state_bytes and not found.caveats


def test_a_step_for_an_h100():
    if not machines.cuda_plugin():
        pytest.skip('needs XLA\'s compiler for GPUs: pip install "jax[cuda13]"; no GPU is needed')
    config = dataclasses.replace(settings("2x1"), topology="h100:2")
    found = plan.measure(config, DECODER, machines.find(config))
    assert found.fits and found.aliased_bytes == found.state_bytes and not found.caveats
    assert found.bound and set(found.sent_bytes) & {"all-gather", "reduce-scatter", "all-reduce"}


def test_without_the_cuda_plugin_a_gpu_is_estimated_on_a_cpu(monkeypatch):
    monkeypatch.setattr(machines, "cuda_plugin", lambda: False)
    on = machines.find(dataclasses.replace(settings("2x1"), topology="h100:2"))
    assert on.devices is None and on.platform == "cpu" and on.capacity(2) == 80e9


def test_a_step_too_large_for_a_v5e_is_refused_with_the_compilers_figures(v5e):
    wide = dataclasses.replace(DECODER, hidden_size=8192, intermediate_size=65536)
    found = plan.measure(settings(), wide, v5e)
    assert not found.fits and "exceeds available HBM (15.75G)" in found.refusal
