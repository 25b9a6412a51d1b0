"""Compare the memory that kfp-rlhf plans with what stage programs use: random models, real stages, in processes of their own.

    python -m benchmarks.planner                  # all cases, about 25 minutes and up to 8 GiB
    python -m benchmarks.planner --only "sft 60M" # those whose name contains this

Measured is VmHWM of the process, the largest over ranks. The peaks are kept in benchmarks/planner/peaks.json, from which
`python -m benchmarks.scale` writes the table of docs/scale.md.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.planner.cases import CASES, Case
from benchmarks.record import ROOT, describe_machine
from components.rlhf.planner.phases import GIB

RESULTS = ROOT / "benchmarks" / "planner" / "peaks.json"
GOAL = 0.15


def main() -> None:
    from benchmarks.planner.inputs import make_inputs

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    parser.add_argument("--folder", type=Path, help="folder for models and outputs; default a temporary one")
    options = parser.parse_args()
    far = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for case in (case for case in CASES if options.only in case.name):
            if not (folder / case.size).exists():
                make_inputs(folder / case.size, case.size)
            peaks = measure(case, folder / case.size, folder)
            record(case, peaks)
            ratio = case.plan().main_peak()[1] / max(peaks)
            print(f"{case.name:45} measured {max(peaks) / GIB:.2f} GiB, planned / measured {ratio:.2f}", flush=True)
            far += [case.name] if abs(ratio - 1) > GOAL else []
    sys.exit(f"not within {GOAL:.0%}: {', '.join(far)}" if far else 0)


def measure(case: Case, inputs: Path, folder: Path) -> list[int]:
    """The peak of each rank, in bytes."""
    from benchmarks.planner.processes import run_stage

    output = folder / "output"
    shutil.rmtree(output, ignore_errors=True)
    return list(run_stage(case.stage, case.config(), inputs, output, checkpoints=case.checkpoints).peaks.values())


def read_results() -> dict[str, Any]:
    """Recorded peaks: name of the case -> mib of each rank, machine, date, and commit of the code that was measured."""
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return results


def record(case: Case, peaks: list[int]) -> None:
    results = read_results() if RESULTS.is_file() else {}
    results[case.name] = {
        "mib": [round(peak / 2**20) for peak in peaks], "machine": describe_machine(), "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
    }  # fmt: skip
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _commit() -> str:
    """The commit of the code in this folder, with + for changes to it."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    changes = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "components"], check=False).returncode
    return commit.strip() + ("+" if changes else "")


def rows() -> list[list[str]]:
    """Every measured case: what was planned and measured, and their ratio."""
    results, found = read_results(), []
    for case in CASES:
        if case.name in results:
            phase, planned = case.plan().main_peak()
            measured = max(results[case.name]["mib"]) * 2**20
            sizes = [f"{planned / GIB:.2f}", f"{measured / GIB:.2f}", f"{planned / measured:.2f}"]
            found.append([case.stage, case.size, case.label, phase, *sizes])
    return found


if __name__ == "__main__":
    main()
