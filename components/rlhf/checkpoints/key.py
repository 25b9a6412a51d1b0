"""The key of a stage's checkpoints: whatever alters training makes another one."""

import hashlib

from components.rlhf.artifacts.manifest import Manifest
from components.rlhf.artifacts.revision import code_revision
from components.rlhf.config.base import Settings


def checkpoint_key(stage: str, settings: Settings, *inputs: Manifest) -> str:
    """STAGE/DIGEST over the settings (not how often to save), the digests of all inputs, and the code revision."""
    content = settings.model_copy(update={"checkpoint": None}).model_dump_json(warnings=False)
    parts = [content, code_revision(), *(manifest.digest for manifest in inputs)]
    return f"{stage}/{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}"
