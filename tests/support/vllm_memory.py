"""What a closed vLLM engine still holds."""

import gc
import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import Module


def references_to(llm: Any) -> list[weakref.ref[Any]]:
    """Weak references to the engine, its scheduler, its cache and its weights.

    In a function of its own, without vLLM's frames: exceptions that vLLM has caught keep those, and what their variables hold.
    """
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    parameters = [weakref.ref(p) for p in runner.get_model().parameters()]
    return [weakref.ref(core), weakref.ref(core.scheduler), weakref.ref(runner.kv_caches[0]), *parameters]


def require_freed(held: Sequence[weakref.ref[Any]]) -> None:
    """Nothing of an engine is left but parameters that vLLM keeps references to, which are empty."""
    gc.collect()
    assert len(held) > 20
    alive = [found for found in (reference() for reference in held) if found is not None]
    assert [type(x).__name__ for x in alive if not isinstance(x, Tensor)] == []
    assert sum(x.numel() for x in alive if isinstance(x, Tensor)) == 0


def require_no_model() -> None:
    """No model of vLLM is left in this process with weights."""
    gc.collect()
    models = [x for x in gc.get_objects() if isinstance(x, Module) and type(x).__module__.startswith("vllm.")]
    assert sum(p.numel() for model in models for p in model.parameters()) == 0
