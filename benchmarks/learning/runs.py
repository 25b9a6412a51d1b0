"""The pipeline run of a seed, from whose artifacts both systems start."""

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.record import ROOT
from benchmarks.stages import stages_to_run
from components.rlhf.artifacts.directory import open_artifact
from components.rlhf.config.params import Params
from pipelines.local.summary import find_output
from pipelines.settings import load_params

PARAMS = ROOT / "pipelines" / "params" / "movie_reviews.yaml"
PRESET = "preset=quick"
# What the comparison takes from a run: its stage, output, and the kind of its artifact.
OUTPUTS = {
    "sft_model": ("sft", "model", "sft_model"),
    "reward_model": ("reward-model", "model", "reward_model"),
    "judge": ("judge", "judge", "judge"),
    "prompts": ("prepare-data", "prompts", "prompts"),
    "heldout_prompts": ("prepare-data", "heldout_prompts", "prompts"),
}


@dataclass(frozen=True, kw_only=True)
class Artifacts:
    """Verified folders of one run."""

    run: str  # its name
    folders: dict[str, Path]  # by the names of OUTPUTS
    start: str  # digest of the models that both systems start from


def params_of(seed: int, num_iterations: int | None = None) -> Params:
    """The settings of a seed. PPO validates nothing, because the saved policies are measured afterwards."""
    settings = [PRESET, f"seed={seed}", "ppo.eval_every=0", "ppo.keep=null"]
    settings += [] if num_iterations is None else [f"ppo.num_iterations={num_iterations}"]
    return load_params(PARAMS, settings)


def artifacts_of(seed: int, runs: Path) -> Artifacts:
    """Those of a run of this seed in the folder runs, which is made first if there is none."""
    found = find_run(seed, runs)
    if found is None:
        out = runs / f"quick-{seed}"
        command = [sys.executable, "-m", "pipelines", "run", str(PARAMS), "--out", str(out)]
        if subprocess.run([*command, "--set", PRESET, "--set", f"seed={seed}"], cwd=ROOT).returncode != 0:
            sys.exit(f"the run of seed {seed} failed; see the logs in {out}")
        found = find_run(seed, runs)
        assert found is not None, "the run has just succeeded"
    return found


def find_run(seed: int, runs: Path) -> Artifacts | None:
    """A run with these settings up to PPO whose earlier stages are finished, or None."""
    for file in sorted(runs.glob("*/params.yaml")):
        run = file.parent
        if set(stages_to_run(load_params(file), params_of(seed))) <= {"ppo", "evaluation"}:
            outputs = {name: find_output(run / "artifacts", *where[:2]) for name, where in OUTPUTS.items()}
            folders = {name: folder for name, folder in outputs.items() if folder is not None}
            if len(folders) == len(OUTPUTS):
                digests = {name: open_artifact(folder, OUTPUTS[name][2]).digest for name, folder in folders.items()}
                models = digests["sft_model"] + digests["reward_model"]
                return Artifacts(run=run.name, folders=folders, start=hashlib.sha256(models.encode()).hexdigest()[:16])
    return None
