"""A stage imports what its own work needs, when the work starts, and nothing that takes time before.

The tests look at what is loaded in a fresh process, not at the time that it takes.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from components.rlhf.config.params import Params
from pipelines.settings import settings_of_stage
from tests.support.toy_pipeline import toy_params

ROOT = Path(__file__).resolve().parents[1]
STAGES = sorted(path.parent.name for path in ROOT.glob("components/*/__main__.py"))
HEAVY = (
    "accelerate", "alembic", "bitsandbytes", "boto3", "botocore", "datasets", "datasketch", "deepspeed", "fastapi",
    "huggingface_hub", "jinja2", "kfp", "kubernetes", "matplotlib", "mlflow", "numpy", "pandas", "peft", "pyarrow", "requests",
    "rich", "safetensors", "scipy", "sklearn", "sqlalchemy", "sympy", "tokenizers", "torch", "transformers", "vllm",
)  # fmt: skip
# Of a stage that runs with its default settings, without S3; transformers itself loads boto3 where accelerate is installed.
NEVER_BY_STAGES = {"bitsandbytes", "datasets", "deepspeed", "kfp", "mlflow", "pandas", "peft", "sklearn", "vllm"}
USE_MLFLOW = {"register", "notify"}
DATA = ("demonstrations", "preferences", "prompts")
# In place of the process that talks to MLflow: answers every request.
ANSWER = "import json, sys\nfor line in sys.stdin: print(json.loads(line)['number'], flush=True)"


def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-c", f"HEAVY = {HEAVY!r}\n{code}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)


def test_options_of_every_stage_are_shown_without_heavy_packages() -> None:
    code = """
import runpy, sys
for stage in sys.argv[1:]:
    sys.argv = [stage, "--help"]
    try:
        runpy.run_module(f"components.{stage}", run_name="__main__")
    except SystemExit as end:
        assert not end.code, f"{stage} ends with {end.code}"
    heavy = set(HEAVY) & set(sys.modules)
    assert not heavy, f"{stage} loads {sorted(heavy)}"
"""
    done = run(code, *STAGES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: ") == len(STAGES)


def settings() -> Mapping[str, str]:
    """The settings of every stage that is tracked by the frame, as the pipeline passes them."""
    params = Params.model_validate(toy_params(Path("/model"), {name: Path(f"/{name}.jsonl") for name in DATA}))
    tracked = [stage for stage in STAGES if stage not in ("notify", "register")]
    return {stage: settings_of_stage(params, stage) for stage in tracked} | {"register": '{"decision":"promote"}'}


def test_frame_of_a_stage_loads_no_heavy_packages_before_the_work_starts(tmp_path: Path) -> None:
    """With tracking, checkpoints and a place to publish, each stage is run as a program up to its own function."""
    code = """
import contextlib, importlib, json, sys
from components.rlhf.runtime import stage as frame
from components.rlhf.tracking import process

class Stop(BaseException):
    pass

real_run, started = frame.stage_run, []
process.COMMAND = (sys.executable, "-S", "-c", sys.argv[4])

@contextlib.contextmanager
def stage_run(name, *arguments, **options):
    options["uses_mlflow"] = False  # register uses it in its own function, and tracks there
    with real_run(name, *arguments, **options) as run:
        run.tracker.log({"loss": 1.0}, 0)
        run.tracker.flush()
        started.append(name)
        raise Stop  # before the function of the stage
        yield

frame.stage_run = stage_run
tracking, storage = sys.argv[1:3]
stages = json.loads(sys.argv[3])
for name, settings in stages.items():
    main = importlib.import_module(f"components.{name}.__main__").main
    options = ["--settings", settings, "--tracking", tracking, "--storage", storage]
    for option in main.params:
        if option.required and option.name != "settings":
            options += [option.opts[0], f"/none/{option.name}"]
    with contextlib.suppress(Stop):
        main(options, standalone_mode=False)
    heavy = set(HEAVY) & set(sys.modules)
    assert not heavy, f"{name} loads {sorted(heavy)}"
assert started == list(stages), started
"""
    tracking = {"uri": "http://mlflow"}
    storage = {"checkpoint_uri": "s3://bucket/checkpoints", "publish_uri": "s3://bucket/models"}
    done = run(code, json.dumps(tracking), json.dumps(storage), json.dumps(settings()), ANSWER)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("uses_mlflow", [False, True], ids=["without MLflow", "with MLflow"])
def test_modules_of_a_stage_load_only_what_most_runs_need(uses_mlflow: bool) -> None:
    """Everything that the functions of the stages import at their start, in one process."""
    code = """
import importlib, sys
never = set(sys.argv[1].split())
for name in sys.argv[2:]:
    importlib.import_module(name)
    found = never & set(sys.modules)
    assert not found, f"{name} loads {sorted(found)}"
"""
    never = {"torch", "transformers"} if uses_mlflow else NEVER_BY_STAGES
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for stage in STAGES
        if (stage in USE_MLFLOW) == uses_mlflow
        for path in sorted(ROOT.glob(f"components/{stage}/*.py"))
        if path.name not in ("__init__.py", "__main__.py", "component.py")
    ]
    done = run(code, " ".join(never), *modules)
    assert done.returncode == 0, done.stderr
