"""Converts vLLM's startup errors to one-line messages that name the setting to change."""

import re
from pathlib import Path

from components.rlhf.config.rollout import VllmConfig
from components.rlhf.text.errors import InputError


def start_error(error: Exception, *, model_folder: Path, config: VllmConfig, max_model_len: int) -> InputError:
    """The InputError for a startup error of vLLM 0.32; an unknown error is reported by its first informative line."""
    text = str(error)
    prefix = f"vLLM cannot start with {model_folder}: "
    memory = (
        f"ppo.rollout.vllm.kv_cache_gib (now {config.kv_cache_gib:g}, on a CPU) or "
        f"gpu_memory_utilization (now {config.gpu_memory_utilization:g}, on a GPU)"
    )
    if found := re.search(r"\(([\d.]+) GiB KV cache is needed.*?memory \(([\d.]+) GiB\)", text, re.DOTALL):
        fits = re.search(r"estimated maximum model length is (\d+)", text)
        alternative = f", or shorten prompt and response to {fits[1]} tokens in total" if fits else ""
        return InputError(
            f"{prefix}{max_model_len} tokens need {found[1]} GiB of KV cache, but it has {found[2]}; raise {memory}{alternative}."
        )
    if found := re.search(r"less than requested memory for kv \(([\d.]+)", text):
        free = re.search(r"\(([\d.]+)/[\d.]+ GiB\)", text)
        available = f"only {free[1]} GiB of memory are free" if free else "less memory is free"
        return InputError(f"{prefix}the KV cache needs {found[1]} GiB, but {available}; lower {memory}.")
    if "No available memory for the cache blocks" in text:
        return InputError(f"{prefix}no memory is left for the KV cache; raise {memory}.")
    if found := re.search(
        r"Model architectures? \[?'?([\w', ]+?)'?\]? (are not supported|failed to be|was supported)", text
    ):
        return InputError(
            f"{prefix}it does not support the architecture {found[1]}; choose another model, or set ppo.rollout.engine to hf."
        )
    if found := re.search(r"derived max_model_len \((\w+)=(\d+)", text):
        return InputError(
            f"{prefix}prompt and response may have {max_model_len} tokens, but the model supports {found[2]} ({found[1]} in "
            "config.json); shorten the prompts or lower max_new_tokens."
        )
    return InputError(
        f"{prefix}{_first_informative_line(text) or type(error).__name__}; correct it, or set ppo.rollout.engine to hf."
    )


def load_error(error: Exception, folder: Path) -> InputError:
    """The InputError for an error while vLLM loads another folder in place."""
    reason = _first_informative_line(str(error)) or type(error).__name__
    return InputError(f"vLLM cannot load {folder}: {reason}; correct it, or set the rollout engine to hf.")


def _first_informative_line(text: str) -> str:
    """The first line of the actual problem: pydantic's errors begin with 'N validation errors for X'."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    problems = [line.removeprefix("Value error, ") for line in lines if "validation error" not in line]
    return re.sub(r"\s*\[type=.*$", "", (problems or lines or [""])[0]).rstrip(".")
