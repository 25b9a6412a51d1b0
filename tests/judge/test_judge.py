"""The judge stage: every kind of judge, built and measured by the program that containers run."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoTokenizer

from components.judge.__main__ import main
from components.judge.panel import link_files
from components.rlhf.artifacts.directory import open_artifact
from components.rlhf.artifacts.manifest import write_manifest
from components.rlhf.config.judge import JudgeStageConfig
from components.rlhf.config.model import ModelConfig
from components.rlhf.config.storage import StorageConfig
from components.rlhf.data.datasets import save_dataset
from components.rlhf.data.records import PreferencePair, RatedText
from components.rlhf.rewards.judges import JUDGES, JudgeResources, open_judge, read_judges
from components.rlhf.text.errors import InputError
from tests.support.judge_server import JudgeServer, prefers, refusal
from tests.support.ppo_runs import completion, make_reward_model

LENGTH = "def score(prompts, responses):\n    return [len(r) for r in responses]"
LINEAR: dict[str, Any] = {"kind": "linear"}
FUNCTION = {"kind": "function", "function": "mine:score", "source": LENGTH}


def pairs_of(number: int, *, start: int = 0) -> list[PreferencePair]:
    """The better answer is longer, and contains a good word."""
    return [
        PreferencePair(prompt=f"question {i} ", chosen=f"a good answer {i} indeed", rejected=f"a bad one {i}")
        for i in range(start, start + number)
    ]


def coin_pairs(number: int) -> list[PreferencePair]:
    """Answers of random words, of which a coin chose one."""
    rng = random.Random(0)
    texts = [
        " ".join(rng.choices(["some", "words", "without", "any", "meaning", "at", "all"], k=6))
        for _ in range(2 * number)
    ]
    return [
        PreferencePair(prompt=f"question {i} ", chosen=f"{texts[2 * i]} {i}", rejected=f"{texts[2 * i + 1]} {i}")
        for i in range(number)
    ]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    shutil.copy(tiny_model / "config.json", folder)
    write_manifest(folder, kind="tokenizer", settings="{}", parents={}, facts={})
    return folder


@pytest.fixture(scope="module")
def reward_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_reward_model(tiny_model, tmp_path_factory.mktemp("reward") / "model")
    write_manifest(
        folder, kind="reward_model", settings="{}", parents={}, facts={}, tokenizer_digest="t", chat_template_digest="c"
    )
    return folder


class Stage:
    """Runs the stage on pairs, in a folder."""

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.judge = folder / "judge"

    def run(
        self,
        judge: Any,
        *options: str,
        train: list[PreferencePair] | None = None,
        heldout: list[PreferencePair] | None = None,
        ratings: list[RatedText] | None = None,
        seed: int = 0,
    ) -> Result:
        data = self.folder / "preferences"
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir(parents=True)
        splits = {
            "train": pairs_of(40) if train is None else train,
            "ratings": ratings or [],
            "heldout": pairs_of(30, start=100) if heldout is None else heldout,
        }
        save_dataset(data, splits, max_tokens=64, counts={})
        write_manifest(data, kind="preferences", settings="{}", parents={}, facts={})
        config = JudgeStageConfig.model_validate({"model": ModelConfig(precision="fp32"), "judge": judge, "seed": seed})
        storage = StorageConfig(answers_uri=str(self.folder / "answers")).canonical_json()
        arguments = ["--preferences", data, "--tokenizer", self.tokenizer, "--judge", self.judge]
        arguments += ["--metrics", self.folder / "metrics.json", "--summary", self.folder / "summary.md"]
        arguments += ["--settings", config.canonical_json(), "--storage", storage, "--tracking", '{"enabled": false}']
        return CliRunner().invoke(main, [*map(str, arguments), *options])

    @property
    def metrics(self) -> dict[str, float]:
        found: dict[str, float] = json.loads((self.folder / "metrics.json").read_text())
        return found

    @property
    def summary(self) -> str:
        return (self.folder / "summary.md").read_text()


@pytest.fixture
def stage(tmp_path: Path, tokenizer: Path) -> Stage:
    return Stage(tmp_path, tokenizer)


def resources(stage: Stage) -> JudgeResources:
    storage = StorageConfig(answers_uri=str(stage.folder / "answers"))
    return JudgeResources(precision="fp32", storage=storage, log=lambda line: None)


def reopen(stage: Stage) -> list[Any]:
    return [open_judge(entry, stage.judge, resources(stage)) for entry in read_judges(stage.judge)]


# --- kinds ---


def test_linear_judge_of_pairs(stage: Stage) -> None:
    result = stage.run(LINEAR)
    assert result.exit_code == 0, result.stderr
    assert stage.metrics["heldout_accuracy"] == 1.0
    assert (stage.metrics["num_training_pairs"], stage.metrics["num_heldout_pairs"]) == (40, 30)
    assert "chosen by the accuracy on the pairs of a fifth of its training data: words 1.000" in stage.summary
    assert "`good`" in stage.summary and "`bad`" in stage.summary
    [judge] = reopen(stage)
    good, bad = judge.scorer.score([completion([1], [2], prompt="x"), completion([1], [2], prompt="y")])
    assert torch.isfinite(good) and torch.isfinite(bad)


def test_linear_judge_takes_ratings_if_there_are_any(stage: Stage) -> None:
    ratings = [
        RatedText(prompt=pair.prompt, completion=text, rating=rating)
        for pair in pairs_of(40)
        for text, rating in ((pair.chosen, 1.0), (pair.rejected, 5.0))  # the opposite of the pairs
    ]
    assert stage.run(LINEAR, ratings=ratings).exit_code == 0
    assert stage.metrics["heldout_accuracy"] == 0.0
    assert (stage.metrics["num_training_pairs"], stage.metrics["num_ratings"]) == (0, 80)
    assert "rank correlation with the ratings" in stage.summary


def test_function_judge(stage: Stage) -> None:
    assert stage.run(FUNCTION).exit_code == 0
    assert stage.metrics["heldout_accuracy"] == 1.0
    assert not (stage.judge / "function").exists()
    [judge] = reopen(stage)
    assert judge.scorer is not None and judge.entry.settings.title == "function"


def test_reward_model_judge_is_saved_with_its_weights(stage: Stage, reward_model: Path) -> None:
    result = stage.run({"kind": "reward_model"}, "--reward-model", str(reward_model))
    assert result.exit_code == 0, result.stderr
    manifest = open_artifact(stage.judge, "judge")
    assert (manifest.tokenizer_digest, manifest.chat_template_digest) == ("t", "c")
    assert set(manifest.parents) == {"tokenizer", "preferences", "reward_model"}
    assert not (stage.judge / "reward_model" / "manifest.json").exists()
    [judge] = reopen(stage)
    texts = [completion([5, 6], [7, 8]), completion([5, 6], [9])]
    assert torch.equal(judge.scorer.score(texts), resources(stage).load_reward_scorer(reward_model).score(texts))


def test_reward_model_judge_needs_its_model(stage: Stage) -> None:
    result = stage.run({"kind": "reward_model"})
    assert result.exit_code == 1
    assert "error: The judge is a reward model, but --reward-model is missing" in result.stderr
    assert not stage.judge.exists()


def test_endpoint_judge(stage: Stage) -> None:
    with JudgeServer(prefers(len)) as server:
        config = {"kind": "endpoint", "url": server.url, "model": "stub", "num_pairs": 12, "input_price": 1.0}
        result = stage.run(config)
        assert result.exit_code == 0, result.stderr
        assert len(server.requests) == 24
        assert stage.run(config).exit_code == 0
        assert len(server.requests) == 24  # a rerun asks nothing
    assert stage.metrics["heldout_accuracy"] == stage.metrics["consistency"] == 1.0
    assert (stage.metrics["num_heldout_pairs"], stage.metrics["cached"], stage.metrics["cost"]) == (12, 24, 0)
    [judge] = reopen(stage)
    assert judge.scorer is None


def test_panel_measures_all_judges_on_the_same_pairs(stage: Stage, reward_model: Path) -> None:
    with JudgeServer(prefers(len)) as server:
        endpoint = {"kind": "endpoint", "url": server.url, "model": "stub", "num_pairs": 7, "name": "gpt"}
        panel = [LINEAR, {"kind": "reward_model", "name": "second"}, FUNCTION, endpoint]
        result = stage.run(panel, "--reward-model", str(reward_model))
        asked = {body["messages"][1]["content"].split("\n")[1] for body in server.requests}
    assert result.exit_code == 0, result.stderr
    assert [entry.settings.title for entry in read_judges(stage.judge)] == ["linear", "second", "function", "gpt"]
    assert stage.metrics["heldout_accuracy"] == stage.metrics["gpt/heldout_accuracy"] == 1.0
    assert {f"question {i} " for i in range(100, 130)} > asked and len(asked) == 7
    rows = [line for line in stage.summary.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:]] == ["| linear", "| second", "| function", "| gpt"]
    assert sorted(path.name for path in stage.judge.iterdir()) == [JUDGES, "linear", "manifest.json", "second"]


def test_same_seed_gives_the_same_artifact(stage: Stage) -> None:
    digests = []
    for seed in (1, 1, 2):
        assert stage.run(LINEAR, seed=seed, train=coin_pairs(60), heldout=coin_pairs(40)).exit_code == 0
        digests.append({name: entry.sha256 for name, entry in open_artifact(stage.judge, "judge").files.items()})
    assert digests[0] == digests[1]


# --- judges that cannot tell ---


def test_judge_of_meaningless_pairs_cannot_tell(stage: Stage) -> None:
    result = stage.run(LINEAR, train=coin_pairs(80), heldout=coin_pairs(160)[80:])
    assert result.exit_code == 0
    assert "judge linear cannot tell, because its agreement with people, " in result.stderr
    assert "is not above chance; the gate gives no verdict by it" in result.stderr
    assert "**linear cannot tell**" in stage.summary
    [entry] = read_judges(stage.judge)
    assert entry.agreement and entry.agreement.low <= 0.5 and entry.cannot_tell


@pytest.mark.parametrize("number", [1, 3, 5])
def test_judge_of_few_held_out_pairs_cannot_tell(stage: Stage, number: int) -> None:
    """Right on all of 5 pairs is no proof: the interval of 5 of 5 starts at 0.478."""
    assert stage.run(LINEAR, heldout=pairs_of(number, start=100)).exit_code == 0
    [entry] = read_judges(stage.judge)
    assert entry.agreement and entry.agreement.accuracy == 1.0
    assert f"on {number} held-out human pairs, is not above chance" in entry.cannot_tell


def test_judge_trained_on_too_little(stage: Stage) -> None:
    assert stage.run(LINEAR, train=[PreferencePair(prompt="", chosen="x", rejected="y")]).exit_code == 0
    [entry] = read_judges(stage.judge)
    assert entry.agreement and entry.agreement.accuracy == 0.5  # it knows none of the words: all ties
    assert entry.cannot_tell


def test_endpoint_that_answers_nothing_readable_cannot_tell(stage: Stage) -> None:
    with JudgeServer(lambda *_: "hmm") as server:
        result = stage.run({"kind": "endpoint", "url": server.url, "model": "stub"})
    assert result.exit_code == 0
    assert "judge endpoint cannot tell, because it answered none of the held-out human pairs" in result.stderr
    assert stage.metrics["num_unanswered"] == 30 and stage.metrics["unreadable"] == 60
    assert "heldout_accuracy" not in stage.metrics


# --- failures ---


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({**FUNCTION, "source": "def score(p, r):\n    return [0.0]"}, "returned 1 scores for 60 responses"),
        ({"kind": "endpoint", "url": "http://localhost:1/v1", "model": "m", "max_retries": 0}, "cannot be reached"),
    ],
)
def test_failure_is_one_line_and_leaves_nothing(stage: Stage, judge: dict[str, Any], message: str) -> None:
    result = stage.run(judge)
    assert result.exit_code == 1
    assert message in result.stderr and result.stderr.count("error: ") == 1
    assert not stage.judge.exists() and not (stage.folder / "metrics.json").exists()


def test_wrong_key_fails_before_anything_is_written(stage: Stage) -> None:
    with JudgeServer(lambda *_: refusal(401, "no key")) as server:
        endpoint = {"kind": "endpoint", "url": server.url, "model": "stub", "api_key_variable": "OPENAI_API_KEY"}
        result = stage.run([LINEAR, endpoint])
    assert result.exit_code == 1
    assert "set the environment variable OPENAI_API_KEY" in result.stderr
    assert not stage.judge.exists()


# --- the artifact ---


@pytest.mark.parametrize(
    "content",
    [
        "[]", "{}", "[1]", "", "not json", '[{"settings": {"kind": "linear"}}]', '[{"settings": {"kind": "x"}, "agreement": null}]',
        '[{"settings": {"kind": "linear"}, "agreement": null}, {"settings": {"kind": "linear"}, "agreement": null}]',
        '[{"settings": {"kind": "linear"}, "agreement": {"accuracy": 1}}]',
    ],
)  # fmt: skip
def test_damaged_list_of_judges_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / JUDGES).write_text(content)
    with pytest.raises(InputError, match=r"is not a loadable list of judges \(.*\); run the judge stage again"):
        read_judges(tmp_path)


def test_linked_files_are_copies_on_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, linked, copied = tmp_path / "source", tmp_path / "linked", tmp_path / "copied"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "weights").write_text("w")
    (source / "manifest.json").write_text("{}")
    link_files(source, linked)
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("another device")))
    link_files(source, copied)
    for folder in (linked, copied):
        assert [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()] == ["sub/weights"]
        assert (folder / "sub" / "weights").read_text() == "w"
