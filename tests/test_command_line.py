"""The command line: what a command begins with, what a stage takes from its run, and what has to be typed."""

import dataclasses
import pathlib
import re
import shlex

import pytest

from alignx_jax import config_files as configs
from alignx_jax.command_line import parse
from alignx_jax.config import Config, DataConfig, HostsConfig, LoraConfig, TrainingConfig
from alignx_jax.exits import UserError
from alignx_jax.runs import lineage

ROOT = pathlib.Path(__file__).resolve().parent.parent
SAMPLE = configs.load(str(ROOT / "configs" / "sample.py"))
LLAMA = f"--config={ROOT / 'configs' / 'llama3_8b_opus100.py'}"


def refused(*flags: object) -> str:
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        parse([str(flag) for flag in flags])
    return str(error.value)


@pytest.fixture
def saved(tmp_path):
    """A function that saves a configuration as a stage's folder of a run has it."""

    def saved(run: str, stage: str, config: Config) -> pathlib.Path:
        folder = tmp_path / run / stage
        (folder / "huggingface").mkdir(parents=True)
        (folder / "config.json").write_text(configs.to_json(config))
        return folder

    return saved


@pytest.fixture
def trained(saved):
    """A function that makes a stage's folder of a run."""

    def trained(run: str, stage: str, **data) -> pathlib.Path:
        settings = SAMPLE if not data.get("parallel") else Config()
        config = dataclasses.replace(
            settings,
            stage=stage[-1],
            model="a model",
            mesh="8x1",
            run="elsewhere",
            data=dataclasses.replace(settings.data, cache="gone", **data),
            evaluation=dataclasses.replace(SAMPLE.evaluation, limit=7),
            training=dataclasses.replace(SAMPLE.training, compute_dtype="float32"),
        )
        return saved(run, stage, config)

    return trained


def file(folder: pathlib.Path, settings: str) -> str:
    """A configuration of the user's own, as a flag."""
    path = folder / "mine.py"
    path.write_text(f"from alignx_jax.config import *\nconfig = Config({settings})\n")
    return f"--config={path}"


def test_the_folder_of_a_stage_gives_back_what_was_saved(tmp_path):
    config = Config(
        stage="2",
        mesh="2x4x1",
        model="somewhere",
        seed=7,
        data=DataConfig(parallel=("a.tsv", "b"), instructions=("c",), parallel_weights=(0.5, 2.0)),
        objective=dataclasses.replace(Config().objective, negatives="micro-batch"),
    )
    (tmp_path / "config.json").write_text(configs.to_json(config) + "\n")
    for path in (tmp_path, tmp_path / "config.json"):
        assert configs.load(str(path)) == config
        assert parse([f"--config={path}"]) == config
        again = parse([f"--config={path}", "--training.rows=8", "--model=None", "--data.parallel", "c"])
        assert (again.training.rows, again.model, again.data.parallel) == (8, None, ("c",))
        assert again.objective == config.objective and again.export == config.export


def test_the_sample_is_what_nothing_typed_means():
    assert parse([]) == SAMPLE
    assert {SAMPLE.model, SAMPLE.evaluation.sentences, *SAMPLE.data.parallel, *SAMPLE.data.instructions} == {"sample"}
    for stage in ("evaluate", "export"):
        for flags in ([], ["--model=sample"], ["--run=there is none"]):
            base = dataclasses.replace(SAMPLE, stage=stage, model="sample" if "--model=sample" in flags else None)
            assert dataclasses.replace(parse([f"--stage={stage}", *flags]), run=SAMPLE.run) == base


def test_the_sample_takes_no_place_that_is_not_typed():
    data = DataConfig()
    assert (data.parallel, data.instructions, Config().model, Config().evaluation.sentences) == ((), (), None, None)


@pytest.mark.parametrize("stage", ["prepare", "1", "all", "plan"])
@pytest.mark.parametrize(
    "flag", ["--model=models/mine", "--data.parallel=mine.tsv", "--data.instructions=mine.json"], ids=lambda f: f
)
def test_the_samples_settings_are_for_the_sample_alone(stage, flag):
    """They are the default; what is the user's own would be trained with a toy's learning rate."""
    if stage == "plan" and flag.startswith("--model"):
        assert parse([f"--stage={stage}", flag]) == dataclasses.replace(Config(), stage="plan", model="models/mine")
        return
    name = flag.partition("=")[0]
    assert refused(f"--stage={stage}", flag).startswith(f"{name} is given without --config, whose default")
    config = parse([f"--stage={stage}", flag, f"--config={ROOT / 'configs' / 'sample.py'}"])
    assert flag.partition("=")[2] in (config.model, *config.data.parallel, *config.data.instructions)


def test_what_is_the_sample_may_be_typed():
    flags = ["--model=sample", "--data.parallel", "sample", "--data.instructions", "sample"]
    assert parse(flags) == SAMPLE
    assert parse(["--stage=evaluate", "--data.parallel", "my.tsv"]).data.parallel == ("my.tsv",)


def test_a_plan_needs_a_model_or_its_shapes_and_no_data(tmp_path):
    shapes = f"--plan.shapes={ROOT / 'configs' / 'shapes' / 'llama3_8b'}"
    assert parse(["--stage=plan", shapes]).model is None
    # Shapes that are typed go before the model of a configuration.
    assert parse(["--stage=plan", shapes, f"--config={ROOT / 'configs' / 'sample.py'}"]).model is None
    assert parse(["--stage=plan", "--model=a", LLAMA]).model == "a"
    assert refused("--stage=plan", file(tmp_path, "seed=1")).startswith("--model is not given; give a Hugging Face")


ALL = {"model": "'m'", "data": "DataConfig(parallel=('p',), instructions=('i',))"}
ALL["evaluation"] = "EvaluationConfig(sentences='s')"


@pytest.mark.parametrize(
    ("stages", "without", "says"),
    [
        (
            ["1", "prepare", "all", "plan"],
            "model",
            "--model is not given; give a Hugging Face folder, such as --model=",
        ),
        (["1", "prepare", "all", "2"], "parallel=('p',)", "--data.parallel is not given; give parallel text, such as "),
        (["prepare", "all", "2"], "instructions=('i',)", "--data.instructions is not given; give instructions, such "),
        (["evaluate", "all"], "evaluation", "--evaluation.sentences is not given; give multi-way sentences, such as "),
    ],
    ids=["model", "parallel", "instructions", "sentences"],
)
def test_what_a_stage_needs_and_is_not_given(tmp_path, stages, without, says):
    whole = ", ".join(f"{name}={value}" for name, value in ALL.items())
    less = ", ".join(f"{name}={value.replace(without, '')}" for name, value in ALL.items() if name != without)
    less = less.replace("(, ", "(").replace(", )", ")")
    for stage in ("prepare", "1", "2", "all", "plan", "evaluate", "export"):
        assert parse([f"--stage={stage}", file(tmp_path, whole)]).stage == stage
        if stage in stages:
            assert refused(f"--stage={stage}", file(tmp_path, less)).startswith(says)
        else:
            parse([f"--stage={stage}", file(tmp_path, less)])


def test_stage_2_needs_what_its_share_is_drawn_from(tmp_path):
    pairs, answers = (f"data=DataConfig({name}=('x',))" for name in ("parallel", "instructions"))
    parse(["--stage=2", file(tmp_path, pairs), "--data.translation-share=1"])
    parse(["--stage=2", file(tmp_path, answers), "--data.translation-share=0"])
    assert refused("--stage=2", file(tmp_path, pairs)).startswith("--data.instructions is not given")
    assert refused("--stage=2", file(tmp_path, answers)).startswith("--data.parallel is not given")


@pytest.mark.parametrize("name", ["llama2_7b_opus100", "llama3_8b_opus100", "published", "gemma3_270m"])
def test_a_configuration_of_a_model_that_is_not_named(name):
    path = f"--config={ROOT / 'configs' / name}.py"
    assert refused(path).startswith("--model is not given; give a Hugging Face folder")


@pytest.mark.parametrize(
    "flag",
    ["--model=", "--run=", "--config=", "--data.parallel=", "--data.cache= ", "--evaluation.sentences=", "--compare="],
)
@pytest.mark.parametrize("base", [[], [LLAMA, "--model=m"]], ids=["sample", "llama"])
def test_an_empty_text_is_no_value(flag, base):
    name = flag.partition("=")[0]
    assert refused(*base, flag).startswith(f"{name} is empty; give a value, or leave the flag out (a shell variable")


def test_evaluation_needs_sentences_where_the_sample_is_not_what_was_trained(trained, tmp_path):
    trained("mine", "stage1", parallel=("mine.tsv",))
    trained("sample", "stage1")
    trained("sample with answers", "stage2", instructions=("mine.json",))
    for flags in ([f"--run={tmp_path / 'mine'}"], ["--model=a folder"], ["--model=sample", "--compare", "a folder"]):
        assert refused("--stage=evaluate", *flags).startswith("--evaluation.sentences is not given")
        config = parse(["--stage=evaluate", *flags, "--evaluation.sentences=flores200:dev"])
        assert config.evaluation == dataclasses.replace(Config().evaluation, sentences="flores200:dev")
    for run in ("sample", "sample with answers"):
        assert parse(["--stage=evaluate", f"--run={tmp_path / run}"]).evaluation == SAMPLE.evaluation


def test_a_run_is_evaluated_with_what_it_was_trained_with(trained, tmp_path):
    stage_1 = trained("a", "stage1", parallel=("mine.tsv",), template="early.json")
    trained("a", "stage2", parallel=("mine.tsv",), template="late.json", row_length=2048, cutoff=1024)
    ours, sample = trained("b", "stage1", parallel=("b.tsv",)), trained("c", "stage1", template="alpaca", cutoff=99)
    typed = "--evaluation.sentences=mine.jsonl"
    for stage in ("evaluate", "export"):
        found = parse([f"--stage={stage}", f"--run={tmp_path / 'a'}", "--evaluation.rows=8", typed])
        assert (found.data.template, found.data.row_length, found.data.cutoff) == ("late.json", 2048, 1024)
        assert found.training.compute_dtype == "float32"
        # Not what the run has saved.
        assert found.evaluation == dataclasses.replace(Config().evaluation, rows=8, sentences="mine.jsonl")
        assert (found.run, found.model, found.mesh, found.stage) == (str(tmp_path / "a"), None, "1x1", stage)
        assert found.data.cache == Config().data.cache

    def of(*flags):
        return parse(["--stage=evaluate", typed, *map(str, flags)])

    # With --model, --run only names the folder of the report.
    assert of(f"--model={stage_1}", f"--run={tmp_path / 'a'}").data.template == "early.json"
    assert of("--model=sample", "--compare", "a folder", ours, stage_1).data.parallel == ("b.tsv",)
    assert of(f"--run={tmp_path / 'a'}", "--data.template=other.json").data.template == "other.json"
    assert of(f"--run={tmp_path / 'a'}", f"--config={ROOT / 'configs' / 'sample.py'}").data == SAMPLE.data
    # A run on the embedded sample: its sentences are those that the sample's settings are for.
    found = parse(["--stage=evaluate", f"--run={tmp_path / 'c'}"])
    assert (found.data.template, found.data.cutoff, found.evaluation) == ("alpaca", 99, SAMPLE.evaluation)
    assert parse(["--stage=evaluate", f"--model={sample}"]).run == SAMPLE.run


def test_a_model_that_was_not_trained_here_is_evaluated_with_the_defaults():
    for flags in (["--model=a folder"], ["--model=sample", "--compare", "a folder"]):
        found = parse(["--stage=evaluate", "--evaluation.sentences=x", *flags])
        default = dataclasses.replace(Config(), evaluation=dataclasses.replace(Config().evaluation, sentences="x"))
        assert dataclasses.replace(found, stage="1", model=None, compare=()) == default


STAGE_1 = Config(
    mesh="8x1",
    model="models/base",
    run="runs/old",
    seed=3,
    profile="2",
    data=DataConfig(parallel=("a.tsv", "b.tsv"), parallel_weights=(1.0, 2.0), row_length=777, template="mine.json"),
    training=TrainingConfig(rows=24),
    evaluation=dataclasses.replace(Config().evaluation, rows=5),
    hosts=HostsConfig("there:1", 2, 1),
)


def test_stage_2_without_a_configuration_takes_the_settings_of_stage_1(saved, tmp_path):
    saved("run", "stage1", STAGE_1)
    taken: list[str] = []
    flags = ["--stage=2", f"--run={tmp_path / 'run'}", "--data.instructions", "mine.json", "--training.rows=8"]
    config = parse(flags, taken.extend)
    assert config == Config(
        stage="2",
        run=str(tmp_path / "run"),
        seed=3,
        data=dataclasses.replace(STAGE_1.data, instructions=("mine.json",)),
        training=TrainingConfig(rows=8),
    )
    assert set(taken) == {"seed", "data.parallel", "data.parallel_weights", "data.row_length", "data.template"}
    assert refused(*flags[:2]).startswith("--data.instructions is not given")


def test_the_four_commands_of_the_readme(saved, tmp_path, monkeypatch):
    """Of "Your model, your data": the pairs of stage 1 are those of stage 2, though its configuration names others."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Your model, your data")[1]
    block = section.split("```bash")[1].split("```")[0].replace("\\\n", " ").replace("runs/mine", f"{tmp_path}/mine")
    first, second, evaluate, export = (shlex.split(line)[2:] for line in block.strip().splitlines())
    monkeypatch.chdir(ROOT)
    stage_1 = parse([*first, "--data.template=mine.json", "--training.rows=8"])
    pairs = ("/data/opus.de-en", "/data/pairs/", "/data/more.zh-en.tsv")
    assert (stage_1.model, stage_1.data.parallel) == ("/models/Meta-Llama-3-8B", pairs)
    saved("mine", "stage1", stage_1)
    for flags, rows in ((second, 24), ([flag for flag in second if "--config" not in flag], 8)):
        stage_2 = parse(flags)
        assert (stage_2.stage, stage_2.model, stage_2.mesh, stage_2.run) == ("2", None, "8x1", f"{tmp_path}/mine")
        assert stage_2.data == dataclasses.replace(stage_1.data, instructions=("/data/bactrian/",))
        assert stage_2.training == dataclasses.replace(stage_1.training, rows=rows)  # the file's, or of stage 1
    assert parse(evaluate).evaluation.sentences == "/data/flores200/devtest/"
    assert parse(evaluate).data == parse(export).data == stage_1.data


def test_sources_that_are_typed_do_not_take_the_weights_of_others(saved, tmp_path):
    saved("run", "stage1", STAGE_1)
    run = ["--stage=2", f"--run={tmp_path / 'run'}", "--data.instructions", "i", "--data.parallel", "mine.tsv"]
    for flags in (run, [*run, file(tmp_path, "seed=1")]):
        config = parse(flags)
        assert (config.data.parallel, config.data.parallel_weights) == (("mine.tsv",), ())


def test_what_is_typed_is_not_undone_by_what_is_taken(saved, tmp_path):
    """Steps go before epochs, and adapters have settings that are refused without them."""
    lora = LoraConfig(rank=4, alpha=8.0, targets="q_proj")
    saved("run", "stage1", dataclasses.replace(STAGE_1, lora=lora, training=TrainingConfig(steps=7, epochs=1.0)))
    run = ["--stage=2", f"--run={tmp_path / 'run'}", "--data.instructions", "i"]
    config = parse(run)
    assert (config.lora, config.training) == (lora, TrainingConfig(steps=7, epochs=1.0))
    config = parse([*run, "--lora.rank=0", "--training.epochs=3"])
    assert (config.lora, config.training) == (LoraConfig(), TrainingConfig(epochs=3.0))


def test_stage_2_with_a_configuration_takes_what_it_leaves_open_and_the_pairs(saved, tmp_path):
    saved("run", "stage1", STAGE_1)
    settings = "mesh='2x1', model='models/base', training=TrainingConfig(rows=16), evaluation=EvaluationConfig(limit=9)"
    settings += ", data=DataConfig(parallel=('other.tsv',), instructions=('i',), instruction_weights=(3.0,))"
    taken: list[str] = []
    flags = ["--stage=2", f"--run={tmp_path / 'run'}", file(tmp_path, settings)]
    config = parse([*flags, "--data.template=alpaca"], taken.extend)
    assert config == Config(
        stage="2",
        mesh="2x1",
        run=str(tmp_path / "run"),
        model=None,  # the file's is for stage 1
        seed=3,
        data=DataConfig(
            parallel=STAGE_1.data.parallel,
            parallel_weights=(1.0, 2.0),
            row_length=777,
            instructions=("i",),
            instruction_weights=(3.0,),
        ),
        training=TrainingConfig(rows=16),
        evaluation=dataclasses.replace(Config().evaluation, limit=9),
    )
    assert set(taken) == {"seed", "data.parallel", "data.parallel_weights", "data.row_length"}
    assert parse([*flags, "--data.parallel", "typed.tsv"]).data.parallel == ("typed.tsv",)
    assert parse([*flags, "--model=typed"]).model == "typed"


def test_what_stage_2_was_run_with_is_whole(saved, tmp_path):
    """Nothing of stage 1 goes over it: what has its default was meant to have it."""
    saved("run", "stage1", STAGE_1)
    data = DataConfig(parallel=("p",), instructions=("i",))
    stage_2 = Config(stage="2", run=str(tmp_path / "run"), model=str(tmp_path / "run" / "stage1"), data=data)
    saved("run", "stage2", stage_2)
    for path in ("run", "run/stage2"):
        assert parse([f"--config={tmp_path / path}", "--stage=2"]) == stage_2


def test_stage_2_of_a_run_without_stage_1(tmp_path):
    run = f"--run={tmp_path / 'none'}"
    assert parse(["--stage=2", run]) == dataclasses.replace(SAMPLE, stage="2", run=run[6:], model=None)
    says = f"stage 2 starts from stage 1, which {tmp_path / 'none'} does not have"
    assert refused("--stage=2", run, "--data.instructions=mine.json").startswith(says)
    assert refused("--stage=2", run, "--model=m").startswith("--model is given without --config")


def test_the_model_of_a_configuration_is_that_of_its_stage(tmp_path):
    base = file(tmp_path, "model='m', " + ", ".join(f"{name}={ALL[name]}" for name in ("data", "evaluation")))
    models = {stage: parse([base, f"--stage={stage}"]).model for stage in ("prepare", "1", "2", "all", "plan")}
    models |= {stage: parse([base, f"--stage={stage}"]).model for stage in ("evaluate", "export")}
    assert models == dict.fromkeys(("prepare", "1", "all", "plan"), "m") | dict.fromkeys(("2", "evaluate", "export"))
    again = file(tmp_path, "stage='2', model='m', data=DataConfig(parallel=('p',), instructions=('i',))")
    assert parse([again]).model == "m"


def test_the_folder_of_a_run_is_a_base(saved, tmp_path):
    run, mine = tmp_path / "run", dataclasses.replace(STAGE_1, data=DataConfig(parallel=("p",), instructions=("i",)))
    saved("run", "stage1", mine)
    expected = dataclasses.replace(mine, run=str(run), hosts=HostsConfig(), profile=None)
    assert parse([f"--config={run}"]) == expected
    assert parse([f"--config={run}", "--stage=1", "--run=new"]) == dataclasses.replace(expected, run="new")
    stage_2 = parse([f"--config={run}", "--stage=2"])
    assert (stage_2.run, stage_2.model, stage_2.seed) == (str(run), None, 3)
    saved("run", "control", dataclasses.replace(mine, seed=5))
    saved("run", "stage2", dataclasses.replace(mine, stage="2", model=str(run / "stage1"), seed=4))
    assert parse([f"--config={run}", "--stage=2"]).seed == 4
    for stage in ("prepare", "1", "plan"):
        config = parse([f"--config={run}", f"--stage={stage}", "--run=new"])
        assert (config.seed, config.model, config.run) == (3, "models/base", "new")
    # Of the folder of its stage 2 too, stage 1 begins with the model that the run began with, also when it was moved.
    run.rename(tmp_path / "moved")
    for path in (tmp_path / "moved" / "stage2", tmp_path / "moved"):
        assert parse([f"--config={path}", "--stage=1", "--run=new"]).model == "models/base"
        assert parse([f"--config={path}", "--stage=2"]).model == str(run / "stage1"), "no record"
    begun = lineage.Lineage(lineage.Origin("../stage1", "abc"), ())
    (tmp_path / "moved" / "stage2" / lineage.FILE).write_text(lineage.text(begun))
    for path in (tmp_path / "moved" / "stage2" / "config.json", tmp_path / "moved" / "stage2", tmp_path / "moved"):
        assert parse([f"--config={path}", "--stage=2"]).model == f"{tmp_path}/moved/stage1"


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"])
    assert stopped.value.code == 0
    entries, name = {}, None  # of each flag, what follows until the next flag: explanation, then default
    for line in capsys.readouterr().out.splitlines():
        if flag := re.match(r"\W*--([a-z][\w.-]*)[ ,]", line):
            name = flag[1].replace("-", "_")
            entries[name] = ""
        elif name:
            entries[name] += line.strip("│| ")
    assert set(entries) == set(configs.flat(Config()))
    unexplained = [name for name, text in entries.items() if not text.partition("(default:")[0]]
    assert not unexplained, f"no docstring below: {unexplained}"


def test_help_names_ten_flags_first(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    first = capsys.readouterr().out.split("Needed first:\n")[1].split("\n\n")[0]
    names = {name.replace("-", "_") for name in re.findall(r"^ *--([\w.-]+)", first, flags=re.MULTILINE)}
    assert len(names) == 10 and names <= {*configs.flat(Config()), "config"}
