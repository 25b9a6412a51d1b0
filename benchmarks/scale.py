"""Write the computed tables of docs/scale.md: what `kfp-rlhf plan` says of models and clusters of several sizes.

    python -m benchmarks.scale           # write the tables
    python -m benchmarks.scale --print   # print them

Nothing runs and no model is needed: shapes are in docs/shapes.
"""

import argparse
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.planner.__main__ import read_results, rows
from benchmarks.record import ROOT, replace_section
from components.rlhf.config.storage import CheckpointConfig
from components.rlhf.planner.phases import GIB
from components.rlhf.planner.saving import best_interval, lost_share
from pipelines.plan import Options, RunPlan, make_plan
from pipelines.settings import load_params

PAGE = ROOT / "docs" / "scale.md"
QWEN, LLAMA = "pipelines/params/qwen2.5_0.5b_1gpu.yaml", "pipelines/params/llama3_8b_8gpu.yaml"
TRAINING = ("sft", "reward_model", "ppo")
RECORDS = {"demonstrations": 100_000, "preferences": 100_000}
DEFAULT_MINUTES = CheckpointConfig().every_minutes
MTBF_HOURS = (500, 3000, 20_000)  # of one node


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model on a number of nodes, and the settings that differ from the params file."""

    name: str
    params: str
    shape: str
    nodes: tuple[int, ...]
    node: str = ""  # profile of a node of the training stages; empty leaves them as they are
    overrides: tuple[str, ...] = ()

    def settings(self, nodes: int) -> tuple[str, ...]:
        """What differs from the params file on this many nodes."""
        if not self.node:
            return self.overrides
        profile = f"cluster.profiles.nodes={{like: {self.node}, num_nodes: {nodes}}}"
        stages = [f"cluster.stages.{stage}=nodes" for stage in TRAINING]
        return ("cluster.launcher=trainjob", profile, *stages, *self.overrides)

    def command(self, nodes: int) -> str:
        parts = [
            f"kfp-rlhf plan {self.params}",
            f"--shape docs/shapes/{self.shape}.json",
            "--records 100000,100000",
        ]
        return " ".join([*parts, *(f"--set {shlex.quote(override)}" for override in self.settings(nodes))])

    def plan(self, nodes: int) -> RunPlan:
        params = load_params(ROOT / self.params, self.settings(nodes))
        return make_plan(params, Options(shape=str(ROOT / "docs" / "shapes" / f"{self.shape}.json"), records=RECORDS))


LARGE = (  # one minibatch and rollout for every number of GPUs, so that rows can be compared
    "ppo.minibatch=1024",
    "ppo.rollout.num_prompts=4096",
    "sft.batch_size=1024",
    "reward_model.batch_size=1024",
    "cluster.stages.import_model=huge",
)
NODE, LARGE_NODE = "gpu-8x80gb", "gke-gpu-8x141gb"
SETUPS = (
    Setup(name="0.5B", params=QWEN, shape="qwen2.5-0.5b", nodes=(1,)),
    Setup(
        name="8B", params=LLAMA, shape="llama-3.1-8b", nodes=(1, 2, 8, 32, 128), node=NODE,
        overrides=(*LARGE, "cluster.profiles.huge={memory: 64Gi}"),
    ),
    Setup(
        name="70B", params=LLAMA, shape="llama-3.1-70b", nodes=(2, 4, 8, 32, 128), node=NODE,
        overrides=(
            *LARGE, "cluster.profiles.huge={memory: 448Gi}", "ppo.rollout.vllm.tensor_parallel_size=8",
            "ppo.rollout.vllm.gpu_memory_utilization=0.4",
        ),
    ),
    Setup(
        name="405B", params=LLAMA, shape="llama-3.1-405b", nodes=(16, 32, 64, 128), node=LARGE_NODE,
        overrides=(
            *LARGE, f"cluster.stages.evaluation={LARGE_NODE}", "cluster.profiles.huge={memory: 2400Gi}",
            "ppo.rollout.vllm.tensor_parallel_size=8",
            "ppo.rollout.vllm.gpu_memory_utilization=0.8", "cluster.profiles.gke-gpu-8x141gb={memory: 1800Gi}",
        ),
    ),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--print", action="store_true", dest="only_print", help="print the tables instead of writing them"
    )
    options = parser.parse_args()
    for name, text in sections():
        if options.only_print:
            print(f"{text}\n")
        else:
            replace_section(PAGE, name, text)


def sections() -> Iterator[tuple[str, str]]:
    """Name and text of every computed section of the page."""
    plans = {(setup.name, nodes): setup.plan(nodes) for setup in SETUPS for nodes in setup.nodes}
    yield "measured", _measured()
    yield "memory", _memory(plans)
    yield "time", _time(plans)
    yield "checkpoints", _checkpoints(plans)
    yield "intervals", _intervals(plans)
    commands = "\n".join(setup.command(setup.nodes[0]) for setup in SETUPS)
    yield "commands", f"```sh\n{commands}\n```"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def _measured() -> str:
    machines = {f"{result['machine']}, {result['date']}" for result in read_results().values()}
    head = ["stage", "parameters", "settings", "planned peak in", "planned, GiB", "measured, GiB", "planned / measured"]
    return f"{_table(head, rows())}\n\n{'; '.join(sorted(machines))}."


Plans = dict[tuple[str, int], RunPlan]


def _gpus(plan: RunPlan) -> int:
    return plan.stages["ppo"].num_processes


def _memory(plans: Plans) -> str:
    rows = []
    for (name, _), plan in plans.items():
        cells = []
        for stage in (*TRAINING, "evaluation"):
            phase, size = plan.stages[stage].device_peak()
            mark = "" if plan.verdicts[stage].text != "does not fit" else " ✗"
            cells.append(f"{size / GIB:.0f} ({phase}){mark}")
        node = f"{plan.stages['ppo'].pod_memory() / GIB:.0f}"
        limit = f"{(plan.machines['ppo'].gpu_memory or 0) / GIB:.0f}"
        importing = f"{plan.stages['import_model'].pod_memory() / GIB:,.0f}"
        rows.append([name, f"{_gpus(plan):,}", *cells, limit, node, importing])
    head = ["model", "GPUs", "sft, GiB a GPU", "reward_model", "ppo", "evaluation (one node)", "of GiB"]
    head += ["ppo, GiB of main memory a node", "import_model, GiB of main memory"]
    return _table(head, rows)


def _time(plans: Plans) -> str:
    rows = []
    for (name, _), plan in plans.items():
        iterations = plan.params.ppo.num_iterations
        parts = plan.seconds["ppo"].parts
        each = {part: parts[part] / iterations for part in ("generate", "score", "update", "sync")}
        total = sum(each.values())
        shares = [f"{seconds / total:.0%}" for seconds in each.values()]
        gpu_hours = total * _gpus(plan) / 3600
        rows.append([name, f"{_gpus(plan):,}", f"{total:,.0f}", *shares, f"{gpu_hours:,.1f}"])
    head = ["model", "GPUs", "seconds an iteration", "generate", "score", "update", "sync", "GPU hours an iteration"]
    return _table(head, rows)


def _checkpoints(plans: Plans) -> str:
    rows = []
    for (name, _), plan in plans.items():
        (saves,) = [saves for saves in plan.saves if saves.stage == "ppo"]
        minutes = [f"{saves.minutes(hours / plan.stages['ppo'].pods):.0f}" for hours in MTBF_HOURS]
        rows.append(
            [
                name,
                f"{_gpus(plan):,}",
                f"{saves.total_bytes / 1e9:,.0f}",
                f"{saves.stall_seconds:.1f}",
                f"{saves.write_seconds:,.0f}",
                *minutes,
            ]
        )
    head = ["model", "GPUs", "GB of a save of ppo", "s that training waits", "s to write"]
    head += [f"every_minutes, node lost every {hours:,} h" for hours in MTBF_HOURS]
    return _table(head, rows)


def _intervals(plans: Plans) -> str:
    """Young's interval and what it loses, for a wait of a few seconds and a cluster that loses a node so often."""
    rows = []
    for wait in (2.0, 10.0, 60.0):
        for hours in (4, 24, 168):
            interval = best_interval(wait, 3600 * hours)
            lost = [lost_share(60 * minutes, wait, 3600 * hours) for minutes in (interval / 60, DEFAULT_MINUTES, 60)]
            rows.append([f"{wait:.0f}", f"{hours}", f"{interval / 60:.0f}", *(f"{share:.2%}" for share in lost)])
    head = [
        "s that training waits",
        "hours between lost nodes",
        "best every_minutes",
        "time lost at the best",
        f"at {DEFAULT_MINUTES:g}",
        "at 60",
    ]
    return _table(head, rows)


if __name__ == "__main__":
    main()
