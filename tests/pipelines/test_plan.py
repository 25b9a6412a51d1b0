"""kfp-rlhf plan, and the refusal of runs that cannot fit."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from components.rlhf.config.params import Params
from components.rlhf.planner.phases import GIB
from components.rlhf.planner.plan import judge_plan, machine_of, plan_stage, shortfall
from components.rlhf.planner.suggest import changed, suggest
from components.rlhf.text.errors import InputError
from pipelines import plan as planning
from pipelines.local.run import run_pipeline
from pipelines.plan import Options, make_plan, measured_seconds, parse_records, refuse_what_cannot_fit
from pipelines.plan_tables import as_json, as_markdown, grids, notes, print_plan
from pipelines.settings import load_params

ROOT = Path(__file__).resolve().parents[2]
PARAMS = ROOT / "pipelines" / "params"
SHAPES = ROOT / "docs" / "shapes"
SHAPE_OF = {  # of the models that are not on this machine
    "llama3_70b_4node": SHAPES / "llama-3.1-70b.json",
    "llama3_8b_8gpu": SHAPES / "llama-3.1-8b.json",
    "qwen2.5_0.5b_1gpu": SHAPES / "qwen2.5-0.5b.json",
}
TOO_SMALL = {  # a params file, and overrides with which a stage does not fit
    stage: (
        "qwen2.5_0.5b_1gpu",
        f"cluster.profiles.small={{like: gpu-24gb, gpu_memory: {gib}Gi}}",
        f"cluster.stages.{stage}=small",
    )
    for stage, gib in {"sft": 11, "reward_model": 11, "ppo": 18, "dpo": 9}.items()
} | {"evaluation": ("llama3_70b_4node", "evaluation.shard_weights=false")}
TWO_NODES = (
    "cluster.launcher=trainjob",
    "cluster.profiles.nodes={like: gpu-8x80gb, num_nodes: 2}",
    *(f"cluster.stages.{stage}=nodes" for stage in ("sft", "reward_model", "ppo")),
)
TOO_LARGE = ("ppo.training.gradient_checkpointing=false", "ppo.training.microbatch_tokens=32768")


def load(name: str, *overrides: str) -> Params:
    """The params file with a model that is known here."""
    shape = SHAPE_OF.get(name)
    return load_params(PARAMS / f"{name}.yaml", [*overrides, *([f"model.source={shape}"] if shape else [])])


def methods_of(name: str) -> tuple[str, ...]:
    """What can train the policy: without pairs only PPO."""
    return ("ppo",) if name in ("arithmetic", "calculator") else ("ppo", "dpo", "both")


FILES = [(path.stem, method) for path in sorted(PARAMS.glob("*.yaml")) for method in methods_of(path.stem)]


@pytest.mark.parametrize(("name", "method"), FILES)
def test_every_params_file_fits_its_profiles(name: str, method: str) -> None:
    params = load(name, f"policy.method={method}")
    plan = make_plan(params, Options(records={"demonstrations": 1000, "preferences": 1000}))
    assert {stage for stage in ("ppo", "dpo") if stage in plan.stages} == set(params.policy.methods)
    assert {saves.stage for saves in plan.saves} & {"ppo", "dpo"} == set(params.policy.methods)
    assert {stage: verdict.text for stage, verdict in plan.verdicts.items()} == {
        stage: verdict.text for stage, verdict in plan.verdicts.items() if verdict.text in ("fits", "tight")
    }
    assert refuse_what_cannot_fit(params) is None
    assert all(plan.seconds[stage].total > 0 for stage in plan.stages)


def test_what_does_not_fit_is_refused_with_the_number_and_a_setting_that_helps() -> None:
    params = load("llama3_8b_8gpu", *TOO_LARGE)
    with pytest.raises(InputError) as error:
        refuse_what_cannot_fit(params)
    text = str(error.value)
    assert text.startswith("ppo needs ")
    assert "GiB on each GPU (update: activations " in text
    assert "the profile gpu-8x80gb has 79 GiB; set ppo.training.gradient_checkpointing=true, or" in text
    setting = text.partition("; set ")[2].partition(", or set")[0]
    assert refuse_what_cannot_fit(load("llama3_8b_8gpu", *TOO_LARGE, *setting.split(" and "))) is None


@pytest.mark.parametrize("stage", ["reward_model", "ppo", "evaluation"])
def test_share_of_the_gpu_in_which_vllm_cannot_start_is_refused(stage: str) -> None:
    """8.03 billion weights are 15.0 GiB, and 20% of 79 GiB are 15.8, in which the workspace has no room."""
    params = load("llama3_8b_8gpu", "ppo.rollout.vllm.gpu_memory_utilization=0.2")
    shapes = planning.read_shapes(params)
    machine = machine_of(params.cluster.profile(stage), params.model.precision)
    plan = plan_stage(params, shapes, stage, machine)
    assert judge_plan(plan, machine).text == "does not fit"
    text = shortfall(plan, machine, "the profile")
    assert text is not None
    assert text.startswith(
        f"in {stage} vLLM gets 15.8 GiB of each GPU (gpu_memory_utilization 0.2), and its weights 15.0"
    )
    assert suggest(params, shapes, stage) == ["ppo.rollout.vllm.gpu_memory_utilization=0.3"]


def test_memory_check_can_be_switched_off() -> None:
    params = load("llama3_8b_8gpu", *TOO_LARGE, "cluster.check_memory=false")
    assert refuse_what_cannot_fit(params) is None


def test_too_little_main_memory_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "available_memory", lambda: GIB)
    with pytest.raises(InputError, match=r"import_model needs 1\.\d GiB of main memory .* this machine has 1\.0 GiB"):
        run_pipeline(load("tiny"), tmp_path / "run", tracking_uri="", console=Console())
    assert not (tmp_path / "run").exists()


def test_model_whose_size_is_unknown_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> None:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "model_info", fail)
    note = refuse_what_cannot_fit(load_params(PARAMS / "llama3_8b_8gpu.yaml"))
    assert note is not None
    assert note.startswith("memory is not checked: meta-llama/Llama-3.1-8B-Instruct is neither a local folder")


@pytest.mark.parametrize("stage", TOO_SMALL)
def test_suggestions_fit_by_the_planner_itself(stage: str) -> None:
    params = load(*TOO_SMALL[stage], f"policy.method={'dpo' if stage == 'dpo' else 'ppo'}")
    shapes = planning.read_shapes(params)
    machine = machine_of(params.cluster.profile(stage), params.model.precision)
    assert judge_plan(plan_stage(params, shapes, stage, machine), machine).text == "does not fit"
    settings = suggest(params, shapes, stage)
    assert settings
    values = {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in settings)}
    other = changed(params, values)
    assert other is not None
    assert judge_plan(plan_stage(other, shapes, stage, machine), machine).text in ("fits", "tight")


def test_gpus_of_unknown_memory_are_not_judged() -> None:
    params = load("qwen2.5_0.5b_1gpu", "cluster.profiles.gpu-24gb={gpu_memory: null}")
    plan = make_plan(params, Options())
    assert plan.verdicts["sft"].text == "unknown"
    assert refuse_what_cannot_fit(params) is None


def test_prices_are_those_of_the_profiles() -> None:
    params = load("llama3_8b_8gpu", *TWO_NODES, "cluster.profiles.gpu-8x80gb={price_per_hour: 20}")
    plan = make_plan(params, Options(records={"demonstrations": 1000, "preferences": 1000}))
    assert plan.price("ppo") == pytest.approx(2 * 20 * plan.seconds["ppo"].total / 3600)
    assert plan.price("evaluation") == pytest.approx(20 * plan.seconds["evaluation"].total / 3600)
    assert plan.price("judge") is None
    (table,) = [grid for grid in grids(plan) if grid.title == "Time and price"]
    assert table.rows[-1][2].endswith(" and unknown")


def test_more_nodes_are_more_pods_of_the_profile() -> None:
    plan = make_plan(load("llama3_8b_8gpu", *TWO_NODES), Options())
    assert (plan.stages["ppo"].num_processes, plan.stages["ppo"].pods) == (16, 2)
    assert plan.stages["evaluation"].pods == 1
    one = make_plan(load("llama3_8b_8gpu"), Options())
    assert plan.stages["ppo"].device_peak()[1] < one.stages["ppo"].device_peak()[1]


def test_measured_times_replace_estimates(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    rows = [{"seconds/generate": 2.0, "seconds/score": 1.0, "seconds/update": 3.0, "seconds/sync": 0.5}] * 4
    (tmp_path / "model" / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = {"ppo": {"seconds": 40.0, "reused": False}, "sft": {"seconds": 9.0, "reused": False}}
    (tmp_path / "summary.json").write_text(json.dumps({"stages": stages}))
    params = load("tiny", "ppo.num_iterations=100")
    found = measured_seconds(tmp_path, params)
    assert found["sft"].total == 9.0
    # 40 s - 4 x 6.5 s to start, and 100 iterations of 6.5 s.
    assert found["ppo"].total == pytest.approx(14 + 650)
    (tmp_path / "model" / "history.jsonl").unlink()  # a run with two policies, of which DPO's went to the gate
    history = tmp_path / "artifacts" / "rlhf" / "ppo" / "model"
    history.mkdir(parents=True)
    (history / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages |= {name: {"seconds": seconds, "reused": False} for name, seconds in
               (("dpo", 30.0), ("evaluation", 10.0), ("evaluation-2", 7.0))}  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps({"stages": stages}))
    found = measured_seconds(tmp_path, params)
    assert (found["dpo"].total, found["evaluation"].total) == (30.0, 17.0)
    assert found["ppo"].total == pytest.approx(14 + 650)
    del stages["ppo"]
    (tmp_path / "summary.json").write_text(json.dumps({"stages": stages}))
    assert "ppo" not in measured_seconds(tmp_path, params)
    with pytest.raises(InputError, match=r"has no summary\.json and model/history\.jsonl of a finished run"):
        measured_seconds(tmp_path / "model", params)


def test_times_of_dpo_grow_with_its_pairs_and_a_second_evaluation_samples_one_model() -> None:
    def seconds(*overrides: str, pairs: int = 1000) -> Any:
        plan = make_plan(
            load("llama3_8b_8gpu", *overrides), Options(records={"demonstrations": 9, "preferences": pairs})
        )
        return plan.seconds

    one, more = (seconds("policy.method=dpo", pairs=pairs)["dpo"].parts for pairs in (1280, 12800))
    assert more["update"] == pytest.approx(10 * one["update"]) and more["reference"] == pytest.approx(
        10 * one["reference"]
    )
    twice = seconds("policy.method=dpo", "dpo.num_epochs=2", pairs=1280)["dpo"].parts
    assert (twice["update"], twice["reference"]) == pytest.approx((2 * one["update"], one["reference"]))
    assert "reference" not in seconds("policy.method=dpo", "dpo.loss=simpo")["dpo"].parts
    ppo, both = seconds()["evaluation"].parts, seconds("policy.method=both")["evaluation"].parts
    assert both["generate"] == pytest.approx(1.5 * ppo["generate"]) and both["score"] == pytest.approx(2 * ppo["score"])


def test_records_are_two_numbers() -> None:
    assert parse_records("5, 7") == {"demonstrations": 5, "preferences": 7}
    for text in ("5", "a,b", "-1,2", ""):
        with pytest.raises(InputError, match="write the numbers of demonstrations and of preference pairs as N,M"):
            parse_records(text)


def test_outputs_say_the_same(tmp_path: Path) -> None:
    plan = make_plan(load("tiny"), Options())
    with (tmp_path / "out").open("w") as file:
        print_plan(plan, Console(file=file, width=220))
    printed, markdown = (tmp_path / "out").read_text(), as_markdown(plan)
    content: dict[str, Any] = json.loads(as_json(plan))
    for stage, found in content["stages"].items():
        size = f"{found['pod_bytes'] / GIB:.1f} of 4"
        assert size in printed
        assert f"| {stage} | cpu | 1 x 1 |" in markdown
        assert size in markdown
    assert "134,515,008 parameters, counted in the headers of its files" in printed


@pytest.mark.parametrize("name", ["llama3_70b_4node", "llama3_8b_8gpu", "tiny"])
def test_no_stage_and_no_number_is_cut_at_80_columns(name: str) -> None:
    plan = make_plan(load(name), Options(records={"demonstrations": 100_000, "preferences": 100_000}))
    file = io.StringIO()
    print_plan(plan, Console(file=file, width=80))
    lines = file.getvalue().splitlines()
    tables = lines[: next(number for number, line in enumerate(lines) if "parameters," in line)]
    assert all(len(line) <= 80 for line in tables)
    assert "…" not in file.getvalue()
    for grid in grids(plan):
        start = next(number for number, line in enumerate(tables) if line.strip() == grid.title)
        for row in grid.rows:
            cells = [cell for name, cell in zip(grid.head, row, strict=True) if cell and name not in grid.wrapped]
            assert any(all(f" {cell} " in f" {line} " for cell in cells) for line in tables[start:]), (grid.title, row)


def test_interval_of_checkpoints_can_be_pasted() -> None:
    plan = make_plan(load("llama3_8b_8gpu"), Options(mtbf_hours=100.0))
    last = list(notes(plan))[-1]
    assert last.startswith("--set checkpoint.every_minutes=")
    minutes = load("llama3_8b_8gpu", last.removeprefix("--set ")).checkpoint.every_minutes
    (ppo,) = [saves for saves in plan.saves if saves.stage == "ppo"]
    # sqrt(2 x wait x time between losses), of one node.
    assert minutes == pytest.approx((2 * ppo.stall_seconds * 3600 * 100.0) ** 0.5 / 60, abs=0.5)
    # A store so slow that a save takes longer to write than that: 186 GB at 10 MB/s.
    slow = make_plan(load("llama3_8b_8gpu"), Options(mtbf_hours=100.0, megabytes_per_second=10.0))
    assert slow.every_minutes() == pytest.approx(ppo.total_bytes / 10e6 / 60, abs=1)


def test_command_needs_no_torch_and_fails_for_what_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not installed')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [
        sys.executable,
        "-m",
        "pipelines",
        "plan",
        str(PARAMS / "tiny.yaml"),
        "--json",
        str(tmp_path / "plan.json"),
    ]
    fits = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert fits.returncode == 0, fits.stderr
    assert set(json.loads((tmp_path / "plan.json").read_text())["stages"]) >= {"sft", "ppo", "evaluation"}
    too_small = subprocess.run(
        [*command, "--markdown", "--set", "cluster.profiles.cpu={memory: 1Gi}"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert too_small.returncode == 1
    assert "does not fit" in too_small.stdout


CHECKS = [
    {"kind": "perplexity", "max_increase": 0.1},
    {"kind": "prompts", "prompts": ["How?", "Why?"], "pattern": "x", "max_increase": 0.5},
    {"kind": "lm_eval", "tasks": ["arc_easy"], "batch_size": 64, "max_drop": 0.1},
]


def test_checks_have_a_plan_only_in_a_run_with_checks() -> None:
    plans = {}
    for number in range(len(CHECKS) + 1):
        params = load("llama3_8b_8gpu", f"gate.checks={json.dumps(CHECKS[:number])}")
        plans[number] = make_plan(params, Options())
    assert "checks" not in plans[0].stages
    phases = [[phase.name for phase in plans[number].stages["checks"].phases] for number in (1, 2, 3)]
    assert phases == [["perplexity"], ["perplexity", "generate"], ["perplexity", "generate", "lm_eval"]]
    # One model of 8.03e9 parameters in bf16, and at most a few GiB beside it; the harness keeps the logits of 64 samples.
    small, large = (plans[number].stages["checks"].device_peak()[1] / GIB for number in (2, 3))
    weights = 8.03e9 * 2 / GIB
    logits = 64 * params.data.max_tokens * 128_256 * (2 + 4) / GIB
    assert weights < small < weights + 12
    assert small + 0.5 * logits < large < weights + 12 + 2 * logits
    assert plans[2].seconds["checks"].total > plans[1].seconds["checks"].total
    assert "lm-evaluation-harness" in plans[3].seconds["checks"].note
