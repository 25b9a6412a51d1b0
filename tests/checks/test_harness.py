"""Metrics of samples of lm-evaluation-harness, and a task of one's own where the harness is installed."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from components.checks import harness
from components.checks.harness import measure_tasks, require_harness, values_of
from components.checks.models import Models
from components.rlhf.config.checks import LmEvalCheck
from components.rlhf.text.errors import InputError
from components.rlhf.text.progress import Progress
from tests.support.tiny_model import make_tiny_model

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not INSTALLED, reason="lm-evaluation-harness is not installed (extra evals)")


def results(
    *samples: tuple[int, str, dict[str, Any]],
    higher_is_better: bool | None = True,
    reported: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The results of a task t: number, filter and metrics of each sample."""
    rows = [{"doc_id": n, "filter": name, "metrics": list(metrics), **metrics} for n, name, metrics in samples]
    means: dict[str, Any] = {}
    for name in {row["filter"] for row in rows}:
        values = [row["acc"] for row in rows if row["filter"] == name and "acc" in row]
        if values and all(isinstance(value, float) for value in values):
            means[f"acc,{name}"] = sum(values) / len(values)
    return {
        "samples": {"t": rows},
        "results": {"t": means | (reported or {})},
        "higher_is_better": {"t": {"acc": higher_is_better}},
    }


def test_values_are_those_of_the_samples_in_their_order() -> None:
    found = results((1, "none", {"acc": 0.0, "other": 5.0}), (0, "none", {"acc": 1.0, "other": 5.0}))
    assert values_of(found, "acc") == {"t": {0: 1.0, 1: 0.0}} and list(values_of(found, "acc")["t"]) == [0, 1]


def test_lower_is_better_is_turned_around() -> None:
    found = results((0, "none", {"acc": 0.25}), higher_is_better=False)
    assert values_of(found, "acc") == {"t": {0: -0.25}}


def test_filter_must_be_named_where_there_are_several() -> None:
    found = results((0, "strict", {"acc": 0.0}), (0, "flexible", {"acc": 1.0}))
    assert values_of(found, "acc,strict") == {"t": {0: 0.0}} and values_of(found, "acc,flexible") == {"t": {0: 1.0}}
    for metric in ("acc", "acc,loose"):
        with pytest.raises(InputError, match="with the filters flexible, strict; write acc,FILTER"):
            values_of(found, metric)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (results((0, "none", {"f1": 1.0, "em": 1.0})), r"has no metric acc \(it has em, f1\)"),
        (results((0, "none", {"acc": 1.0}), higher_is_better=None), "does not say whether a higher acc is better"),
        (results((0, "none", {"acc": (1.0, 2)}), reported={"acc,none": 1.0}), "is not a mean over its samples"),
        (results((0, "none", {"acc": 1.0}), reported={"acc,none": 2.7}), "is not a mean over its samples"),
    ],
)
def test_metric_whose_difference_has_no_interval_is_refused(found: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        values_of(found, "acc")


def test_missing_harness_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.checks.harness.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="lm-evaluation-harness is not installed here; install the extra evals"):
        require_harness()


# --- with the harness: two models of which one knows the answers ---

TASK = """
task: parity
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/parity.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    (folder / "tasks").mkdir(parents=True)
    (folder / "tasks" / "parity.yaml").write_text(TASK)
    rows = [{"question": f"Number {n} is", "choices": ["even", "odd"], "answer": n % 2} for n in range(10)]
    (folder / "tasks" / "parity.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def models_of(folder: Path) -> Models:
    paths = [make_tiny_model(folder / name, seed=seed) for seed, name in enumerate(("sft", "policy"))]
    return Models(sft=paths[0], policy=paths[1], dtype=torch.float32, progress=Progress("checks", silent=True))


def check_of(**changes: Any) -> LmEvalCheck:
    return LmEvalCheck(**({"kind": "lm_eval", "tasks": ["parity"], "include_path": "tasks", "max_drop": 0.1} | changes))


@needs_harness
@torch.no_grad()
def test_task_of_ones_own_is_scored_as_by_hand(tmp_path: Path, code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    models = models_of(tmp_path)
    (measured,) = measure_tasks(check_of(), models, code)
    for folder, values in ((models.sft, measured.sft), (models.policy, measured.policy)):
        tokenizer, lm = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
        for n in range(10):
            scores = []
            for choice in (" even", " odd"):  # the harness puts a space between question and choice
                before, after = tokenizer(f"Number {n} is")["input_ids"], tokenizer(choice)["input_ids"]
                logprobs = lm(torch.tensor([before + after])).logits[0].log_softmax(-1)
                scores.append(sum(float(logprobs[len(before) + i - 1, token]) for i, token in enumerate(after)))
            assert values[n] == float(scores[n % 2] > scores[1 - n % 2])
    (limited,) = measure_tasks(check_of(limit=4), models, code)
    assert limited.sft.tolist() == measured.sft[:4].tolist()


@needs_harness
def test_task_without_data_is_a_sentence(tmp_path: Path, code: Path) -> None:
    (code / "tasks" / "parity.jsonl").unlink()
    with pytest.raises(InputError, match="lm-evaluation-harness fails"):
        measure_tasks(check_of(), models_of(tmp_path), code)


@needs_harness
@pytest.mark.slow
def test_unknown_task_is_a_sentence(tmp_path: Path, code: Path) -> None:
    """It is looked for among all tasks of the harness."""
    with pytest.raises(InputError, match="lm-evaluation-harness fails.*nothing_like_it"):
        measure_tasks(check_of(tasks=["nothing_like_it"]), models_of(tmp_path), code)


@pytest.mark.parametrize("path", ["nowhere", "..", "tasks/../.."])
def test_tasks_lie_in_the_folder_of_code(
    tmp_path: Path, code: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "run_harness", lambda *_: pytest.fail("the harness was started"))
    models = Models(sft=tmp_path, policy=tmp_path, dtype=torch.float32, progress=Progress("checks", silent=True))
    for folder in (code, None):
        with pytest.raises(InputError, match="is not a folder in code.path"):
            measure_tasks(check_of(include_path=path), models, folder)
