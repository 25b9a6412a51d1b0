"""`kfp-rlhf plan`: memory, time and price of a run, stage by stage, before it starts."""

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from components.rlhf.config.cluster import TRAINING_STAGES
from components.rlhf.config.model import Precision
from components.rlhf.config.params import Params
from components.rlhf.planner.durations import Seconds, seconds_of_run
from components.rlhf.planner.phases import StagePlan
from components.rlhf.planner.plan import (
    STAGES,
    Machine,
    Shapes,
    Verdict,
    judge_plan,
    machine_of,
    plan_run,
    reward_model_section,
    shortfall,
)
from components.rlhf.planner.processor import available_memory, has_bf16
from components.rlhf.planner.saving import Saves, proposed_minutes, saves_of
from components.rlhf.planner.sources import shape_of
from components.rlhf.planner.suggest import suggest
from components.rlhf.runtime.accelerators import driver_version
from components.rlhf.text.errors import InputError

SECOND = "-2"  # ends the names of the second tasks of a run with two policies
DEFAULT_MTBF_HOURS = 3000.0  # of one node: a few losses a year
DEFAULT_MEGABYTES = 300.0  # a second that a node writes to the store


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a plan assumes beside the settings."""

    shape: str | None = None  # in place of model.source
    measured: Path | None = None  # run directory whose times replace estimates
    records: Mapping[str, int] = field(default_factory=dict)  # of demonstrations and preferences
    mtbf_hours: float = DEFAULT_MTBF_HOURS
    megabytes_per_second: float = DEFAULT_MEGABYTES


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Everything that is printed."""

    params: Params
    shapes: Shapes
    stages: Mapping[str, StagePlan]
    verdicts: Mapping[str, Verdict]
    machines: Mapping[str, Machine]
    seconds: Mapping[str, Seconds]
    saves: tuple[Saves, ...]
    options: Options

    def profile_name(self, stage: str) -> str:
        return self.params.cluster.profile_name(stage)

    def hours_between_losses(self, stage: str) -> float:
        """Hours until one of the nodes of a stage is lost."""
        return self.options.mtbf_hours / self.stages[stage].pods

    def every_minutes(self) -> int | None:
        """The checkpoint.every_minutes that is proposed: that of the stage that takes longest, in which all saves can be written."""
        if not self.saves:
            return None
        longest = max(self.saves, key=lambda saves: self.seconds[saves.stage].total)
        return proposed_minutes(longest, self.saves, self.hours_between_losses(longest.stage))

    def price(self, stage: str) -> float | None:
        price = self.params.cluster.profile(stage).price_per_hour
        return None if price is None else price * self.stages[stage].pods * self.seconds[stage].total / 3600


def make_plan(params: Params, options: Options) -> RunPlan:
    """Read the shapes of the models, and plan every stage. Raises InputError."""
    shapes = read_shapes(params, options.shape)
    stages = plan_run(params, shapes)
    machines = {stage: machine_of(params.cluster.profile(stage), params.model.precision) for stage in stages}
    seconds = seconds_of_run(params, shapes, options.records)
    if options.measured:
        seconds |= measured_seconds(options.measured, params)
    saves = [
        saves_of(
            params, shapes, stage, bytes_per_second=options.megabytes_per_second * 1e6, num_nodes=stages[stage].pods
        )
        for stage in TRAINING_STAGES
        if stage in stages and not (stage == "reward_model" and reward_model_section(params).use)
    ]
    return RunPlan(
        params=params,
        shapes=shapes,
        stages=stages,
        verdicts={stage: judge_plan(plan, machines[stage]) for stage, plan in stages.items()},
        machines=machines,
        seconds=seconds,
        saves=tuple(saves),
        options=options,
    )


def parse_records(text: str) -> dict[str, int]:
    """Numbers of demonstrations and of preference pairs from N,M. Raises InputError."""
    numbers = text.split(",")
    if len(numbers) != 2 or not all(number.strip().isdigit() for number in numbers):
        raise InputError(
            f"--records is {text[:40]}; write the numbers of demonstrations and of preference pairs as N,M."
        )
    return {"demonstrations": int(numbers[0]), "preferences": int(numbers[1])}


def read_shapes(params: Params, shape: str | None = None) -> Shapes:
    """The shapes of the models of a run; shape is a model folder or config.json in place of model.source."""
    base = shape_of(shape or params.model.source, params.storage, revision=None if shape else params.model.revision)
    reward = None
    if params.uses_reward_model:
        reward = shape_of(params.reward_model.use, params.storage) if params.reward_model.use else base
    judge = None
    if params.reward_model_judge is not None:
        used = params.reward_model_judge.use
        judge = shape_of(used, params.storage) if used else base
    return Shapes(base=base, reward_model=reward, judge=judge)


def refuse_what_cannot_fit(params: Params, machine: Machine | None = None) -> str | None:
    """Raise InputError for the first stage that cannot fit its profile, or this machine.

    Returns why nothing could be checked, if the shape of a model is unknown here.
    """
    if not params.cluster.check_memory:
        return None
    try:
        shapes = read_shapes(params)
    except InputError as error:  # the stage that reads the model reports what is wrong with it
        return f"memory is not checked: {error}"
    for stage, plan in plan_run(params, shapes, machine).items():
        own = machine or machine_of(params.cluster.profile(stage), params.model.precision)
        profile = params.cluster.profile_name(stage)
        missing = shortfall(plan, own, "this machine" if machine else f"the profile {profile}")
        if missing:
            options = suggest(params, shapes, stage, machine)
            turn = f"set {' and '.join(options)}" if options else "choose a larger profile or a smaller model"
            raise InputError(
                f"{missing}; {turn}, or set cluster.check_memory=false to try (kfp-rlhf plan shows the parts)."
            )
    return None


def this_machine(precision: Precision) -> Machine:
    """Main memory that is free here. Whether it has a GPU is known from its driver; how much memory that has is not."""
    gpu = driver_version() is not None
    return Machine(gpu=gpu, gpu_memory=None, memory=available_memory(), bf16=has_bf16(precision, on_gpu=gpu))


def measured_seconds(run: Path, params: Params) -> dict[str, Seconds]:
    """Seconds of the stages of a finished run, those of PPO scaled to the iterations of params. Raises InputError."""
    try:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        seconds: dict[str, float] = {}
        for stage, record in summary["stages"].items():
            name = stage.removesuffix(SECOND)
            if name in STAGES and not record["reused"]:
                seconds[name] = seconds.get(name, 0.0) + float(record["seconds"])
        found = {stage: Seconds(parts={"measured": value}, note="measured") for stage, value in seconds.items()}
        if "ppo" not in found:
            return found
        # In a run with two policies the model may be DPO's.
        history = next((run / "artifacts").glob("*/ppo/model/history.jsonl"), run / "model" / "history.jsonl")
        rows = [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()]
        each = {
            # Iterations in which PPO's guard turned back have none.
            name: statistics.median(row[f"seconds/{name}"] for row in rows if f"seconds/{name}" in row)
            for name in ("generate", "score", "update", "sync")
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, statistics.StatisticsError) as error:
        raise InputError(
            f"{run} has no summary.json and model/history.jsonl of a finished run ({error}); name the folder of one."
        ) from None
    start = max(found["ppo"].total - len(rows) * sum(each.values()), 0.0)
    parts = {name: params.ppo.num_iterations * seconds for name, seconds in each.items()}
    note = f"{params.ppo.num_iterations} iterations as measured"
    found["ppo"] = Seconds(parts={"start and validation": start} | parts, note=note)
    return found
