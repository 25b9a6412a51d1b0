"""Rollouts with vLLM in the training process: the engine of GPUs, which runs on CPUs too.

Written for vLLM 0.32. Several processes (torchrun) each make an engine at the same moment, after torch.distributed is
initialised: with tensor_parallel_size 1 each is its own, above that neighbouring ranks hold one together.
Tried on CPUs, with one process and with two, in tensor_parallel_size 1 and 2. Not verified on a GPU: sleep and wake, CUDA
graphs, NCCL, and the sharing of a GPU's memory with the trainer.
"""

import contextlib
import gc
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.rlhf.config.model import SamplingConfig
from components.rlhf.config.ppo import VllmConfig
from components.rlhf.data.records import Completion, Prompt
from components.rlhf.data.tokenizer import encode_prompt, load_tokenizer
from components.rlhf.rollout.vllm_errors import start_error
from components.rlhf.text.errors import InputError

# What vLLM itself accepts; outside of it, it would refuse, or silently sample at another temperature.
TEMPERATURES = (0.01, 2.0)


class VllmRolloutEngine:
    """Samples from its own copy of the model, inside this process."""

    def __init__(
        self,
        model_folder: Path,
        config: VllmConfig,
        *,
        stop_ids: tuple[int, ...],
        dtype: torch.dtype,
        max_model_len: int,
        num_sequences: int,
    ) -> None:
        """dtype is the precision to sample in, max_model_len the most tokens of a prompt with its response, num_sequences
        how many responses grow at once. Raises InputError when vLLM is missing or cannot start."""
        self.tokenizer = load_tokenizer(model_folder)
        self.stop_ids = stop_ids
        self.version = 0
        self.max_model_len = max_model_len
        self.dtype = dtype
        self.tensor_parallel_size = config.tensor_parallel_size
        self._sleeping: set[str] = set()  # of "weights" and "kv_cache"
        self._owns_process_group = not torch.distributed.is_initialized()
        _check_processes(config.tensor_parallel_size)
        _configure_environment()
        try:
            import vllm
            from vllm.platforms import current_platform
        except ModuleNotFoundError as error:
            raise InputError(
                f"ppo.rollout.engine is vllm, which is not installed (no module {error.name}); "
                "pip install 'kfp-rlhf[gpu]' on a machine with NVIDIA GPUs, 'kfp-rlhf[cpu]' elsewhere, or set it to hf."
            ) from error
        self.on_cpu = bool(current_platform.is_cpu())
        # On a CPU no prompt is cut in pieces: after each piece vLLM winds a row's generator back, which only GPUs can.
        memory: dict[str, Any] = (
            {
                "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(max_model_len, 2048),
            }
            if self.on_cpu
            else {"gpu_memory_utilization": config.gpu_memory_utilization, "enable_sleep_mode": True}
        )
        several = not self._owns_process_group and torch.distributed.get_world_size() > 1
        self._llm: Any = None
        try:
            with _preserve_process_state():
                self._llm = vllm.LLM(
                    str(model_folder),
                    skip_tokenizer_init=True,  # ids go in and ids come out
                    generation_config="vllm",  # no top-k, top-p or penalties of the model's own
                    dtype=str(dtype).removeprefix("torch."),
                    max_model_len=max_model_len,
                    max_num_seqs=num_sequences,
                    logprobs_mode="processed_logprobs",  # of logits / temperature, without stops that are still forbidden
                    tensor_parallel_size=config.tensor_parallel_size,
                    distributed_executor_backend="external_launcher" if several else "uni",
                    enforce_eager=self.on_cpu,
                    use_tqdm_on_load=False,
                    **memory,
                )
            # vLLM forbids the EOS of generation_config.json before min_tokens even where it is told to ignore it; only
            # stop_ids count here, and in the trainer's log-probs.
            self._llm.llm_engine.input_processor.generation_config_fields = {}
            # What a kernel refuses (a head size, say) shows at the first step, not at the start.
            self.prompt_logprobs([0, 0])
        except Exception as error:  # whatever vLLM and its kernels raise
            self.close()
            raise start_error(error, model_folder=model_folder, config=config, max_model_len=max_model_len) from error
        self.name = f"vllm {vllm.__version__}"

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, seeds: Sequence[int]) -> list[Completion]:
        """sampling.batch_size is not used: num_sequences of them grow at once. On a GPU the engine sleeps afterwards.

        With tensor_parallel_size above 1 all ranks that hold the engine call it together, each with prompts of its own.
        """
        prompt_ids = [encode_prompt(self.tokenizer, prompt.prompt) for prompt in prompts]
        self._check_request(prompt_ids, sampling)
        first, everyones = self._gather(list(zip(prompt_ids, seeds, strict=True)))
        outputs = self._run(
            [ids for ids, _ in everyones],
            [
                {
                    "temperature": sampling.temperature,
                    "max_tokens": sampling.max_new_tokens,
                    "min_tokens": sampling.min_new_tokens,
                    "seed": seed,
                    "stop_token_ids": list(self.stop_ids),
                    "logprobs": 0,  # the sampled token's alone
                }
                for _, seed in everyones
            ],
        )[first : first + len(prompts)]
        self._sleep()
        completions = []
        for prompt, ids, output in zip(prompts, prompt_ids, outputs, strict=True):
            sampled = output.outputs[0]
            response = list(sampled.token_ids)
            logprobs = [at[token].logprob for at, token in zip(sampled.logprobs, response, strict=True)]
            completions.append(
                Completion(
                    prompt=prompt,
                    prompt_ids=ids,
                    response_ids=response,
                    response=str(self.tokenizer.decode(response, skip_special_tokens=True)),
                    logprobs=torch.tensor(logprobs),
                    truncated=response[-1] not in self.stop_ids,
                    weight_version=self.version,
                )
            )
        return completions

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> int:
        self._wake("weights")
        # Restores each layer's shape, loads it, and lays it out for its kernel again, in the same memory: on a CPU the
        # matrices were packed away at the start, and on a GPU captured graphs hold their addresses.
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._copies(weights)})
        if self.on_cpu:
            self._llm.apply_model(_pack_heads)
        # Keys and values of the old weights would otherwise be reused for prompts that begin alike.
        self._llm.reset_prefix_cache()
        self.version += 1
        return self.version

    def prompt_logprobs(self, ids: Sequence[int]) -> Tensor:
        # A request for log-probs of the prompt reads no prefix cache, so all of it is computed with the weights of now.
        (output,) = self._run([list(ids)], [{"temperature": 1.0, "max_tokens": 1, "prompt_logprobs": 0}])
        scored = zip(output.prompt_logprobs[1:], ids[1:], strict=True)
        return torch.tensor([at[token].logprob for at, token in scored])

    def close(self) -> None:
        """Free the engine's memory, and leave the trainer's process group as it is. A second call does nothing."""
        with contextlib.suppress(ModuleNotFoundError):
            from vllm.distributed import parallel_state

            # Not vLLM's own shutdown, which would also run when the engine is collected: it destroys the process group
            # whoever made it.
            if self._llm is not None:
                client = self._llm.llm_engine.engine_core
                client._finalizer.detach()
                client.engine_core.structured_output_manager.clear_backend()
                client.engine_core.model_executor.shutdown()
                client.engine_core.scheduler.shutdown()
                self._llm = client = None
            parallel_state.destroy_model_parallel()
            if parallel_state._WORLD is not None:
                parallel_state._WORLD.destroy()
                parallel_state._WORLD = None
            if self._owns_process_group and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        gc.unfreeze()  # vLLM hides what it made from the collector
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _run(self, prompt_ids: Sequence[list[int]], parameters: Sequence[dict[str, Any]]) -> list[Any]:
        from vllm import SamplingParams

        if not prompt_ids:
            return []
        self._wake("weights")
        self._wake("kv_cache")
        with _preserve_process_state():
            return list(
                self._llm.generate(
                    [{"prompt_token_ids": ids} for ids in prompt_ids],
                    [SamplingParams(detokenize=False, ignore_eos=True, **each) for each in parameters],
                    use_tqdm=False,
                )
            )

    def _check_request(self, prompt_ids: Sequence[Sequence[int]], sampling: SamplingConfig) -> None:
        longest = max((len(ids) for ids in prompt_ids), default=0)
        if longest + sampling.max_new_tokens > self.max_model_len:
            raise InputError(
                f"A prompt of {longest} tokens and a response of up to {sampling.max_new_tokens} (max_new_tokens) do not fit "
                f"the {self.max_model_len} tokens that vLLM was started with; lower max_new_tokens or shorten the prompts."
            )
        if not TEMPERATURES[0] <= sampling.temperature <= TEMPERATURES[1]:
            raise InputError(
                f"temperature is {sampling.temperature}, and vLLM samples between {TEMPERATURES[0]} and {TEMPERATURES[1]}; "
                "choose one of these, or set ppo.rollout.engine to hf."
            )

    def _gather(self, rows: list[tuple[list[int], int]]) -> tuple[int, list[tuple[list[int], int]]]:
        """The rows of all ranks that hold this engine, in the order of the ranks, and where this rank's begin."""
        if self.tensor_parallel_size == 1:
            return 0, rows
        from vllm.distributed import get_tp_group

        group = get_tp_group()
        parts: list[Any] = [None] * group.world_size
        torch.distributed.all_gather_object(parts, rows, group=group.cpu_group)
        return sum(len(part) for part in parts[: group.rank_in_group]), [row for part in parts for row in part]

    def _copies(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        # vLLM keeps the parts of a fused matrix (q, k and v) until it has them all; by then a trainer that shards its
        # weights has freed the first. So one copy each, in the engine's precision, and never more than a layer's at once.
        for name, weight in weights:
            yield name, weight.detach().to(self.dtype, copy=True)

    def _sleep(self) -> None:
        """Hand the GPU's memory to the updates: the cache is dropped, the weights wait in main memory."""
        if not self.on_cpu:
            self._llm.sleep(level=1)  # at level 2 a second generate without a sync would run on no weights
            self._sleeping = {"weights", "kv_cache"}

    def _wake(self, what: str) -> None:
        if what in self._sleeping:
            self._llm.wake_up(tags=[what])
            self._sleeping.remove(what)


def _pack_heads(model: torch.nn.Module) -> None:
    """Pack every output head anew from its weight, on a CPU.

    There the head multiplies with a packed copy that is made when it is loaded. A tied head is never loaded, its weight is
    the embeddings': after an update the copy would be the old head's, without an error, and every token be drawn from it.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def _configure_environment() -> None:
    """What vLLM reads from the environment. A user's own value counts where setdefault is."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process: weights need no transport
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override kv_cache_gib
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the trainer's threads use the same cores
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models come as folders
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # 18 s of compilation before the first token


def _check_processes(tensor_parallel_size: int) -> None:
    initialised = torch.distributed.is_initialized()
    world_size = torch.distributed.get_world_size() if initialised else 1
    if not initialised and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError("torch.distributed must be initialised before the engine is made: its ranks share the group")
    if world_size % tensor_parallel_size:
        raise InputError(
            f"ppo.rollout.vllm.tensor_parallel_size is {tensor_parallel_size}, and {world_size} processes train; "
            "choose a divisor of their number (ppo.training.num_processes)."
        )


@contextlib.contextmanager
def _preserve_process_state() -> Iterator[None]:
    """vLLM seeds and draws from the process's generators, and on a CPU disables torch.set_num_threads: undo both."""
    set_num_threads, num_threads, state = torch.set_num_threads, torch.get_num_threads(), random.getstate()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(state)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)
