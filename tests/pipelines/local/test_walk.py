"""Every command of kfp-rlhf as a person uses it, in programs of their own: what it shows, and what it says to a mistake.

One tiny run is made from a file of `init`, in a terminal, and all commands look at it.
"""

import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from components.rlhf.checkpoints.run import mark_run
from components.rlhf.config.storage import StorageConfig
from components.rlhf.storage.store import open_store
from pipelines.__main__ import cli
from tests.support.kfp_api import KfpApi, serving
from tests.support.terminal import Terminal, program
from tests.support.toy_pipeline import write_data

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "pipelines" / "params" / "tiny.yaml"
RUN = "runs/walk"
FEW_STEPS = (
    "model.num_frozen_layers=1", "model.precision=fp32", "data.num_validation_prompts=4", "data.held_out=0.3", "sft.max_steps=2",
    "sft.batch_size=4", "reward_model.max_steps=2", "reward_model.batch_size=4", "reward_model.num_calibration_samples=8",
    "ppo.num_iterations=2", "ppo.rollout.num_prompts=8", "ppo.minibatch=4", "ppo.num_epochs=1", "ppo.eval_every=1",
    "evaluation.num_prompts=8", "evaluation.num_bootstrap=100", "gate.min_win_rate=0", "gate.max_kl=1000", "gate.min_prompts=1",
)  # fmt: skip
SETTINGS = [word for setting in FEW_STEPS for word in ("--set", setting)]


@dataclass(frozen=True)
class Case:
    """A command: arguments with what it must show, and arguments that are a mistake with what it must say."""

    arguments: str
    shown: tuple[str, ...]  # regular expressions
    mistake: str
    said: str
    json: str = ""  # arguments with which it prints JSON
    stdin: str = ""


CASES = {
    "init": Case("--yes --out second.yaml --demonstrations demonstrations.jsonl --preferences preferences.jsonl --prompts prompts.jsonl",
                 (r"film 0 is -> ", "wrote second.yaml", "next: kfp-rlhf data second.yaml"),
                 "--yes --out my.yaml", "my.yaml already exists; choose another --out"),
    "doctor": Case("my.yaml", (r"ok +torch", r"ok +disk", r"ok +inputs"), "missing.yaml", "missing.yaml", json="my.yaml --json"),
    "data": Case("my.yaml --html data.html", ("data.preferences", "60 kept", "film"), "my.yaml --set data.nothing=1", "data.nothing"),
    "check-model": Case("model", ("36,096", r"exact, checked in"), "data.html", "data.html"),
    "plan": Case("my.yaml --json plan.json", ("Memory", "ppo", "fits", "Time and price"), "my.yaml --shape nowhere", "nowhere"),
    "run": Case(f"--resume {RUN}", ("finished earlier, verified", "Promoted: ", "report "), "my.yaml --set ppo.kl_coeff=1", "ppo.kl_coef"),
    "status": Case(RUN, (f"{RUN}: succeeded", "✓ +ppo", "✓ +register"), "runs/none", "--host", json=f"{RUN} --json"),
    "logs": Case(f"{RUN} ppo --tail 3", (r"\[ppo\] memory: ",), f"{RUN} pbo", "its tasks with logs: "),
    "report": Case(f"{RUN} --no-open", (f"{RUN}/report.html",), "my.yaml", "my.yaml contains no run"),
    "ui": Case("--help", ("MLflow UI",), f"{RUN} --port 0", "--port"),
    "compare": Case(f"{RUN} {RUN} --html compare.html", ("Results", "win rate", "Time of each stage"), RUN, "at least two",
                    json=f"{RUN} {RUN} --json"),
    "chat": Case(f"{RUN} --greedy", (r"SFT \(reward [-+]\d", r"PPO \(reward [-+]\d"), "my-model-that-is-not-there", "contains no run",
                 stdin="film 3 is\n"),
    "export": Case(f"{RUN} --to exported", ("exported",), f"{RUN} --to exported/config.json", "exported"),
    "serve": Case(f"{RUN} --print command", ("vllm serve .*--served-model-name my",), f"{RUN} --print kserve", "--uri"),
    "annotate": Case(f"{RUN} --pairs 5 --out pairs", ("wrote [1-5] pairs for Argilla and Label Studio to pairs",),
                     f"{RUN} --page --import answers.jsonl", "give one of both"),
    "approve": Case("--help", ("waits for a person",), f"{RUN} --by Ann --why good", "does not wait for approval"),
    "sweep": Case(f"{TINY} --grid ppo.kl_coef=0.02,0.05 --host http://127.0.0.1:9 --katib katib.yaml --image me/rlhf:1",
                  ("wrote katib.yaml; start the trials with: kubectl create -f katib.yaml",), "my.yaml", "--grid"),
    "compile": Case("my.yaml --out compiled.yaml", ("wrote compiled.yaml",), "my.yaml --format json", "'json' is not one of"),
    "submit": Case(f"{TINY} --dry-run --host HOST --kube-context=", ("would upload rlhf-",), f"{TINY} --host nowhere", "nowhere"),
    "budget": Case("checkpoints/run-walk 20", ("the budget of run-walk is 20",), "checkpoints/run-none 20", "run-none"),
    "dev": Case("settings ppo my.yaml", ('"kl_coef":',), "settings pbo my.yaml", "pbo", json="settings ppo my.yaml"),
}  # fmt: skip


def test_every_command_is_walked_and_has_an_example() -> None:
    assert set(CASES) == set(cli.commands)
    for name, command in cli.commands.items():
        shown = CliRunner().invoke(cli, [name, "--help"], prog_name="kfp-rlhf")
        assert shown.exit_code == 0 and re.search(rf"^ +kfp-rlhf {name}( |$)", shown.output, re.M), name
        assert isinstance(command, click.Group) or command.get_short_help_str(300).endswith("."), name


@dataclass(frozen=True)
class Home:
    """The working directory of a person, with a finished run, and a server of Kubeflow Pipelines."""

    folder: Path
    host: str
    seen: list[str]  # what the terminal showed of the run at its end

    @property
    def env(self) -> dict[str, str]:
        return ENVIRONMENT | {"KUBECONFIG": str(self.folder / "kubeconfig")}

    def run(self, name: str, arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        words = [word.replace("HOST", self.host) for word in arguments.split()]
        return subprocess.run(
            program(name, *words),
            cwd=self.folder,
            env=self.env,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=300,
        )


ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "NO_COLOR": "1",
    "COLUMNS": "100",
    "RLHF_PROGRESS_SECONDS": "0",
    "RLHF_CODE_REVISION": "one",  # also if somebody commits meanwhile
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Home]:
    folder = tmp_path_factory.mktemp("home")
    write_data(folder)
    (folder / "model").symlink_to(tiny_model)
    (folder / "checkpoints").mkdir()
    mark_run(open_store(str(folder / "checkpoints"), StorageConfig(), print), "walk")
    questions = ("model", "demonstrations.jsonl", "preferences.jsonl", "prompts.jsonl", "cpu", "30", "6")
    with Terminal(program("init"), cwd=folder, env=ENVIRONMENT) as terminal:
        for answer in questions:
            terminal.wait_for("]: ")
            terminal.type(f"{answer}\n")
        assert terminal.wait() == 0, terminal.screen.lines
    assert "film 0 is -> " in "\n".join(terminal.screen.lines)
    command = program("run", "my.yaml", "--out", RUN, *SETTINGS)
    with Terminal(command, cwd=folder, env=ENVIRONMENT) as terminal:
        terminal.wait_for("1 of 9 done")
        assert terminal.wait(timeout=600) == 0, terminal.screen.lines
    with serving(KfpApi()) as host:
        yield Home(folder, host, terminal.screen.lines)


@pytest.mark.slow
def test_run_shows_its_stages_once_and_its_result(home: Home) -> None:
    stages = [line for line in home.seen if re.match(r"[✓…·✗] ", line)]
    assert [line.split()[1] for line in stages[-2:]] == ["register", "notify"] and len(stages) == 9
    assert [line for line in stages if not re.match(r"✓  \w+ +\d:\d\d  \S", line)] == []
    assert sum("PPO against SFT on 8 held-out prompts" in line for line in home.seen) == 1
    assert any(line.startswith("Promoted: ") for line in home.seen)
    assert not any("of 9 done" in line for line in home.seen)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != "ui"])
def test_command_shows_what_a_person_needs(home: Home, name: str) -> None:
    case = CASES[name]
    result = home.run(name, case.arguments, case.stdin)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stdout + result.stderr
    for pattern in case.shown:
        assert re.search(pattern, result.stdout), result.stdout
    if case.json:
        assert json.loads(home.run(name, case.json).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_mistake_is_one_sentence(home: Home, name: str) -> None:
    case = CASES[name]
    result = home.run(name, case.mistake)
    assert (result.returncode in (1, 2), result.stdout) == (True, ""), result
    assert "Traceback" not in result.stderr
    error = [line for line in result.stderr.splitlines() if line.lower().startswith("error: ")]
    assert len(error) == 1 and case.said in error[0], result.stderr
    usage = result.stderr.splitlines()[:-1]  # that of click, before the sentence
    assert all(re.match(r"Usage: |Try |$", line) for line in usage), result.stderr


@pytest.mark.slow
def test_files_that_commands_wrote(home: Home) -> None:
    assert json.loads((home.folder / "plan.json").read_text())
    for page in ("data.html", "compare.html"):
        assert (home.folder / page).read_text().lower().startswith("<!doctype html")
    assert (home.folder / "exported" / "config.json").is_file()


@pytest.mark.slow
def test_ui_is_at_the_runs_of_the_experiment_and_ends_with_ctrl_c(home: Home) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with Terminal(program("ui", RUN, "--port", port, "--no-open"), cwd=home.folder, env=home.env) as terminal:
        terminal.wait_for(f"MLflow is at http://127.0.0.1:{port}/#/experiments/1/runs?workflowType=machine_learning")
        terminal.wait_for("Press Ctrl-C")
        terminal.type("\x03")
        assert terminal.wait(timeout=60) == 0
