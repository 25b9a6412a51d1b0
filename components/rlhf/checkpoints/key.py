"""The key of a stage's checkpoints, which changes with everything that affects training."""

import hashlib
from typing import Any

from components.rlhf.artifacts.manifest import Manifest
from components.rlhf.artifacts.revision import code_revision
from components.rlhf.config.base import BaseConfig


def checkpoint_key(stage: str, config: BaseConfig, *inputs: Manifest) -> str:
    """STAGE/DIGEST of the config, the inputs' digests and the code revision.

    Excluded is what may change between attempts: the checkpoint section, and the number of processes and their timeout.
    """
    unrelated: dict[str, Any] = {"checkpoint": True, stage: {"training": {"num_processes", "timeout_minutes"}}}
    content = config.model_dump_json(exclude=unrelated)
    parts = [content, code_revision(), *(manifest.digest for manifest in inputs)]
    return f"{stage}/{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}"
