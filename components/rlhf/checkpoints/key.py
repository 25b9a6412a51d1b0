"""The key of a stage's checkpoints: whatever alters training makes another one."""

import hashlib
from typing import Any

from components.rlhf.artifacts.manifest import Manifest
from components.rlhf.artifacts.revision import code_revision
from components.rlhf.config.base import BaseConfig


def checkpoint_key(stage: str, config: BaseConfig, *inputs: Manifest) -> str:
    """STAGE/DIGEST over the settings (but for those that a checkpoint does not depend on), the inputs' digests and the code revision.

    The section named like the stage holds how it trains: a run may go on in more or fewer processes, or wait longer for them.
    """
    unrelated: dict[str, Any] = {"checkpoint": True, stage: {"training": {"num_processes", "timeout_minutes"}}}
    content = config.model_dump_json(exclude=unrelated)
    parts = [content, code_revision(), *(manifest.digest for manifest in inputs)]
    return f"{stage}/{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}"
