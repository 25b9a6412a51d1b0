"""The cases of tests/nodes: `python -m tests.support.node_cases NUM_PROCESSES INPUTS OUT CHECKPOINTS CASE...`.

Started once per node (or on one node alone), it launches the ranks as a stage does, and they run the real programs of sft and ppo one
after another, in one process group. Each case writes OUT/CASE/; errors are in OUT/CASE-RANK.error.
"""

import contextlib
import functools
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from components.rlhf.config.processes import Processes
from components.rlhf.runtime import stage as frame
from components.rlhf.runtime.nodes import launch_processes
from components.rlhf.runtime.process import die_with_parent
from tests.support.node_inputs import options, ppo_settings, sft_settings

ZERO2, ZERO3 = ({"engine": "deepspeed", "zero_stage": stage} for stage in (2, 3))
LONG_PPO = {"num_iterations": 30}  # also runs in tests that kill a node
SETTINGS: dict[str, tuple[str, Callable[[int], str]]] = {
    "sft-torch": ("sft", sft_settings),
    "sft-zero2": ("sft", functools.partial(sft_settings, **ZERO2)),
    "sft-zero3": ("sft", functools.partial(sft_settings, **ZERO3)),
    "ppo-torch": ("ppo", lambda n: ppo_settings(n, **LONG_PPO)),
    "ppo-zero2": ("ppo", lambda n: ppo_settings(n, training=ZERO2)),
    "ppo-zero3": ("ppo", lambda n: ppo_settings(n, training=ZERO3)),
    "ppo-vllm": ("ppo", lambda n: ppo_settings(n, rollout={"engine": "vllm"})),
    "ppo-vllm-zero3": ("ppo", lambda n: ppo_settings(n, rollout={"engine": "vllm"}, training=ZERO3)),
    # Cases that are refused.
    "vllm-across-nodes": ("ppo", lambda n: ppo_settings(n, rollout={"engine": "vllm", "vllm": {"tensor_parallel_size": 2}})),
    "other-settings": ("sft", lambda n: sft_settings(n, learning_rate=1e-3 if on_first_node() else 2e-3)),
    "other-revision": ("sft", sft_settings),
    "other-input": ("sft", sft_settings),
    "other-number": ("sft", lambda n: sft_settings(n + 1)),
    "unshared": ("sft", sft_settings),
}  # fmt: skip


def on_first_node() -> bool:
    return os.environ.get("GROUP_RANK", "0") == "0"


def main(num_processes: int, inputs: Path, out: Path, checkpoints: Path, names: list[str]) -> None:
    die_with_parent()
    launch_processes("sft", Processes(number=num_processes, timeout_minutes=3))
    from components.rlhf.engine import group as engine_group
    from components.rlhf.runtime import agreement

    rank = int(os.environ["RANK"])
    with engine_group.join_process_group(timeout_minutes=3) as group:

        @contextlib.contextmanager
        def joined(**_: Any) -> Iterator[Any]:
            yield group

        engine_group.join_process_group = joined
        frame.PEER_ERROR_GRACE_SECONDS = 0.0
        agreement.SHARED_SECONDS = 1.0
        for name in names:
            group.barrier()
            if error := run_case(name, num_processes, inputs, out, checkpoints):
                (out / f"{name}-{rank}.error").write_text(error)


def run_case(name: str, num_processes: int, inputs: Path, out: Path, checkpoints: Path) -> str:
    """What the case has printed on standard error, if it has failed."""
    from components.ppo.__main__ import main as ppo
    from components.rlhf.artifacts import revision
    from components.sft.__main__ import main as sft

    stage, settings = SETTINGS[name]
    if name == "unshared":
        checkpoints = Path("/tmp/checkpoints")
    if name == "other-input" and not on_first_node():
        inputs = inputs.with_name("other-inputs")
    os.environ[revision.REVISION_VARIABLE] = "abc" if on_first_node() or name != "other-revision" else "def"
    revision.code_revision.cache_clear()
    os.environ["RLHF_RUN_ID"] = name
    said = io.StringIO()
    code = 0
    with contextlib.redirect_stderr(said):
        try:
            arguments = options(stage, settings(num_processes), inputs, out / name, checkpoints)
            {"sft": sft, "ppo": ppo}[stage].main(list(arguments), standalone_mode=False)
        except SystemExit as end:
            code = int(end.code or 0)
    print(json.dumps({"case": name, "code": code}), flush=True)
    return said.getvalue() if code else ""


if __name__ == "__main__":
    main(int(sys.argv[1]), *map(Path, sys.argv[2:5]), sys.argv[5:])
