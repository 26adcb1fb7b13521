"""lm-evaluation-harness with our models: its tasks by name, and tasks of our own whose files are on this machine.

The harness is optional: `pip install "lm_eval~=0.4.13"`. Its command line with our models is this module:

    python -m alignx_jax.evaluation.measure.harness --model alignx_jax --tasks arc_easy \\
      --model_args pretrained=FOLDER,mesh=8x1
"""

from __future__ import annotations

import collections
import difflib
import functools
import json
import pathlib
import re
import string
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import yaml
from jax.sharding import Mesh

from alignx_jax.data.text_files import lines
from alignx_jax.data.tokenizer import Tokenizer
from alignx_jax.evaluation.measure import scoring
from alignx_jax.exits import UserError
from alignx_jax.models.decoder import Decoder

PREFIX = "alignx_"
"""Our tasks are `alignx_<set>_<language>`, and `alignx_<set>` is all languages of a set."""


class Score(NamedTuple):
    value: float
    stderr: float | None
    """Standard error; None where the harness gives none."""
    higher_is_better: bool | None
    """None where the harness does not know."""


class Tasks(NamedTuple):
    """What the harness measures of a model."""

    scores: dict[str, dict[str, Score]]
    """By task and `metric,filter`; a group of tasks is there beside its members."""
    groups: dict[str, list[str]]
    """Members of each group."""
    max_length: int
    """Most tokens of a request."""
    cut: dict[str, list[int]]
    """Of each task how many requests lost their beginning, as they were longer, and how many there were."""


def evaluate_tasks(
    decoder: Decoder,
    tokenizer: Tokenizer,
    folder: pathlib.Path,
    mesh: Mesh,
    tasks: Sequence[str],
    *,
    data: str | None,
    limit: int | None,
    rows: int,
    dtype: jnp.dtype,
    progress: scoring.Progress | None = None,
) -> Tasks:
    """Runs tasks of the harness, with requests as long as the model's context, of 2,048 tokens at most.

    Args:
      folder: the model's Hugging Face folder: its configuration and tokenizer.
      tasks: names of the harness's tasks and of ours.
      data: folder of the files that our tasks read.
      limit: most items a task.
      rows, dtype, progress: as of `scoring.log_likelihoods`.

    Raises:
      UserError: as `load_tasks`; a task that asks for more tokens than a request can have.
    """
    loaded = load_tasks(tuple(tasks), data)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from alignx_jax.evaluation.measure.harness_model import AlignXLM

    model = AlignXLM(decoder, tokenizer, folder, mesh, rows=rows, dtype=dtype, progress=progress)
    found = simple_evaluate(
        model, tasks=loaded, limit=limit, log_samples=False, task_manager=TaskManager(include_defaults=False)
    )
    better = found["higher_is_better"]
    scores = {name: _scores(of, better.get(name, {})) for name, of in found["results"].items()}
    groups = {name: list(members) for name, members in found["group_subtasks"].items()}
    cut = {name: [model.cut[name], of] for name, of in model.requests.items()}
    return Tasks(scores, groups, model.max_length, cut)


def _scores(results: dict[str, Any], higher_is_better: dict[str, bool | None]) -> dict[str, Score]:
    scores = {}
    for key, value in results.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = results.get(f"{metric}_stderr,{kind}")
            error = float(stderr) if isinstance(stderr, float) else None
            scores[key] = Score(float(value), error, higher_is_better.get(metric))
    return scores


@functools.cache
def load_tasks(names: tuple[str, ...], data: str | None) -> list:
    """The tasks and groups of these names, objects of the harness with their items read; they serve every model.

    Raises:
      UserError: the harness is not installed, no such task, no files for one of ours, an item that is no JSON object,
        a task that cannot be loaded (most of the harness's fetch their items from the Hugging Face Hub), or one that is
        named twice.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(
            '--evaluation.tasks needs lm-evaluation-harness; pip install "lm_eval~=0.4.13", or leave it out'
        ) from None
    ours = _ours()
    manager = TaskManager(include_defaults=not ours.keys() >= set(names))  # finding the harness's takes seconds
    loaded = []
    for name in names:
        if name in ours:
            loaded.append(_load_ours(name, ours[name], data))
        elif name in manager.all_tasks:
            loaded += _load_theirs(name, manager)
        else:
            near = difflib.get_close_matches(name, [*ours, *manager.all_tasks], n=1)
            hint = f"; did you mean {near[0]}?" if near else "; `lm_eval ls tasks` lists the harness's"
            raise UserError(f"--evaluation.tasks: no task {name!r}{hint}")
    try:
        manager.load(loaded)
    except ValueError as error:
        raise UserError(f"--evaluation.tasks: {error}; name it once") from None
    return loaded


def _load_theirs(name: str, manager) -> list:
    try:
        found = manager.load([name])
    except Exception as error:  # whatever a task's code and the Hub's client raise
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"--evaluation.tasks: {name} cannot be loaded ({reason}); it may need the Hugging Face Hub, which tasks "
            f"named {PREFIX}... do without"
        ) from error
    inner = {child for children in found["group_map"].values() for child in children}
    return [item for name, item in (found["groups"] | found["tasks"]).items() if name not in inner]


@functools.cache
def _sets() -> dict[str, dict[str, Any]]:
    """Our sets of tasks: what all languages of one share, in the harness's terms, and words of each language."""
    return {
        file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted(scoring.TASKS.glob("*.yaml"))
    }


def _ours() -> dict[str, tuple[str, list[str]]]:
    """Set and languages of each of our tasks and groups."""
    tasks = {}
    for name, about in _sets().items():
        tasks[f"{PREFIX}{name}"] = name, list(about["languages"])
        tasks |= {f"{PREFIX}{name}_{language}": (name, [language]) for language in about["languages"]}
    return tasks


def _load_ours(name: str, of: tuple[str, list[str]], data: str | None):
    from lm_eval.api.group import Group

    members = [_load_language(of[0], language, data) for language in of[1]]
    if not name.endswith(of[0]):
        return members[0]
    metrics = [{"metric": metric, "aggregation": "mean"} for metric in _sets()[of[0]]["metrics"]]
    group = Group.from_config({"group": name, "aggregate_metric_list": metrics})
    for member in members:
        group.add(member)
    return group


def _load_language(name: str, language: str, data: str | None):
    from alignx_jax.evaluation.measure.harness_model import OfflineTask

    config = dict(_sets()[name])
    path, metrics, words = config.pop("file"), config.pop("metrics"), config.pop("languages")[language]
    config["task"], config["test_split"] = f"{PREFIX}{name}_{language}", "test"
    config["metric_list"] = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics]
    if config["output_type"] == "generate_until":
        config["process_results"] = _exact_match_and_f1
    items = [item | words for item in _items(path.format(language=language), data) if item["lang"] == language]
    return OfflineTask(items, config)


def _items(path: str, data: str | None) -> list[dict]:
    if data is None:
        raise UserError(f"--evaluation.tasks-data: give the folder that holds {path}")
    file = pathlib.Path(data).expanduser() / path
    if not file.is_file():
        raise UserError(f"--evaluation.tasks-data={data}: it has no {path}, which the task reads")
    return [_object(line, f"{file}:{number}") for number, line in lines(file) if line.strip()]


def _object(line: bytes, place: str) -> dict:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON in UTF-8 ({error}); each line has to be one item") from None
    if not isinstance(item, dict) or "lang" not in item:
        raise UserError(f"{place}: no JSON object with the field lang; each line has to be one item")
    return item


def _exact_match_and_f1(item: dict, results: list[str]) -> dict[str, float]:
    """SQuAD's metrics (arXiv 1606.05250, section 6.1, evaluate-v1.1.py), the best over the answers.

    Words are what stands between spaces: in Chinese and Thai F1 is hardly more than an exact match.
    """
    scores = [(_words(results[0]) == _words(answer), _f1(results[0], answer)) for answer in item["answers"]]
    exact, f1 = map(max, zip(*scores, strict=True))
    return {"exact_match": float(exact), "f1": f1}


def _words(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(prediction: str, answer: str) -> float:
    found, right = _words(prediction), _words(answer)
    common = (collections.Counter(found) & collections.Counter(right)).total()
    return 2 * common / (len(found) + len(right)) if common else 0.0


def main() -> None:
    """The command line of the harness, which knows no model but its own until it is told."""
    try:
        from lm_eval.__main__ import cli_evaluate

        import alignx_jax.evaluation.measure.harness_model  # noqa: F401  registers the model
    except ImportError:
        sys.exit('lm-evaluation-harness is not installed; pip install "lm_eval~=0.4.13"')
    try:
        cli_evaluate()
    except UserError as error:
        sys.exit(f"alignx_jax: {error}")


if __name__ == "__main__":
    main()
