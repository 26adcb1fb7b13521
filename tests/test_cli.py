"""The program as a person meets it: bad input gets one sentence before anything is compiled, and leaves nothing."""

import dataclasses
import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest
import safetensors.numpy

import run
from alignx_jax import config_files as configs
from alignx_jax import exits
from alignx_jax.data import pipeline
from alignx_jax.runs import lineage, loading, locks
from alignx_jax.training import build
from alignx_jax.training import step as steps
from tests import processes

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMPILED = "a step was to be compiled"
SAMPLE = ROOT / "configs" / "sample.py"
GOOD = {"src_lang": "de", "tgt_lang": "en", "src": "Der Hund schläft.", "tgt": "The dog sleeps."}


SENTENCES = ["--evaluation.sentences=sample"]


def write(file: pathlib.Path, *lines: dict | bytes) -> pathlib.Path:
    """A JSONL file; bytes are lines as they are."""
    encoded = (line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in lines)
    file.write_bytes(b"".join(line + b"\n" for line in encoded))
    return file


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> pathlib.Path:
    """A cache, and small corpora of both kinds."""
    folder = tmp_path_factory.mktemp("prepared")
    pairs = ({**GOOD, "src": f"Der Hund {n} schläft.", "tgt": f"Dog {n} sleeps."} for n in range(40))
    write(folder / "pairs.jsonl", *pairs)
    write(folder / "answers.jsonl", *({"instruction": f"Say {n}.", "output": f"I say {n}."} for n in range(40)))
    return folder


@pytest.fixture
def program(tmp_path, prepared, monkeypatch):
    """Runs `run.py` in this process on the small corpora; a step that is traced, to be compiled, fails the test.

    But for the one that is compiled while sentences are encoded: nothing waits for it.
    """
    jax.devices()  # 8: from here on their number is fixed, as it is on a machine with accelerators

    def traced(*args, **static):
        pytest.fail(COMPILED)

    monkeypatch.setattr(steps, "train_step", traced)
    monkeypatch.setattr(steps, "validation_sums", traced)
    monkeypatch.setattr(build, "compile_ahead", lambda *_: None)
    cache = jax.config.jax_compilation_cache_dir

    def program(*flags: str) -> None:
        run.main(
            [
                f"--config={SAMPLE}",
                "--mesh=2x1",
                f"--run={tmp_path / 'run'}",
                f"--data.cache={prepared / 'cache'}",
                f"--data.parallel={prepared / 'pairs.jsonl'}",
                f"--data.instructions={prepared / 'answers.jsonl'}",
                "--training.rows=8",
                "--training.steps=2",
                *flags,
            ]
        )

    yield program
    jax.config.update("jax_compilation_cache_dir", cache)


@pytest.fixture
def nothing_begun(monkeypatch):
    """Fails the test where even that begins."""
    monkeypatch.setattr(build, "compile_ahead", lambda *_: pytest.fail(COMPILED))


@pytest.fixture
def sentence(program):
    """The sentence that the program stops with."""

    def sentence(*flags: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            program(*flags)
        message = stopped.value.code  # what the interpreter prints to stderr, exiting with 1
        assert isinstance(message, str) and message.startswith("run.py: ") and "\n" not in message
        return message

    return sentence


@pytest.fixture
def refusal(sentence, tmp_path):
    """The sentence that the program stops with, before it makes a folder for the run."""

    def refusal(*flags: str) -> str:
        message = sentence(*flags)
        assert not (tmp_path / "run").exists()
        return message

    return refusal


@pytest.fixture
def model(tmp_path) -> pathlib.Path:
    """A copy of the sample model, to spoil."""
    return pathlib.Path(shutil.copytree(loading.SAMPLE_MODEL, tmp_path / "model"))


def spoil_weights(model: pathlib.Path, change) -> None:
    weights = safetensors.numpy.load_file(model / "model.safetensors")
    change(weights)
    safetensors.numpy.save_file(weights, model / "model.safetensors")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--objective.contrastive.layer=9"], ["--objective.contrastive.layer=9", "has 8 layers", "0 ", "to 8"]),
        (["--objective.language-matching.layer=-1"], ["--objective.language-matching.layer=-1", "has 8 layers"]),
        (["--mesh=8x1", "--training.rows=12"], ["--training.rows=12", "8 data shards", "a multiple of 8"]),
        (["--lora.rank=-1"], ["--lora.rank=-1", "greater than or equal to 0"]),
        (["--lora.rank=65"], ["--lora.rank=65", "k_proj is of 128 inputs and 64 outputs", "give a smaller one"]),
        (["--lora.rank=4", "--lora.targets=lm_head"], ["--lora.targets=lm_head", "q_proj, k_proj, v_proj, o_proj"]),
        (["--lora.rank=4", "--lora.targets=q_proj,v_proj"], ["=q_proj,v_proj", "give --lora.targets='q_proj|v_proj'"]),
        (["--lora.targets=q_proj"], ["--lora.rank=0 has none", "give a rank"]),
        (["--training.accumulation=3"], ["--training.accumulation=3", "a multiple of 3"]),
        (["--training.accumulation=8"], ["8 micro-batches", "a multiple of 16"]),
        (["--objective.negatives=step"], ["--objective.negatives=step", "--training.accumulation=1", "give global"]),
        (["--mesh=1x4"], ["model axis of 4", "2 key/value heads", "work: 1, 2"]),
        (["--training.attention=cudnn"], ["--training.attention=cudnn", "does not run on a CPU", "give auto or xla"]),
        (["--mesh=16x1"], ["--mesh=16x1", "there are 8", "at most 8"]),
        (["--mesh=eight"], ["--mesh=eight", "such as 8x1"]),
        (["--mesh=0x1"], ["--mesh=0x1", "such as 8x1"]),
        (["--training.rows=0"], ["--training.rows=0", "greater than or equal to 1"]),
        (["--training.accumulation=0"], ["--training.accumulation=0", "greater than or equal to 1"]),
        (["--training.epochs=0"], ["--training.epochs=0", "greater than 0"]),
        (["--data.min-target-tokens=0"], ["--data.min-target-tokens=0", "greater than or equal to 1"]),
        (["--data.parallel-weights", "0"], ["--data.parallel-weights", "greater than 0"]),
        (["--run=runs/mk[v2]"], ["--run=runs/mk[v2]", "the path has [", "another --run"]),
        (["--run="], ["--run is empty", "a shell variable"]),
        (["--data.cache=README.md/cache"], ["README.md/cache", "can be read and written"]),
        (["--stage=evaluate", "--model=sample", "--evaluation.rows=3"], ["--evaluation.rows=3", "a multiple of 2"]),
        (["--training.steps=0"], ["--training.steps=0", "greater than or equal to 1"]),
        (["--training.save-every=0"], ["--training.save-every=0", "greater than or equal to 1"]),
        (["--training.keep=0"], ["--training.keep=0", "greater than or equal to 1"]),
        (["--evaluation.rows=0"], ["--evaluation.rows=0", "greater than or equal to 1"]),
        (["--export.shard-gb=0"], ["--export.shard-gb=0", "greater than 0"]),
        (["--optimizer.learning-rate=nan"], ["--optimizer.learning-rate=nan", "finite"]),
        (["--optimizer.beta2=1"], ["--optimizer.beta2=1", "less than 1"]),
        (["--objective.chunk=0"], ["--objective.chunk=0", "greater than or equal to 1"]),
        (["--objective.contrastive.temperature=0"], ["--objective.contrastive.temperature=0", "greater than 0"]),
        (["--objective.language-matching.weight=-1"], ["--objective.language-matching.weight=-1", "equal to 0"]),
        (["--seed=-1"], ["--seed=-1", "greater than or equal to 0"]),
        (["--data.row-length=64"], ["--data.row-length=64", "--data.cutoff=128"]),
        (["--data.parallel-weights", "1", "2"], ["--data.parallel-weights", "2 weights for 1 source"]),
        (["--model=nowhere"], ["nowhere: no such folder", "Hugging Face folder"]),
        (["--model=configs"], ["configs: neither a Hugging Face folder nor a stage", "no config.json"]),
        (["--config=configs/nothing.py"], ["--config=configs/nothing.py: no such file"]),
        (["--data.parallel=nothing.tsv"], ["nothing.tsv: no such file"]),
        (["--data.template=nothing.json"], ["nothing.json", "no such file"]),
        (["--stage=2"], ["run it, or give --model"]),
        (["--stage=2", "--model=sample", "--data.translation-share=2"], ["--data.translation-share=2", "equal to 1"]),
        (["--stage=2", "--model=sample", "--data.instructions=nothing.json"], ["nothing.json: no such file"]),
        (["--stage=evaluate"], ["no stage to evaluate"]),
        (
            ["--stage=evaluate", "--model=sample", "--evaluation.pivot=tr"],
            ["pivot tr (--evaluation.pivot)", "ar, de, en"],
        ),
        (["--stage=evaluate", "--model=sample", "--evaluation.languages", "en", "tr"], ["(en ", "tr 0)"]),
        (["--stage=evaluate", "--model=sample", "--evaluation.languages", "en"], ["there are en"]),
        (["--stage=evaluate", "--model=nowhere", "--evaluation.limit=4"], ["--evaluation.limit=4: retrieval needs 5"]),
        (["--stage=evaluate", "--model=sample", "--compare=nowhere"], ["nowhere: no such folder"]),
        (["--stage=evaluate", "--model=sample", "--data.template=nothing.json"], ["nothing.json", "no such file"]),
        (["--stage=evaluate", "--model=sample", "--evaluation.choices=no.jsonl"], ["--evaluation.choices", "no.jsonl"]),
        (
            ["--stage=evaluate", "--model=sample", "--evaluation.translation.directions=de-tr"],
            ["--evaluation.translation.directions", "'de-tr'", "ar, de, en"],
        ),
        (
            [
                "--stage=evaluate",
                "--model=sample",
                "--evaluation.translation.shots=3",
                "--evaluation.translation.limit=546",
            ],
            ["--evaluation.translation.shots=3", "0 sentences are left"],
        ),
        (
            ["--stage=evaluate", "--model=sample", "--evaluation.translation.comet=wmt.ckpt"],
            ["--evaluation.translation.comet", "comet-score"],
        ),
        (["--evaluation.resamples=9"], ["--evaluation.resamples=9", "greater than or equal to 100"]),
        (["--stage=evaluate", "--model=sample", "--evaluation.sentences=no.jsonl"], ["no.jsonl: no such file"]),
        (["--stage=export"], ["no stage to export"]),
        (["--stage=export", "--model=sample", "--export.adapter"], ["--export.adapter: sample has no adapters"]),
        (["--stage=export", "--model=sample", "--export.to=configs"], ["configs exists already"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_settings_that_cannot_work(refusal, monkeypatch, flags, says):
    monkeypatch.chdir(ROOT)
    message = refusal(*flags)
    for part in says:
        assert part in message


def test_which_model_is_the_baseline(tmp_path, monkeypatch):
    """What `evaluate` compares with comes first."""

    def models(*flags: str) -> list[str]:
        seen = []
        monkeypatch.setattr(run, "evaluate", lambda session, paths: seen.extend(paths))
        run.main([f"--run={tmp_path / 'run'}", f"--data.cache={tmp_path}", "--stage=evaluate", *flags, *SENTENCES])
        return seen

    cache = jax.config.jax_compilation_cache_dir
    assert models("--model=a", "--compare", "b", "c", "a") == ["b", "c", "a"]
    assert models("--model=a") == ["a"]
    (tmp_path / "run" / "stage1").mkdir(parents=True)
    (tmp_path / "run" / "stage1" / "config.json").write_text(configs.to_json(configs.Config()))
    begun = lineage.Lineage(lineage.Origin("sample", "abc"), ())
    (tmp_path / "run" / "stage1" / lineage.FILE).write_text(lineage.text(begun))
    assert models("--compare", "b") == ["sample", str(tmp_path / "run" / "stage1"), "b"]
    jax.config.update("jax_compilation_cache_dir", cache)


@pytest.mark.slow
def test_stage_2_evaluation_and_export_of_ones_own_data(tmp_path, prepared, monkeypatch, capsys):
    """As in the README's "Your model, your data": one configuration, a model and data of one's own, and the run."""
    monkeypatch.chdir(ROOT)
    processes.tiny_model(tmp_path)
    lines = ({"text": {"en": f"Dog {n} sleeps.", "de": f"Der Hund {n} schläft."}} for n in range(8))
    sentences, run_ = write(tmp_path / "sentences.jsonl", *lines), f"--run={tmp_path / 'run'}"
    (tmp_path / "mine.py").write_text(
        "from alignx_jax.config import *\n"
        "config = Config(data=DataConfig(parallel=('none',), cutoff=256), training=TrainingConfig(rows=8, steps=2))"
    )
    pairs = [f"--data.parallel={prepared / 'pairs.jsonl'}", f"--data.cache={prepared / 'cache'}"]
    mine, mesh = f"--config={tmp_path / 'mine.py'}", "--mesh=2x1"
    run.main(["--stage=1", mine, mesh, run_, f"--model={tmp_path / 'model'}", *pairs, "--data.validation=8"])
    capsys.readouterr()
    run.main(["--stage=2", mine, mesh, run_, f"--data.instructions={prepared / 'answers.jsonl'}"])
    said = capsys.readouterr().out
    assert "from stage 1: data.parallel, data.validation, data.cache, objective.contrastive.layer\n" in said
    few = ["--evaluation.translation.limit=2", "--evaluation.translation.max-tokens=4", "--evaluation.resamples=100"]
    run.main(["--stage=evaluate", run_, mesh, f"--evaluation.sentences={sentences}", *few])
    run.main(["--stage=export", run_, mesh])
    stages = [configs.load(str(tmp_path / "run" / name)) for name in ("stage1", "stage2")]
    assert stages[1].model == str(tmp_path / "run" / "stage1")
    assert stages[0].data.parallel == stages[1].data.parallel == (str(prepared / "pairs.jsonl"),)
    assert (tmp_path / "run" / "evaluation" / "sentences" / "report.html").is_file() and (
        tmp_path / "run" / "export" / "config.json"
    ).is_file()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({**GOOD, "src_lang": "xx"}, ["'src_lang'", "'xx' is no language code"]),
        ({**GOOD, "tgt_lang": "german"}, ["'tgt_lang'", "'german' is no language code", "German is de"]),
        ({**GOOD, "tgt": " \t"}, ["'tgt' is empty"]),
        ({k: v for k, v in GOOD.items() if k != "src"}, ["'src' is missing", "the line has 'src_lang', 'tgt_lang'"]),
        ({**GOOD, "src": 7}, ["'src' has to be a text, not int"]),
        (json.dumps(GOOD, ensure_ascii=False).encode("latin-1"), ["not UTF-8 at byte", "save the file as UTF-8"]),
        (b"{", ["not JSON"]),
    ],
    ids=["language", "language name", "empty side", "missing field", "not text", "not UTF-8", "not JSON"],
)
def test_a_bad_line_is_told_with_file_line_and_field(refusal, nothing_begun, tmp_path, line, says):
    file = write(tmp_path / "bad.jsonl", GOOD, GOOD, line, GOOD)
    message = refusal(f"--data.parallel={file}")
    for part in [f"{file}:3: ", *says, "--data.on-error=skip"]:
        assert part in message


def test_a_bad_instruction_is_told_with_file_and_line(refusal, nothing_begun, tmp_path):
    file = write(tmp_path / "bad.jsonl", {"instruction": "Say.", "output": "I say."}, {"instruction": "Say."})
    message = refusal("--stage=2", "--model=sample", f"--data.instructions={file}")
    assert f"{file}:2: field 'output' is missing" in message


def test_the_step_is_compiled_while_sentences_are_encoded(program, monkeypatch):
    order, encode = [], pipeline.encode
    monkeypatch.setattr(pipeline, "encode", lambda *given: order.append("encode") or encode(*given))
    monkeypatch.setattr(build, "compile_ahead", lambda *_: order.append("compile"))
    with pytest.raises(pytest.fail.Exception, match=COMPILED):
        program()
    assert order == ["compile", "encode"]


def test_one_language_has_nothing_to_match(refusal, tmp_path):
    lines = ({**GOOD, "src_lang": "en", "src": f"A dog {n} sleeps now.", "tgt": f"Dog {n} sleeps."} for n in range(40))
    message = refusal(f"--data.parallel={write(tmp_path / 'english.jsonl', *lines)}")
    assert "one language (en)" in message and "--objective.language-matching.weight=0" in message


def test_examples_beyond_the_cutoff_are_dropped_and_counted(program, refusal, tmp_path, capsys):
    lines = [{**GOOD, "src": f"Der Hund {n} schläft.", "tgt": f"Dog {n} sleeps."} for n in range(40)]
    for line in lines[:3]:
        line["src"] = " ".join([line["src"]] * 50)
    file = write(tmp_path / "long.jsonl", *lines)
    program("--stage=prepare", f"--data.parallel={file}", f"--run={tmp_path / 'looked at'}")
    stage_1, stage_2 = capsys.readouterr().out.split("prepare stage 2")
    assert "left out: 6 " in stage_1 and "left out: 6 " in stage_2  # both directions of three pairs
    report = json.loads((tmp_path / "looked at" / "corpus.json").read_text(encoding="utf-8"))
    assert report["sources"][0]["dropped"] == {"overlong": 6} and report["directions"]["de > en"]["examples"] == 37
    assert "examples by direction" in stage_2
    assert (tmp_path / "looked at" / "corpus.html").is_file()
    message = refusal("--data.cutoff=8", f"--data.parallel={file}")
    assert f"{file}: every example was dropped" in message and ": 80" in message and "--data.cutoff" in message


def test_a_tokenizer_larger_than_the_embedding(refusal, model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 4000}))
    weights = safetensors.numpy.load_file(model / "model.safetensors")
    few = {name: x[:4000].copy() if x.shape[0] == 4096 else x for name, x in weights.items()}
    safetensors.numpy.save_file(few, model / "model.safetensors")
    message = refusal(f"--model={model}")
    assert "tokenizer's tokens up to 4095" in message and "4000 rows" in message


def test_a_model_without_a_tokenizer(refusal, model):
    (model / "tokenizer.model").unlink()
    assert f"{model}: no tokenizer here" in refusal(f"--model={model}")


def test_another_architecture_is_refused_with_those_that_work(refusal, model):
    (model / "config.json").write_text(json.dumps({"model_type": "bert"}))
    message = refusal(f"--model={model}")
    assert f"{model / 'config.json'}: model_type 'bert'" in message and "supported: llama" in message


def _no_file(model):
    (model / "model.safetensors").unlink()


def _truncated(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _missing(model):
    spoil_weights(model, lambda weights: weights.pop("model.layers.3.mlp.up_proj.weight"))


def _unmapped(model):
    spoil_weights(model, lambda weights: weights.update({"model.adapter": weights["model.norm.weight"]}))


def _shape(model):
    spoil_weights(
        model, lambda weights: weights.update({"model.norm.weight": weights["model.norm.weight"][:-1].copy()})
    )


def _nan(model):
    def change(weights):
        weights["model.layers.5.self_attn.k_proj.weight"][3, 7] = float("nan")

    spoil_weights(model, change)


@pytest.mark.parametrize("stage", ["1", "export"])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_no_file, ["no weights", "model.safetensors"]),
        (_truncated, ["model.safetensors: truncated or damaged", "download it again"]),
        (_missing, ["lack model.layers.3.mlp.up_proj.weight"]),
        (_unmapped, ["hold model.adapter"]),
        (_shape, ["model.norm.weight has shape [127]", "[128]"]),
        (_nan, ["model.layers.5.self_attn.k_proj.weight"]),
    ],
)
def test_bad_weights(program, sentence, model, tmp_path, spoil, says, stage):
    spoil(model)
    message = sentence(f"--model={model}", f"--stage={stage}")
    for part in [str(model), *says]:
        assert part in message
    assert not (tmp_path / "run" / "export").exists()
    # What was begun does not stand in the way of the same command once the model is mended.
    shutil.copytree(loading.SAMPLE_MODEL, model, dirs_exist_ok=True)
    if stage == "1":
        with pytest.raises(pytest.fail.Exception, match=COMPILED):
            program(f"--model={model}")
    else:
        program(f"--model={model}", "--stage=export")
        assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


class Killed(BaseException):
    """Nothing is done after it."""


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("tokenizer.model", Killed),
        ("tokenizer_config.json", OSError(errno.ENOSPC, "No space left on device")),
        ("config.json", Killed),
    ],
)
def test_an_export_that_ends_early_is_none_and_starts_again(program, monkeypatch, tmp_path, name, error):
    write, folder = pathlib.Path.write_bytes, tmp_path / "run" / "export"

    def fail(file: pathlib.Path, content: bytes) -> int:
        if file.name == name:
            raise error
        return write(file, content)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "write_bytes", fail)
        with pytest.raises(Killed if error is Killed else SystemExit) as stopped:
            program("--model=sample", "--stage=export")
    assert error is Killed or stopped.value.code == exits.STORAGE
    assert not folder.exists()
    program("--model=sample", "--stage=export")
    expected = {lineage.FILE, *(file.name for file in loading.SAMPLE_MODEL.iterdir())}
    assert {file.name for file in folder.iterdir()} == expected
    assert list((tmp_path / "run").iterdir()) == [folder]


def test_two_exports_to_one_folder(sentence, tmp_path):
    folder = tmp_path / "run" / "export"
    with locks.hold(folder):
        (tmp_path / "run" / ".export.partial").mkdir()  # of the other one
        message = sentence("--model=sample", "--stage=export")
        assert f"{folder} is in use by another run (process {os.getpid()} on " in message and "--export.to" in message
        assert (tmp_path / "run" / ".export.partial").exists()


def test_the_folder_of_another_configuration(sentence, tmp_path):
    config = configs.load(str(SAMPLE))
    theirs = dataclasses.replace(config, seed=3, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.5))
    (tmp_path / "run" / "stage1").mkdir(parents=True)
    (tmp_path / "run" / "stage1" / "config.json").write_text(configs.to_json(theirs))
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    message = sentence()
    assert f"{tmp_path / 'run' / 'stage1'} belongs to another configuration" in message and "--run" in message
    for difference in ("seed: 3 there, 0 here", f"learning_rate: 0.5 there, {config.optimizer.learning_rate} here"):
        assert difference in message
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before


def test_a_run_keeps_nothing_of_the_environment(program, monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"):
        monkeypatch.setenv(name, "abracadabra")
    with pytest.raises(pytest.fail.Exception, match=COMPILED):
        program()
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert {"config.json", "lineage.json"} <= {file.name for file in files}
    assert not [file for file in files if b"abracadabra" in file.read_bytes()]


def test_names_are_no_markup(program, prepared, tmp_path, capsys):
    """`[/x]` would close what was never opened."""
    file = tmp_path / "[bold] [" / "x]" / "pairs.jsonl"
    file.parent.mkdir(parents=True)
    shutil.copy(prepared / "pairs.jsonl", file)
    program("--stage=prepare", f"--data.parallel={file}")
    assert str(file) in capsys.readouterr().out


def test_a_folder_of_someone_else_is_left_alone(sentence, tmp_path):
    (tmp_path / "run" / "stage1").mkdir(parents=True)
    (tmp_path / "run" / "stage1" / "thesis.txt").write_text("chapter 1")
    assert "is not empty and not a run of ours" in sentence()
    assert [file.name for file in (tmp_path / "run").rglob("*")] == ["stage1", "thesis.txt"]


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--trainig.rows=3", "--training.rows"),
        ("--objective.contrastive.laeyr=3", "--objective.contrastive.layer"),
        ("--learning_rate=1", "--optimizer.learning-rate"),
        ("--learning-rate", "--optimizer.learning-rate"),
        ("--modle=x", "--model"),
        ("--rows=3", "--training.rows"),
        ("--contrastive.layer=3", "--objective.contrastive.layer"),
        ("--temprature=2", "--data.temperature"),
        ("--stage=3", "'all'"),
        ("--training.rows=many", "--training.rows"),
    ],
)
def test_a_wrong_flag_names_the_nearest(program, capsys, flag, nearest):
    with pytest.raises(SystemExit) as stopped:
        program(flag)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert flag.partition("=")[0].lstrip("-") in error.replace("argument '--stage'", "stage") and nearest in error


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--mesh=2x1", "--objective.contrastive.layer=9"], 1, "run.py: --objective.contrastive.layer=9: "),
        (["--trainig.rows=3"], 2, "--training.rows"),
    ],
    ids=["setting", "flag"],
)
def test_as_a_command(tmp_path, flags, code, says):
    command = [sys.executable, str(ROOT / "run.py"), f"--run={tmp_path / 'run'}", f"--data.cache={tmp_path}", *flags]
    on_cpu = os.environ | {"JAX_PLATFORMS": "cpu"}  # or libtpu, where it is installed, says that it finds no TPU
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path, env=on_cpu)
    assert done.returncode == code
    assert says in done.stderr and "Traceback" not in done.stderr and says not in done.stdout
    assert code == 2 or done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def _with_note(error: Exception, note: str) -> Exception:
    error.add_note(note)
    return error


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (exits.Interrupted("stopped after step 3"), 75, "stopped after step 3"),
        (exits.StorageError("run/checkpoints/3: no room"), 74, "run/checkpoints/3: no room"),
        (
            _with_note(exits.Diverged("step 3: loss"), "a save failed"),
            70,
            "step 3: loss; a save failed; again: python run.py",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "cache/x"), 74, "cache/x: No space left on device; "),
        (OSError(errno.EROFS, "Read-only file system"), 74, "Read-only file system; "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_exit_codes(monkeypatch, capsys, error, code, says):
    def start(*_):
        raise error

    monkeypatch.setattr(run, "start", start)
    with pytest.raises(SystemExit) as stopped:
        run.main([])
    assert stopped.value.code == code
    said = capsys.readouterr().err
    assert said.startswith(f"run.py: {says}") and said.count("\n") == 1
