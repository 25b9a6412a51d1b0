"""The trainer image, built step by step and run: alone, locked down, and as tasks of the DAG under kfp's DockerRunner."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl, local

from components.import_model.component import import_model
from components.prepare_data.component import prepare_data
from components.rlhf.config.import_model import ImportModelStageConfig
from components.rlhf.config.params import Params
from components.rlhf.config.prepare_data import PrepareDataStageConfig
from components.rlhf.config.sft import SftStageConfig
from components.sft.component import sft
from tests.support.podman import (
    missing,
    podman,
    podman_service,
    true_exit_codes,
)
from tests.support.tiny_model import make_tiny_model
from tests.support.toy_pipeline import toy_params, write_data

pytestmark = [
    pytest.mark.containers,
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"NO IMAGE WAS BUILT OR RUN: {missing()}"),
]
LOCKED_DOWN = ("--read-only", "--tmpfs=/tmp", "--user=1000:1000", "--cap-drop=all", "--security-opt=no-new-privileges")


def run(image: str, *arguments: str, options: tuple[str, ...] = ()) -> Any:
    return podman("run", "--rm", "--network=none", *options, image, *arguments, check=False)


def test_image_labels(trainer: str) -> None:
    inspected = json.loads(podman("image", "inspect", trainer).stdout)[0]
    config = inspected["Config"]
    assert not config.get("Entrypoint") and config["User"] == "1000:1000"
    if "test-" in trainer:
        assert config["Labels"]["org.opencontainers.image.revision"] == "0123abc"
        assert config["Labels"]["org.opencontainers.image.version"] == "9.8.7"
        assert "RLHF_CODE_REVISION=0123abc" in config["Env"]


@pytest.mark.parametrize("package", ["kfp", "vllm", "pipelines"])
def test_image_contains_no_development_files(trainer: str, package: str) -> None:
    done = run(trainer, "python", "-c", f"import {package}")
    assert done.returncode == 1
    assert f"ModuleNotFoundError: No module named '{package}'" in done.stderr


def test_image_contains_no_compiler_and_no_build_secret(trainer: str) -> None:
    script = "for p in cc gcc g++ clang make uv; do command -v $p && exit 7; done; ls /run/secrets /etc/pip.conf /etc/uv /wheels /build"
    done = run(trainer, "sh", "-c", script)
    assert done.returncode == 2 and done.stdout.strip() in ("", "/run/secrets:"), done.stdout


def test_tmp_is_empty_and_writable_by_all_users(trainer: str) -> None:
    assert run(trainer, "sh", "-c", "stat -c %a /tmp; ls -A /tmp").stdout == "1777\n"


def test_torch_can_compile_locked_down(trainer: str) -> None:
    """transformers creates its cache at import; if that fails, loading a model fails with an unrelated error."""
    done = run(trainer, "python", "-c", "import torch._dynamo", options=LOCKED_DOWN)
    assert done.returncode == 0, done.stderr


def test_self_test_passes_without_privileges(trainer: str) -> None:
    done = run(trainer, "python", "/opt/selftest/selftest.py", "trainer", options=LOCKED_DOWN)
    assert done.returncode == 0, done.stderr
    assert run(trainer, "touch", "/opt/app/x", options=LOCKED_DOWN).returncode == 1


def test_self_test_detects_a_forbidden_package(trainer: str, tmp_path: Path) -> None:
    (tmp_path / "kfp.py").write_text("")
    tmp_path.chmod(0o755)  # the user of the image differs from the user of this test
    mounted = (f"--volume={tmp_path}:/opt/more:ro", "--env=PYTHONPATH=/opt/app:/opt/more")
    done = run(trainer, "python", "/opt/selftest/selftest.py", "trainer", options=mounted)
    assert done.returncode == 1 and "trainer: kfp must not be installed" in done.stderr


def test_tools_image_has_no_torch(tools: str) -> None:
    inspected = json.loads(podman("image", "inspect", tools).stdout)[0]
    assert inspected["Config"]["User"] == "1000:1000" and inspected["Size"] < 600e6
    assert run(tools, "python", "-c", "import torch").returncode == 1
    for stage in ("register", "notify"):
        shown = run(tools, "python", "-m", f"components.{stage}", "--help", options=LOCKED_DOWN)
        assert shown.returncode == 0 and "--settings" in shown.stdout, shown.stderr
    notify = ("python", "-m", "components.notify", "--status", '{"state": "SUCCEEDED"}', "--settings")
    done = run(tools, *notify, '{"preset": "tiny"}', options=LOCKED_DOWN)
    assert (done.returncode, done.stdout) == (0, "[notify] RLHF run tiny (started manually) succeeded.\n"), done.stderr
    wrong = run(tools, *notify, "{}", options=LOCKED_DOWN)
    assert (wrong.returncode, wrong.stderr) == (1, "error: Settings: preset is missing.\n")


# --- tasks of the DAG ---


def open_to_all(folder: Path) -> None:
    """Local folders belong to another user than the image's. On a cluster KFP's launcher sets the permissions."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o777 if path.is_dir() else 0o666)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A pipeline root, the one folder that DockerRunner mounts, with a tiny model and data in it."""
    tmp_path.chmod(0o755)
    root = tmp_path / "root"
    (root / "inputs").mkdir(parents=True)
    make_tiny_model(root / "inputs" / "model", seed=0)
    write_data(root / "inputs")
    open_to_all(root)
    return root


def pipeline_of(image: str, source: Path, root: Path) -> Any:
    data = {name: root / "inputs" / f"{name}.jsonl" for name in ("demonstrations", "preferences", "prompts")}
    params = Params.model_validate(toy_params(root / "inputs" / "model", data))
    imports = ImportModelStageConfig(kind="base_model", source=str(source))

    @dsl.pipeline(name="containers")
    def containers() -> None:
        base = import_model(settings=imports.canonical_json()).set_container_image(image)
        prepared = prepare_data(
            tokenizer=base.outputs["tokenizer"], settings=params.stage(PrepareDataStageConfig).canonical_json()
        ).set_container_image(image)
        sft(
            base_model=base.outputs["model"],
            demonstrations=prepared.outputs["demonstrations"],
            settings=params.stage(SftStageConfig).canonical_json(),
        ).set_container_image(image)

    return containers


def run_in_containers(
    pipeline: Any, root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[list[int], str]:
    """Exit codes of the containers in order, and what kfp raised, if it did."""
    monkeypatch.setattr(local.config.LocalExecutionConfig, "instance", None)
    before = os.umask(0)  # kfp creates the folders that the image's user writes to
    try:
        with podman_service(tmp_path) as address, true_exit_codes() as codes:
            monkeypatch.setenv("DOCKER_HOST", address)
            runner = local.DockerRunner(read_only=True, tmpfs={"/tmp": ""}, cap_drop=["ALL"], network_mode="none")
            local.init(runner=runner, pipeline_root=str(root), raise_on_error=True)
            try:
                pipeline()
            except RuntimeError as error:
                return codes, str(error)
            return codes, ""
    finally:
        os.umask(before)


def test_three_stages_run_as_containers(
    trainer: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipeline_of(trainer, root / "inputs" / "model", root)
    assert run_in_containers(pipeline, root, monkeypatch, tmp_path) == ([0, 0, 0], "")
    (manifest,) = root.glob("containers-*/sft/model/manifest.json")
    assert json.loads(manifest.read_text())["kind"] == "sft_model"


def test_stage_that_fails_in_its_container_fails_the_pipeline(
    trainer: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pipeline = pipeline_of(trainer, root / "inputs" / "nowhere", root)
    codes, raised = run_in_containers(pipeline, root, monkeypatch, tmp_path)
    assert codes == [1] and "import-model" in raised  # and no later stage was started
    said = capfd.readouterr()
    assert "error: " in said.out + said.err and "nowhere" in said.out + said.err
    assert not list(root.glob("containers-*/prepare-data"))
