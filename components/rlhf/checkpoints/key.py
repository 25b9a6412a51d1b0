"""The key of a stage's checkpoints, which changes with everything that affects training."""

import hashlib
from typing import Any

from components.rlhf.artifacts.manifest import Manifest
from components.rlhf.artifacts.revision import code_revision
from components.rlhf.config.base import BaseConfig

STATE_FORMAT = 3  # raised when the state in a checkpoint gets other keys, which the package version may not show


def checkpoint_key(stage: str, config: BaseConfig, *inputs: Manifest) -> str:
    """STAGE/DIGEST of the config, the inputs' digests, the code revision and the format of the state.

    Excluded is what may change between attempts: the sections checkpoint and budget, the number of processes and their timeout, and the
    engine that samples for the calibration of a reward model.
    """
    training = {"training": {"num_processes", "timeout_minutes"}}
    unrelated: dict[str, Any] = {"checkpoint": True, "budget": True, "rollout": True, stage: training}
    content = config.model_dump_json(exclude=unrelated)
    parts = [content, code_revision(), str(STATE_FORMAT), *(manifest.digest for manifest in inputs)]
    return f"{stage}/{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}"
