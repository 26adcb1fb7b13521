import json
import os
import pickle
import shutil
import tempfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from flax import nnx

from alignx_jax import sharding
from alignx_jax.exits import UserError
from alignx_jax.models import huggingface
from tests.models import llamas

SMALL = 20_000  # bytes a file, so that there are several


def load(folder, spec="1x1"):
    return huggingface.load(folder, sharding.make_mesh(spec))


def tensors(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {k: v for file in files for k, v in safetensors.torch.load_file(file).items()}


def rewrite(folder, change):
    """Changes the dictionary of tensors of a folder with one file."""
    file = folder / "model.safetensors"
    weights = safetensors.numpy.load_file(file)
    change(weights)
    safetensors.numpy.save_file(weights, file)


def set_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("shard_bytes", [5e9, SMALL])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("variant", ["biases", "tied_head_dim"])
def test_round_trip_is_bit_for_bit(tmp_path, variant, dtype, shard_bytes):
    model = llamas.make(variant, getattr(torch, dtype))
    source = llamas.save(model, tmp_path / "source", "20KB" if shard_bytes == SMALL else "5GB")
    decoder = load(source)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(decoder))} == {jnp.dtype(jnp.float32)}
    exported = tmp_path / "exported"
    huggingface.export(decoder, huggingface.read_config(source), exported, dtype, shard_bytes)

    expected, found = tensors(source), tensors(exported)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0)
    many = shard_bytes == SMALL
    assert (len(list(source.glob("*.safetensors"))) > 1) == many  # the source too has the layout meant
    assert (len(list(exported.glob("*.safetensors"))) > 1) == many

    # Both read from disk: `model.to(dtype)` has rounded its rotary frequencies too, which from_pretrained does not.
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(f, dtype="auto").eval() for f in (source, exported)
    )
    assert after.dtype == model.dtype
    tokens = torch.from_numpy(llamas.random_tokens(2, 16)).long()
    with torch.no_grad():
        torch.testing.assert_close(after(tokens).logits, before(tokens).logits, rtol=0, atol=0)


def test_exported_files_keep_to_their_size_and_the_index_describes_them(tmp_path, folder):
    exported = tmp_path / "exported"
    huggingface.export(load(folder), huggingface.read_config(folder), exported, jnp.float32, SMALL)
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    held = {}
    for file in exported.glob("*.safetensors"):
        with safetensors.safe_open(file, framework="np") as opened:
            assert opened.metadata() == {"format": "pt"}
            held |= dict.fromkeys(opened.keys(), file.name)
        assert sum(t.nbytes for t in safetensors.numpy.load_file(file).values()) <= SMALL
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(exported).values())


def test_exported_config_is_the_sources_without_auxiliary_heads(shared, tmp_path):
    source = shared / "reference" / "tied_llama3_rope" / "model"
    config = huggingface.read_config(source)
    huggingface.export(load(source), config, tmp_path / "exported", jnp.bfloat16, 5e9)
    written = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written["torch_dtype"] == "bfloat16"  # as the source spells it
    gone = {f for f in config if f.startswith(("align", "contrastive", "lang"))} | {"num_languages"}
    assert len(gone) == 9
    changed = {"architectures", "torch_dtype"}
    assert {k: v for k, v in written.items() if k not in changed} == {
        k: v for k, v in config.items() if k not in gone | changed
    }
    assert not any("classifier" in key for key in tensors(tmp_path / "exported"))


def test_vocabulary_is_padded_with_zeros_and_cut_on_export(tmp_path, folder):
    decoder = load(folder)
    assert decoder.embedding.shape == (128, 32)
    assert decoder.output_embedding.shape == (128, 32)
    assert not decoder.embedding[llamas.VOCABULARY :].any()
    assert not decoder.output_embedding[llamas.VOCABULARY :].any()
    huggingface.export(decoder, huggingface.read_config(folder), tmp_path / "exported", jnp.float32, 5e9)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        assert tensors(tmp_path / "exported")[key].shape == (llamas.VOCABULARY, 32)


@pytest.mark.parametrize("variant", ["biases", "tied_head_dim"])
@pytest.mark.parametrize("spec", ["8x1", "4x2", "2x2x2"])
def test_every_mesh_loads_and_exports_the_same_bits(tmp_path, pair, variant, spec):
    model, expected = pair(variant)
    if sharding.make_mesh(spec).shape["model"] > expected.config.num_kv_heads:
        spec = "8x1"  # one key/value head cannot be split
    source = llamas.save(model, tmp_path / "source")
    found, mesh = load(source, spec), sharding.make_mesh(spec)
    found_params, expected_params = (nnx.to_pure_dict(nnx.state(d)) for d in (found, expected))
    jax.tree.map(np.testing.assert_array_equal, found_params, expected_params)
    shardings = sharding.parameter_shardings(found_params, mesh)
    jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(str(s)), found_params, shardings)
    huggingface.export(found, huggingface.read_config(source), tmp_path / "exported", jnp.float32, 5e9)
    for key, tensor in tensors(source).items():
        torch.testing.assert_close(tensors(tmp_path / "exported")[key], tensor, rtol=0, atol=0)


def test_only_a_devices_own_part_is_read(folder, monkeypatch):
    read, whole = [], huggingface._read_tensor

    def counting(tensor, weight, config, bounds):
        part = whole(tensor, weight, config, bounds)
        read.append((weight.key, part.size / np.prod(weight.tensor_shape(config))))
        return part

    monkeypatch.setattr(huggingface, "_read_tensor", counting)
    load(folder, "4x2")
    assert {share for key, share in read if key.endswith("proj.weight")} == {1 / 8}


def test_master_type_of_choice(folder):
    assert huggingface.load(folder, sharding.make_mesh("1x1"), jnp.bfloat16).layers.query.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [1, 107]}, {"eos_token_id": 1}, [1, 2, 107]),
        ({"eos_token_id": 107}, {"eos_token_id": 1}, [2, 107]),
        ({}, {"eos_token_id": 1}, [2]),
        (None, {"eos_token_id": [1, 9]}, [1, 2, 9]),
        (None, {"eos_token_id": None}, [2]),
    ],
)
def test_texts_end_where_transformers_ends_them(folder, generation, config, expected):
    """And at the tokenizer's end token, here 2."""
    set_config(folder, **config)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
        theirs = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
    else:
        theirs = transformers.AutoConfig.from_pretrained(folder).eos_token_id
    assert huggingface.stop_ids(folder, 2) == expected
    assert set(expected) == {2, *np.atleast_1d([] if theirs is None else theirs).tolist()}


@pytest.mark.parametrize("ids", ["</s>", [1, None], -1, 2**31, True])
def test_ends_that_are_no_tokens(folder, ids):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(
        UserError, match=r"generation_config\.json: eos_token_id has to be a token id or a list of them"
    ):
        huggingface.stop_ids(folder, 2)


def test_old_buffers_and_the_published_classifier_are_passed_over(folder, pair):
    def add(weights):
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        weights["language_matching_classifier.gate_proj.weight"] = np.ones((4, 4), np.float32)

    rewrite(folder, add)
    expected = pair("gqa")[1]
    jax.tree.map(np.testing.assert_array_equal, nnx.state(load(folder)), nnx.state(expected))


@pytest.mark.parametrize("variant", ["tied_head_dim", "gemma3"])
def test_tied_weights_may_be_stored_as_those_of_the_output(tmp_path, variant):
    """As transformers reads them, which ties in either direction."""
    model, folder, exported = llamas.make(variant), tmp_path / "model", tmp_path / "exported"
    llamas.save(model, folder)
    rewrite(folder, lambda w: w.update({"lm_head.weight": w.pop("model.embed_tokens.weight")}))
    decoder, tokens = load(folder), llamas.random_tokens(2, 16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ours = llamas.our_states(decoder, tokens, *llamas.whole_rows(2, 16))[1]
    np.testing.assert_allclose(ours, llamas.states(theirs, tokens)[1], atol=1e-4)
    huggingface.export(decoder, huggingface.read_config(folder), exported, jnp.float32, 5e9)
    torch.testing.assert_close(tensors(exported)["model.embed_tokens.weight"], tensors(folder)["lm_head.weight"])


def test_files_may_be_read_by_whom_the_umask_lets(tmp_path, folder):
    before = os.umask(0o027)
    try:
        huggingface.export(load(folder), huggingface.read_config(folder), tmp_path / "exported", jnp.float32, SMALL)
    finally:
        os.umask(before)
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in (tmp_path / "exported").iterdir()}
    assert len(modes) > 3 and set(modes.values()) == {"0o640"}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_files_of_others_are_said_to_be_theirs(tmp_path, folder, name):
    with tempfile.TemporaryDirectory(dir="/tmp") as open_to_all:  # $TMPDIR may itself be closed to others
        os.chmod(open_to_all, 0o755)
        copy = shutil.copytree(folder, f"{open_to_all}/model")
        os.chmod(f"{copy}/{name}", 0)
        user = os.geteuid()
        if user == 0:  # whom no mode keeps out
            os.seteuid(65534)
        try:
            with pytest.raises(
                UserError, match=rf"^{copy}/{name} cannot be read \(Permission denied\); have its owner"
            ):
                huggingface.stop_ids(copy, 2), huggingface.dtype(copy), load(copy)
        finally:
            os.seteuid(user)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_weights_whose_type_is_not_named_keep_the_stored_one(tmp_path, dtype, shard):
    folder = llamas.save(llamas.make("gqa", getattr(torch, dtype)), tmp_path / "model", shard)
    set_config(folder, dtype=None)
    assert transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == getattr(torch, dtype)
    assert huggingface.dtype(folder) == dtype


def test_the_type_of_mixed_weights_is_that_of_most_numbers(folder):
    set_config(folder, dtype=None)
    keep = ("norm.weight",)  # in float32, as some training programs save them; the first of the file's keys too
    rewrite(folder, lambda w: w.update({k: x.astype(ml_dtypes.bfloat16) for k, x in w.items() if not k.endswith(keep)}))
    assert huggingface.dtype(folder) == "bfloat16"
    rewrite(folder, lambda w: w.update({k: x.astype(np.float64) for k, x in w.items()}))
    assert huggingface.dtype(folder) == "float32", "training keeps no more"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "float16"),
        ({"dtype": None, "torch_dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_the_type_is_named_in_one_field(tmp_path, folder, fields, expected):
    source = {k: v for k, v in huggingface.read_config(folder).items() if k not in ("dtype", "torch_dtype")} | fields
    assert transformers.LlamaConfig(**source).dtype == getattr(torch, expected)
    assert huggingface.named_dtype(source, "config.json") == expected
    (folder / "config.json").write_text(json.dumps(source))
    huggingface.export(load(folder), source, tmp_path / "exported", jnp.bfloat16, 5e9)
    written = json.loads((tmp_path / "exported" / "config.json").read_text())
    names = "torch_dtype" if fields.keys() == {"torch_dtype"} else "dtype"
    assert {k: v for k, v in written.items() if "dtype" in k} == {names: "bfloat16"}


@pytest.mark.parametrize("named", ["int8", "float64", "float8_e4m3fn", "torch.bfloat16", "auto", 16, ["bfloat16"], ""])
@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_types_that_weights_are_not_written_in_are_refused(field, named):
    with pytest.raises(UserError, match=rf"^config.json: {field} is .*; set it to one of float32, bfloat16, float16$"):
        huggingface.named_dtype({field: named}, "config.json")


def test_a_second_copy_of_tied_embeddings_has_to_be_one(tmp_path):
    folder = llamas.save(llamas.make("tied_head_dim"), tmp_path / "model")
    rewrite(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].copy()}))
    load(folder)
    for other in (np.float32(0), np.zeros((99, 32), np.int8), None):
        if other is not None:
            rewrite(folder, lambda w, other=other: w.update({"lm_head.weight": np.asarray(other)}))
        else:
            rewrite(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].copy()}))
            rewrite(folder, lambda w: w["lm_head.weight"].__setitem__((98, 3), 7.0))
        with pytest.raises(UserError, match=r"lm_head\.weight differs from the embeddings, but config\.json ties them"):
            load(folder)


def without_config(folder):
    (folder / "config.json").unlink()


def with_broken_config(folder):
    (folder / "config.json").write_text('{"model_type": ')


def with_list_config(folder):
    (folder / "config.json").write_text("[]")


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def with_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def with_torch_pickle(folder):
    (folder / "model.safetensors").rename(folder / "consolidated.00.pth")


def pickle_in_the_place_of_weights(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps({"model.norm.weight": np.ones(32)}))


def code_of_its_own(folder):
    (folder / "own.py").write_text("raise SystemExit('it ran')")
    set_config(folder, auto_map={"AutoModelForCausalLM": "own.Own"})


def deep_config(folder):
    (folder / "config.json").write_text("[" * 100_000)


def cut_body(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def cut_header(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:20])


def garbage(folder):
    (folder / "model.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0" + b"x" * 1000)


def missing_key(folder):
    rewrite(folder, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))


def unknown_keys(folder):
    rewrite(folder, lambda w: w.update({f"extra.{n}": np.ones(1, np.float32) for n in range(5)}))


def bias_without_config(folder):
    rewrite(folder, lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)}))


def wrong_shape(folder):
    set_config(folder, vocab_size=100)


def transposed(folder):
    rewrite(
        folder, lambda w: w.update({k: np.ascontiguousarray(w[k].T) for k in ["model.layers.2.mlp.up_proj.weight"]})
    )


def integers(folder):
    rewrite(folder, lambda w: w.update({"model.norm.weight": np.ones(32, np.int8)}))


def nan(folder):
    rewrite(folder, lambda w: w["model.layers.1.mlp.down_proj.weight"].__setitem__((31, 47), np.nan))


def infinite_bfloat16(folder):
    def change(weights):
        weights["model.norm.weight"] = weights["model.norm.weight"].astype(ml_dtypes.bfloat16)
        weights["model.norm.weight"][5] = np.inf

    rewrite(folder, change)


def beyond_float32(folder):
    rewrite(folder, lambda w: w.update({"model.norm.weight": np.full(32, 1e300)}))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4976698672\n"


def huge_config(folder):
    (folder / "config.json").write_text("[" + "0," * 20_000_000 + "0")


def weights_of_lfs(folder):
    (folder / "model.safetensors").write_text(POINTER)


def config_of_lfs(folder):
    (folder / "config.json").write_text(POINTER)


def with_a_link_to_nothing(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../blobs/4d7a2146")


def with_gguf(folder):
    (folder / "model.safetensors").rename(folder / "model-Q4_K_M.gguf")


def with_tensorflow(folder):
    (folder / "model.safetensors").rename(folder / "tf_model.h5")


def without_its_index(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (with_torch_pickle, "pickled .pth files, which can run code when read; convert them"),
        (pickle_in_the_place_of_weights, "model.safetensors: truncated or damaged"),
        (code_of_its_own, "config.json: auto_map names code of the model's own, which is never run"),
        (deep_config, "config.json: not a JSON file"),
        (
            lambda folder: set_config(folder, rms_norm_eps=10**400),
            "config.json: not a JSON file (a number of 401 digits)",
        ),
        (lambda folder: set_config(folder, model_type=[]), "config.json: model_type has to be a string"),
        (lambda folder: set_config(folder, vocab_size=2**31), "vocab_size is 2147483648, more than any model has"),
        (lambda folder: set_config(folder, num_hidden_layers=10**9), "num_hidden_layers is 1000000000, more than any"),
        (
            lambda folder: set_config(folder, num_hidden_layers=4000),
            "asks for 4000 layers, more than there are weights",
        ),
        (huge_config, "config.json: 40,000,002 bytes, more than such a file has"),
        (weights_of_lfs, "model.safetensors is a pointer of Git LFS in the place of the file; run git lfs pull in"),
        (config_of_lfs, "config.json is a pointer of Git LFS in the place of the file; run git lfs pull in"),
        (with_a_link_to_nothing, "model.safetensors is a link to a file that is gone; download it again"),
        (
            with_gguf,
            "its weights are GGUF files, which are of llama.cpp, quantized most often; give the Hugging Face folder",
        ),
        (with_tensorflow, "its weights are files of TensorFlow; it needs model.safetensors"),
        (without_its_index, "model-00001-of-00002.safetensors is not the whole model; it needs model.safetensors"),
        (without_config, "config.json: no such file; give a Hugging Face folder"),
        (with_broken_config, "config.json: not a JSON file"),
        (with_list_config, "config.json: not a JSON object"),
        (without_weights, "no weights; it needs model.safetensors, or model.safetensors.index.json"),
        (with_pickle, "pickled .bin files, which can run code when read; convert them"),
        (cut_body, "model.safetensors: truncated or damaged"),
        (cut_header, "model.safetensors: truncated or damaged"),
        (garbage, "model.safetensors: truncated or damaged"),
        (missing_key, "the weights lack model.layers.1.mlp.up_proj.weight, which its config.json asks for"),
        (unknown_keys, "the weights hold extra.0, extra.1, extra.2 and 2 more, which no part of a llama model reads"),
        (bias_without_config, "the weights hold model.layers.0.self_attn.q_proj.bias"),
        (wrong_shape, "has shape [99, 32]; its config.json makes it [100, 32]"),
        (transposed, "model.layers.2.mlp.up_proj.weight has shape [32, 48]; its config.json makes it [48, 32]"),
        (integers, "model.norm.weight is of type I8; supported: F64, F32, F16, BF16"),
        (nan, "model.layers.1.mlp.down_proj.weight holds NaN or infinity"),
        (infinite_bfloat16, "model.norm.weight holds NaN or infinity"),
        (beyond_float32, "model.norm.weight holds NaN or infinity"),
    ],
)
def test_a_bad_folder_is_one_clear_sentence(folder, spoil, message):
    spoil(folder)
    with pytest.raises(UserError) as error:
        load(folder, "4x2")
    assert str(folder) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def first_file(folder):
    return min(folder.glob("*.safetensors"))


def without_index(folder):
    (folder / "model.safetensors.index.json").unlink()


def with_empty_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')


def with_a_key_that_is_nowhere(folder):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["nowhere"] = first_file(folder).name
    file.write_text(json.dumps(index))


def outside(name):
    def spoil(folder):
        file = folder / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        first, to = first_file(folder), folder.parent / "outside.safetensors"
        files = {key: name or str(to) if held == first.name else held for key, held in index["weight_map"].items()}
        first.rename(to)
        file.write_text(json.dumps(index | {"weight_map": files}))

    return spoil


def one_file_twice(folder):
    file = folder / "model.safetensors.index.json"
    shutil.copy(first_file(folder), folder / "again.safetensors")
    index = json.loads(file.read_text())
    index["weight_map"]["again"] = "again.safetensors"
    file.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (outside("../outside.safetensors"), "no file '../outside.safetensors' in it"),
        (outside(None), "outside.safetensors' in it"),
        (outside("a\0"), r"no file 'a\x00' in it"),
        (outside("\ud800"), r"no file '\ud800' in it"),
        (outside("a" * 5000), "in it, though"),
        (one_file_twice, "is in another file too"),
        (lambda folder: first_file(folder).unlink(), "in it, though model.safetensors.index.json names it"),
        (lambda folder: first_file(folder).write_bytes(b""), "truncated or damaged"),
        (without_index, "-of-00007.safetensors is not the whole model; it needs model.safetensors"),
        (with_empty_index, "model.safetensors.index.json: no weight_map"),
        (with_a_key_that_is_nowhere, "model.safetensors.index.json names tensors that are not in its files: nowhere"),
    ],
)
def test_a_bad_folder_of_many_files(tmp_path, spoil, message):
    folder = llamas.save(llamas.make("gqa"), tmp_path / "model", "20KB")
    spoil(folder)
    with pytest.raises(UserError) as error:
        load(folder)
    assert message in str(error.value)


def test_export_does_not_write_over_anything(tmp_path, folder):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").touch()
    with pytest.raises(UserError, match="taken exists already"):
        huggingface.export(load(folder), huggingface.read_config(folder), tmp_path / "taken", jnp.float32, 5e9)
    assert [f.name for f in (tmp_path / "taken").iterdir()] == ["precious"]


def test_export_beyond_the_range_of_the_type_leaves_no_folder(tmp_path, folder):
    decoder = load(folder)
    decoder.norm[...] = jnp.full(32, 1e5)
    with pytest.raises(UserError, match=r"model\.norm\.weight is not finite in float16"):
        huggingface.export(decoder, huggingface.read_config(folder), tmp_path / "exported", jnp.float16, 5e9)
    assert not (tmp_path / "exported").exists()
    huggingface.export(decoder, huggingface.read_config(folder), tmp_path / "exported", jnp.float32, 5e9)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["exported", "model"]


def test_export_takes_the_config_of_the_decoder_only(tmp_path, folder):
    other = huggingface.read_config(folder) | {"rms_norm_eps": 1e-3}
    with pytest.raises(ValueError, match="not that of the decoder"):
        huggingface.export(load(folder), other, tmp_path / "exported", jnp.float32, 5e9)
