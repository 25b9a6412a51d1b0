"""What vLLM says when it cannot start, as one sentence with the setting to change."""

import re
from pathlib import Path

from components.rlhf.config.ppo import VllmConfig
from components.rlhf.text.errors import InputError


def start_error(error: Exception, *, model_folder: Path, config: VllmConfig, max_model_len: int) -> InputError:
    """The patterns are those of vLLM 0.32; what none of them fits is passed on by its first telling line."""
    text = str(error)
    where = f"vLLM cannot start with {model_folder}: "
    memory = (
        f"ppo.rollout.vllm.kv_cache_gib (now {config.kv_cache_gib:g}, on a CPU) or "
        f"gpu_memory_utilization (now {config.gpu_memory_utilization:g}, on a GPU)"
    )
    if found := re.search(r"\(([\d.]+) GiB KV cache is needed.*?memory \(([\d.]+) GiB\)", text, re.DOTALL):
        fits = re.search(r"estimated maximum model length is (\d+)", text)
        instead = f", or shorten prompt and response to {fits[1]} tokens together" if fits else ""
        return InputError(
            f"{where}{max_model_len} tokens need {found[1]} GiB of cache, and it has {found[2]}; raise {memory}{instead}."
        )
    if found := re.search(r"less than requested memory for kv \(([\d.]+)", text):
        free = re.search(r"\(([\d.]+)/[\d.]+ GiB\)", text)
        return InputError(
            f"{where}the cache is to have {found[1]} GiB, and {free[1] if free else 'less'} GiB of memory are free; lower {memory}."
        )
    if "No available memory for the cache blocks" in text:
        return InputError(f"{where}no memory is left for its cache; raise {memory}.")
    if found := re.search(
        r"Model architectures? \[?'?([\w', ]+?)'?\]? (are not supported|failed to be|was supported)", text
    ):
        return InputError(
            f"{where}it has no architecture {found[1]}; choose a model that it has, or set ppo.rollout.engine to hf."
        )
    if found := re.search(r"derived max_model_len \((\w+)=(\d+)", text):
        return InputError(
            f"{where}a prompt with its response may have {max_model_len} tokens, and the model takes {found[2]} ({found[1]} in "
            "config.json); shorten prompts or max_new_tokens."
        )
    return InputError(
        f"{where}{_first_informative_line(text) or type(error).__name__}; correct it, or set ppo.rollout.engine to hf."
    )


def _first_informative_line(text: str) -> str:
    """The first line with content: pydantic puts 'N validation errors for X' before what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    wrong = [line.removeprefix("Value error, ") for line in lines if "validation error" not in line]
    return re.sub(r"\s*\[type=.*$", "", (wrong or lines or [""])[0]).rstrip(".")
