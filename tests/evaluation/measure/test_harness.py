"""Our model in lm-evaluation-harness against the harness's own `hf` model; our tasks against the harness's own."""

import dataclasses
import gzip
import itertools
import json
import pathlib
import shutil
import sys
import types

import jax.numpy as jnp
import pytest
import tokenizers
import torch
import transformers
from jax.sharding import Mesh
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager, _yaml_loader, manager

from alignx_jax import sharding
from alignx_jax.data import tokenizer
from alignx_jax.evaluation.measure import harness, harness_model, scoring
from alignx_jax.exits import UserError
from alignx_jax.models import generation, huggingface
from alignx_jax.models.decoder import Decoder
from alignx_jax.runs import companions, loading

torch.set_num_threads(1)  # the model is tiny, and JAX's threads want the cores

TASKS = pathlib.Path(manager.__file__).parent
LENGTH = 64
OPTIONS = {"rows": 8, "dtype": jnp.float32}
LONG = "The teacher bought a red book this morning and went to school. " * 6
TEXTS = ["The dog sleeps.", "Der Hund schläft.", "狗在睡觉。", "الكلب نائم.", "one\nline", "Zürich 😀", LONG]
SPACED = ["  two  spaces\n\nand lines ", " a", "<s>The dog"]  # which SentencePiece and transformers write differently


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The sample model as transformers reads it, in `pieces` with tokenizer.model, in `fast` with tokenizer.json."""
    source, folder = loading.find("sample"), tmp_path_factory.mktemp("exported")
    decoder = source.load(sharding.make_mesh("1x1"))
    settings = huggingface.read_config(source.huggingface)
    huggingface.export(decoder, settings, folder / "pieces", jnp.float32, 5e9)
    companions.copy(source.huggingface, folder / "pieces")
    shutil.copytree(folder / "pieces", folder / "fast")
    transformers.AutoTokenizer.from_pretrained(folder / "pieces").save_pretrained(folder / "fast")
    return folder


@pytest.fixture(scope="module")
def theirs(exported):
    """Without its cache, which confuses requests that are the same text cut at different places."""
    return HFLM(
        str(exported / "pieces"), device="cpu", dtype="float32", max_length=LENGTH, batch_size=4, logits_cache=False
    )


@dataclasses.dataclass(frozen=True)
class Ours:
    decoder: Decoder
    encoder: tokenizer.Tokenizer
    folder: pathlib.Path
    mesh: Mesh
    model: harness_model.AlignXLM


@pytest.fixture(scope="module", params=["1x1 pieces", "4x2 fast"])
def ours(request, exported):
    spec, name = request.param.split()
    mesh, folder = sharding.make_mesh(spec), exported / name
    made = huggingface.load(folder, mesh), tokenizer.load(folder), folder, mesh
    return Ours(*made, harness_model.AlignXLM(*made, **OPTIONS, max_length=LENGTH, max_gen_toks=16))


def instances(kind, arguments):
    return [Instance(kind, {}, given, n) for n, given in enumerate(arguments)]


def test_tokens_are_those_of_hf(ours, theirs):
    model, texts = ours.model, TEXTS + SPACED * (ours.folder.name == "fast")
    for text in [*texts, ""]:
        for add in (None, True, False):
            assert model.tok_encode(text, add_special_tokens=add) == theirs.tok_encode(text, add_special_tokens=add)
    assert model.tok_encode("Yes")[0] == model.prefix_token_id == theirs.prefix_token_id
    assert model.eot_token_id == theirs.eot_token_id


class Folder:
    """A byte-level tokenizer in which `ab` is one token, and a model of it that is never asked."""

    def __init__(self, folder, adds_bos=True, template=None):
        made = tokenizers.ByteLevelBPETokenizer()
        made.train_from_iterator(["ab ab ab", "a b c"], vocab_size=300, special_tokens=["<s>", "</s>", "<|im_end|>"])
        if adds_bos:
            made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
        made.save(str(folder / "tokenizer.json"))
        settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
        (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v}))
        (folder / "generation_config.json").write_text("{}")
        self.decoder = types.SimpleNamespace(config=types.SimpleNamespace(max_positions=64))
        self.theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        self.model = harness_model.AlignXLM(self.decoder, tokenizer.load(folder), folder, None, **OPTIONS)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_special_tokens_of_a_request_are_those_of_transformers(tmp_path, adds_bos):
    """BOS where `tokenizer(text)` has it, and what the text itself spells."""
    of = Folder(tmp_path, adds_bos)
    for text in ("ab", "a<|im_end|>", ""):
        assert of.model.tok_encode(text) == of.theirs(text).input_ids
        for add in (True, False):
            assert of.model.tok_encode(text, add_special_tokens=add) == of.theirs.encode(text, add_special_tokens=add)
    assert of.model.tok_encode("<s>ab") == [0, *of.theirs.encode("ab", add_special_tokens=False)]  # once
    assert of.model.prefix_token_id == 0


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_continuation_without_a_token_is_scored_as_what_is_left_of_it(tmp_path, monkeypatch, adds_bos):
    """`ab` is one token, that of the context `a` too: the option `b` would be certain, and always win."""
    of = Folder(tmp_path, adds_bos)
    a, b, ab, space_ab = (of.theirs.encode(text, add_special_tokens=False) for text in ("a", "b", "ab", " ab"))
    assert len(a) == len(b) == len(ab) == 1
    before = [0] if adds_bos else []
    asked = []
    monkeypatch.setattr(of.model, "_scored", lambda requests: asked.extend(requests) or [(0.0, False)] * len(requests))
    of.model.loglikelihood(instances("loglikelihood", [("a", "b"), ("a", " ab"), ("", "b"), ("", "<s>b"), (" ", "ab")]))
    assert asked == [
        ([*before, *a], b),
        ([*before, *a], space_ab),
        ([0], b),
        ([0], b),
        ([0], space_ab),
    ]
    for context in ("a", ""):
        with pytest.raises(UserError, match=r"--evaluation.tasks: an option to score, '', has no token; leave it out"):
            of.model.loglikelihood(instances("loglikelihood", [(context, "")]))


CHATML = """{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}\
{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""


def test_chat_templates_are_those_of_transformers(tmp_path, caplog):
    of = Folder(tmp_path, template=CHATML)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "ab"}]
    options = {"tokenize": False, "add_generation_prompt": True}
    text = of.model.apply_chat_template(talk)
    assert text == of.theirs.apply_chat_template(talk, **options)
    options = {"tokenize": False, "continue_final_message": True}
    begun = of.model.apply_chat_template(talk[:2], add_generation_prompt=False)
    assert begun == of.theirs.apply_chat_template(talk[:2], **options)
    assert of.model.apply_chat_template([{"role": "system", "content": "x"}, *talk]) == text
    assert "system turn, which is left out" in caplog.text
    assert of.model.tok_encode(text, add_special_tokens=False) == of.theirs.encode(text, add_special_tokens=False)
    assert of.model.chat_template(True) == CHATML and of.model.chat_template() is None
    assert 2 in of.model._eos_ids  # which ends a turn, and no generation_config.json says so
    with pytest.raises(UserError, match="--apply_chat_template=tools: the default one is used"):
        of.model.chat_template("tools")
    (tmp_path / "without").mkdir()
    without = Folder(tmp_path / "without").model
    for ask in (lambda: without.chat_template(True), lambda: without.apply_chat_template(talk)):
        with pytest.raises(UserError, match="--apply_chat_template: the model's tokenizer has no chat template"):
            ask()


def test_requests_are_no_longer_than_the_models_context(tmp_path):
    of = Folder(tmp_path)
    with pytest.raises(UserError, match=r"max_length=65, and the model's context is 64; lower it"):
        harness_model.AlignXLM(of.decoder, tokenizer.load(tmp_path), tmp_path, None, **OPTIONS, max_length=65)


def test_loglikelihood_is_that_of_hf(ours, theirs, caplog):
    pairs = [(a, f" {b}") for a, b in itertools.pairwise(TEXTS[:6])]
    pairs += [("", "The dog sleeps."), ("", "狗"), ("The dog ", "sleeps."), ("狗在", "睡觉。"), ("The d", "og")]
    pairs += [(LONG, " and a dog."), ("A", LONG[:90]), ("The cat eats", " fish")]
    requests = instances("loglikelihood", pairs)
    got, expected = ours.model.loglikelihood(requests), theirs.loglikelihood(requests)
    assert "1 of 13 requests are cut to their last 64 tokens" in caplog.text
    assert [g[0] for g in got] == pytest.approx([e[0] for e in expected], abs=1e-4, rel=1e-6)
    assert [g[1] for g in got] == [e[1] for e in expected]


def test_rolling_loglikelihood_is_that_of_hf(ours, theirs):
    requests = instances("loglikelihood_rolling", [(text,) for text in TEXTS])
    assert ours.model.loglikelihood_rolling(requests) == pytest.approx(
        theirs.loglikelihood_rolling(requests), abs=1e-4, rel=1e-6
    )


def test_settings_of_tasks():
    """No length penalty is compared with `hf`, whose criteria for stops end searches that `generate` goes on with."""
    beam = {"do_sample": False, "temperature": 0.0, "num_beams": 3, "length_penalty": 2.0}
    assert harness_model._decoding(beam) == generation.Decoding("beam", beams=3, length_penalty=2.0)
    sample = {"do_sample": True, "temperature": 0.5, "top_k": 7, "top_p": 0.9}
    assert harness_model._decoding(sample) == generation.Decoding("sample", temperature=0.5, top_k=7, top_p=0.9)
    assert harness_model._decoding({"do_sample": False, "temperature": 0.0}) == generation.Decoding()
    with pytest.raises(UserError, match="generation_kwargs ask for typical_p"):
        harness_model._decoding({"do_sample": False, "typical_p": 0.5})


def test_generated_texts_are_those_of_hf(ours, theirs):
    settings = [
        {"until": ["."], "max_gen_toks": 24},
        {"until": [" ", "\n"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 24},
        {"until": [], "max_gen_toks": 24},
        {"until": [], "num_beams": 3, "do_sample": False, "max_gen_toks": 24},
    ]
    requests = instances("generate_until", [(text, dict(s)) for s in settings for text in TEXTS])
    got, expected = ours.model.generate_until(requests), theirs.generate_until(requests)
    assert got == expected
    assert len({len(text) for text in got}) > 5  # they differ, and are cut at their stops


def test_generation_without_a_count_takes_the_models(ours, theirs, monkeypatch):
    monkeypatch.setattr(HFLM, "max_gen_toks", 16)
    requests = instances("generate_until", [("The dog", {"until": "#"}), (LONG, {"until": "#"})])
    assert ours.model.generate_until(requests) == theirs.generate_until(requests)


@pytest.mark.parametrize("ours", ["1x1 pieces"], indirect=True)
def test_generation_that_we_have_not(ours):
    for settings, says in [
        ({"repetition_penalty": 2.0}, "generation_kwargs ask for repetition_penalty"),
        ({"max_gen_toks": 64}, "64 new tokens, and a request has at most 64 with them; leave the task out"),
    ]:
        with pytest.raises(UserError, match=says):
            ours.model.generate_until(instances("generate_until", [("The dog", {"until": ["."], **settings})]))


@pytest.mark.parametrize("ours", ["1x1 pieces"], indirect=True)
def test_sampling_is_seeded(ours):
    requests = instances("generate_until", [("The", {"do_sample": True, "temperature": 3.0, "top_p": 0.9})] * 6)
    got = ours.model.generate_until(requests)
    assert len(set(got)) > 3 and got == ours.model.generate_until(requests)


@pytest.mark.parametrize("ours", ["1x1 pieces"], indirect=True)
@pytest.mark.parametrize("stops", [["\n\n"], ["ab", "ba"], ["b", "ab"]])
def test_no_token_ends_a_text_too_late(ours, stops):
    """`x\\n` `\\n\\n` has its first empty line before the second token."""
    assert ours.model._stop_tokens(stops) == set()


ITEMS = [
    {"premise": "Mbwa amelala.", "choice1": "Amechoka.", "choice2": "Anakula.", "question": "cause", "label": 0},
    {"premise": "Paka anakula.", "choice1": "Ameshiba.", "choice2": "Mvua.", "question": "effect", "label": 0},
    {"premise": "Mwalimu yuko.", "choice1": "Anafundisha.", "choice2": "Analala.", "question": "effect", "label": 1},
]


@pytest.fixture
def data(tmp_path):
    """Files of our tasks, a few items each."""
    (tmp_path / "xcopa").mkdir()
    (tmp_path / "qa").mkdir()
    for code in harness._sets()["xcopa"]["languages"]:
        with gzip.open(tmp_path / "xcopa" / f"{code}.test.jsonl.gz", "wt", encoding="utf-8") as stream:
            stream.writelines(json.dumps(item | {"lang": code}) + "\n" for item in ITEMS)
    with gzip.open(tmp_path / "qa" / "tydiqa.jsonl.gz", "wt", encoding="utf-8") as stream:
        for lang, answer in (("sw", "mbwa"), ("ko", "개"), ("sw", "shule")):
            item = {"lang": lang, "context": "Mbwa yuko.", "question": "Nani?", "answers": [answer, "x"]}
            stream.write(json.dumps(item) + "\n")
    return tmp_path


def compared(ours, names, theirs, data, limit=None):
    """What our function finds, after it was found equal to what the harness's own model gives on the same tasks."""
    heard = []
    found = harness.evaluate_tasks(
        ours.decoder,
        ours.encoder,
        ours.folder,
        ours.mesh,
        names,
        data=str(data),
        limit=limit,
        progress=lambda done, count: heard.append((done, count)),
        **OPTIONS,
    )
    assert heard and all(done <= count for done, count in heard)
    expected = simple_evaluate(
        theirs,
        tasks=harness.load_tasks(tuple(names), str(data)),
        limit=limit,
        log_samples=False,
        task_manager=TaskManager(include_defaults=False),
    )
    got = found.scores
    assert found.max_length == theirs.max_length
    assert set(found.cut) == {name for name in expected["results"] if name != "alignx_xcopa"}
    assert got.keys() == expected["results"].keys() and found.groups == expected["group_subtasks"]
    for name, scores in got.items():
        for metric, score in scores.items():
            about = metric.replace(",", "_stderr,")
            assert score.value == pytest.approx(expected["results"][name][metric], abs=1e-6)
            assert score.stderr == pytest.approx(expected["results"][name][about], abs=1e-6)
            assert score.higher_is_better is expected["higher_is_better"][name][metric.split(",")[0]]
    return found


def test_offline_tasks_end_to_end(ours, theirs, data, monkeypatch):
    monkeypatch.setattr(theirs, "_max_length", 1024)  # the model's context
    found = compared(ours, ["alignx_xcopa", "alignx_tydiqa_sw"], theirs, data)
    got, cut = found.scores, found.cut
    assert cut["alignx_xcopa_sw"] == [0, 6] and cut["alignx_tydiqa_sw"] == [0, 2]
    assert len(got) == 14  # 12 languages, their group, and a task
    assert all(score.higher_is_better is True for scores in got.values() for score in scores.values())
    values = [got[f"alignx_xcopa_{code}"]["acc,none"].value for code in ("sw", "en", "zh")]
    assert all(value in (0, 1 / 3, 2 / 3, 1) for value in values)
    everyone = [scores["acc,none"].value for name, scores in got.items() if name.startswith("alignx_xcopa_")]
    assert got["alignx_xcopa"]["acc,none"].value == pytest.approx(sum(everyone) / 12)
    assert got["alignx_tydiqa_sw"].keys() == {"exact_match,none", "f1,none"}
    (task,) = harness.load_tasks(("alignx_tydiqa_sw",), str(data))
    assert [item["answers"][0] for item in task.test_docs()] == ["mbwa", "shule"]  # the file holds Korean too
    json.dumps(got)


@pytest.mark.parametrize("ours", ["4x2 fast"], indirect=True)
def test_real_items_end_to_end(ours, theirs, shared, monkeypatch):
    monkeypatch.setattr(theirs, "_max_length", 1024)
    data = shared / "data" / "eval"
    names = ["alignx_xcopa_sw", "alignx_xnli_de", "alignx_pawsx_zh", "alignx_exams_tr", "alignx_xquad_en"]
    got = compared(ours, names, theirs, data, limit=8)
    assert got.scores.keys() == set(names)


@pytest.mark.parametrize("ours", ["1x1 pieces"], indirect=True)
def test_requests_are_as_long_as_the_model_and_those_that_are_cut_are_counted(ours, monkeypatch):
    made = ours.decoder, ours.encoder, ours.folder, ours.mesh
    assert harness_model.AlignXLM(*made, **OPTIONS).max_length == 1024
    long = types.SimpleNamespace(config=types.SimpleNamespace(max_positions=8192))
    assert harness_model.AlignXLM(long, *made[1:], **OPTIONS).max_length == 2048

    def asked(kind, task, *arguments):
        return [Instance(kind, {}, given, n, (task, n, 1)) for n, given in enumerate(arguments)]

    model, rows = harness_model.AlignXLM(*made, **OPTIONS, max_length=LENGTH), []
    score = scoring.log_likelihoods
    monkeypatch.setattr(
        scoring,
        "log_likelihoods",
        lambda *args, **options: rows.append(options["row_length"]) or score(*args, **options),
    )
    short, long = ("The dog", " sleeps."), (LONG, " The dog sleeps.")
    model.loglikelihood([*asked("loglikelihood", "a", short, long), *asked("loglikelihood", "b", long, long, short)])
    model.loglikelihood_rolling(asked("loglikelihood_rolling", "c", (LONG,)))
    model.generate_until(asked("generate_until", "d", (LONG, {"until": ["."], "max_gen_toks": 4})))
    assert model.cut == {"a": 1, "b": 2, "d": 1} and model.requests == {"a": 2, "b": 3, "c": 1, "d": 1}
    assert set(rows) == {LENGTH}
    with pytest.raises(UserError, match=r"continuation to score has 1\d\d tokens, and a request at most 64"):
        model.loglikelihood(asked("loglikelihood", "a", ("The", f" {LONG}.")))

    model = harness_model.AlignXLM(*made, **OPTIONS)
    rows.clear()
    model.loglikelihood(asked("loglikelihood", "a", short))
    model.loglikelihood(asked("loglikelihood", "a", (f"{LONG} {LONG} {LONG}", " a")))
    assert rows == [256, 512] and not model.cut  # as long as needed


def asked(task):
    """What a model is asked on the first items of a task."""
    task.build_all_requests(limit=20)
    return [request.args for request in task.instances]


@pytest.mark.parametrize(
    ("name", "file", "languages"),
    [
        ("xcopa", "xcopa/default_{}.yaml", "et ht id it qu sw ta th tr vi zh"),
        ("xnli", "xnli/xnli_{}.yaml", "ar bg de el en es fr hi ru sw th tr ur vi zh"),
        ("pawsx", "paws-x/paws_{}.yaml", "de en es fr ja ko zh"),
        ("xquad", "xquad/xquad_{}.yaml", "ar de el en es hi ru th tr vi zh"),
        ("tydiqa", "tydiqa/tydiqa_goldp_{}.yaml", "ko sw"),
    ],
)
def test_prompts_are_those_of_the_harness(shared, name, file, languages):
    (group,) = harness.load_tasks((f"alignx_{name}",), str(shared / "data" / "eval"))
    answers = name in ("xquad", "tydiqa")  # whose functions want another layout of the items, or are gone
    assert {f"alignx_{name}_{language}" for language in languages.split()} >= set(group.child_names) - {
        "alignx_xcopa_en"
    }
    for language in languages.split():
        task = group.get(f"alignx_{name}_{language}")
        config = _yaml_loader.load_yaml(TASKS / file.format(language), resolve_func=not answers)
        said = {"doc_to_text", "doc_to_choice", "target_delimiter"} | (set() if answers else {"process_docs"})
        config = {field: value for field, value in config.items() if field in said}
        for field in ("task", "output_type", "test_split", "doc_to_target", "generation_kwargs", "metric_list"):
            config[field] = task.get_config(field)
        assert asked(task) == asked(harness_model.OfflineTask(task._items, config)), language


def test_prompt_of_an_examination(shared):
    (task,) = harness.load_tasks(("alignx_exams_vi",), str(shared / "data" / "eval"))
    item, *_ = task.test_docs()
    lines = [item["question"], *(f"{label}. {text}" for label, text in zip("ABCDE", item["choices"], strict=False))]
    context = "\n".join([*(line.strip() for line in lines), "Trả lời:"])
    assert asked(task)[: len(item["choices"])] == [(context, f" {label}") for label in item["labels"]]
    assert task.doc_to_target(item) == "ABCDE".index(item["answer"])


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("the Saxon Garden.", ["Saxon garden"], 1, 1),
        ("in Saxon Garden", ["Saxon Garden"], 0, 0.8),  # precision 2/3, recall 1
        ("in a garden", ["Warsaw", "in Warsaw"], 0, 0.5),
        ("", ["Warsaw"], 0, 0),
    ],
)
def test_exact_match_and_f1(prediction, answers, exact, f1):
    got = harness._exact_match_and_f1({"answers": answers}, [prediction])
    assert got == {"exact_match": exact, "f1": pytest.approx(f1)}


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["alignx_xcopa_ws"], "no task 'alignx_xcopa_ws'; did you mean alignx_xcopa_sw"),
        (["alignx_xnli_sw"], "it has no xnli/sw.dev.jsonl.gz"),
        (["alignx_xcopa", "alignx_xcopa_sw"], "found in both 'alignx_xcopa' and 'alignx_xcopa_sw'; name it once"),
        (["arc_easy"], r"arc_easy cannot be loaded \(Couldn't reach it\); it may need the Hugging Face Hub"),
    ],
)
def test_tasks_that_cannot_be_run(data, monkeypatch, names, says):
    class Offline(TaskManager):
        """The harness's tasks are there, the Hub is not."""

        def __init__(self, include_defaults):
            super().__init__(include_defaults=False)
            self._all_tasks = ["arc_easy"] if include_defaults else []

        def load(self, tasks):
            if tasks == ["arc_easy"]:
                raise ConnectionError("Couldn't reach it\nafter retries")
            return super().load(tasks)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Offline)
    with pytest.raises(UserError, match=says) as raised:
        harness.load_tasks(tuple(names), str(data))
    assert str(raised.value).startswith("--evaluation.tasks") and "\n" not in str(raised.value)


def test_a_group_of_the_harness_is_evaluated_once(monkeypatch):
    group, one, two = object(), object(), object()

    class Known(TaskManager):
        def __init__(self, include_defaults):
            super().__init__(include_defaults=False)
            self._all_tasks = ["pair"]

        def load(self, tasks):
            members = {"one": one, "two": two}
            return {"tasks": members, "groups": {"pair": group}, "group_map": {"pair": list(members)}}

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Known)
    assert harness.load_tasks(("pair",), None) == [group]


def test_bad_files_of_tasks(tmp_path):
    with pytest.raises(UserError, match=r"--evaluation\.tasks-data: give the folder that holds xcopa/sw\.test"):
        harness.load_tasks(("alignx_xcopa_sw",), None)
    (tmp_path / "xcopa").mkdir()
    file = tmp_path / "xcopa" / "sw.test.jsonl.gz"
    good = json.dumps(ITEMS[0] | {"lang": "sw"}).encode() + b"\n"
    for bad, says in (
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "no JSON object"),
        (b"{}", "field lang"),
    ):
        file.write_bytes(gzip.compress(good + bad))
        with pytest.raises(UserError, match=rf"{file}:2: .*{says}"):
            harness.load_tasks(("alignx_xcopa_sw",), str(tmp_path))


def test_without_the_harness(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r'--evaluation\.tasks needs .* pip install "lm_eval~='):
        harness.load_tasks(("arc_easy",), None)


def test_the_command_line_of_the_harness(exported):
    """Its model of our name, from the arguments as they are written there."""
    folder = exported / "pieces"
    made = get_model("alignx_jax").create_from_arg_string(
        f"pretrained={folder},mesh=2x1,rows=4,max_length=32,dtype=float32",
        {"batch_size": 1, "device": None},
    )
    assert isinstance(made, harness_model.AlignXLM)
    ((log_probability, _),) = made.loglikelihood(instances("loglikelihood", [("The dog", " sleeps.")]))
    assert -100 < log_probability < 0
    for arguments, says in [
        ("mesh=2x1", "give pretrained=FOLDER"),
        (f"pretrained={folder},row=4", "unknown 'row'; it can hold pretrained, mesh, rows, max_length"),
        (f"pretrained={folder},mesh=2x1,rows=3", "rows=3 cannot be split"),
    ]:
        with pytest.raises(UserError, match=f"model_args.*{says}"):
            harness_model.AlignXLM.create_from_arg_string(arguments)


def test_errors_on_the_command_line_are_one_sentence(monkeypatch):
    def cli():
        raise UserError("--model_args: give pretrained=FOLDER")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", cli)
    with pytest.raises(SystemExit) as stopped:
        harness.main()
    assert stopped.value.code == "alignx_jax: --model_args: give pretrained=FOLDER"
