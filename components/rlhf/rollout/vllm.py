"""Rollouts with vLLM in the training process, on GPUs or CPUs.

Written for vLLM 0.32. With several processes (torchrun) all create their engine together, after torch.distributed is
initialized: with tensor_parallel_size 1 each has its own, above that neighboring ranks share one.
Tested on CPUs with one and two processes and with tensor_parallel_size 1 and 2. Not verified on a GPU: sleep and wake, CUDA
graphs, NCCL, and sharing a GPU's memory with the trainer.
"""

import contextlib
import gc
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.rlhf.config.model import SamplingConfig
from components.rlhf.config.rollout import VllmConfig
from components.rlhf.data.records import Completion, Prompt
from components.rlhf.data.tokenizer import decode_response, load_tokenizer
from components.rlhf.models.loading import empty_causal_lm, require_same_architecture
from components.rlhf.models.stored import StoredForm
from components.rlhf.rollout.contexts import encode_contexts
from components.rlhf.rollout.probe import WeightSample, require_weights_of
from components.rlhf.rollout.vllm_errors import load_error, start_error
from components.rlhf.rollout.vllm_lora import (
    lora_options,
    modules_without_adapter,
    reason_to_merge,
    sample_adapter,
    split_adapters,
    write_adapter,
)
from components.rlhf.rollout.vllm_process import (
    check_processes,
    configure_environment,
    own_shared_memory,
    preserve_process_state,
)
from components.rlhf.text.errors import InputError

# The range that vLLM supports; outside it, vLLM fails or silently samples at another temperature.
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
        lora_rank: int = 0,
        adapted_modules: Sequence[str] = (),
    ) -> None:
        """dtype is the precision to sample in, max_model_len the maximum length of prompt and response in tokens, and
        num_sequences the maximum number of concurrent responses. The trainer has adapters of rank lora_rank on adapted_modules.
        Raises InputError if vLLM is missing or cannot start."""
        self.folder = model_folder
        self.tokenizer = load_tokenizer(model_folder)
        self.stop_ids = stop_ids
        self.version = 0
        self.max_model_len = max_model_len
        self.dtype = dtype
        self.tensor_parallel_size = config.tensor_parallel_size
        shell = empty_causal_lm(model_folder)
        self._stored_form = StoredForm(shell, [name for name, _ in shell.named_parameters(remove_duplicate=False)])
        self._architectures = getattr(shell.config, "architectures", None) or []
        self._sleeping: set[str] = set()  # vLLM's wake-up tags: "weights", "kv_cache"
        self._adapted_modules = adapted_modules
        self._adapter: Any = None  # vLLM's request for the adapter of this version
        self._owns_process_group = not torch.distributed.is_initialized()
        check_processes(config.tensor_parallel_size)
        configure_environment()
        try:
            import vllm
            from vllm.platforms import current_platform
        except ModuleNotFoundError as error:
            raise InputError(
                f"ppo.rollout.engine is vllm, which is not installed (no module {error.name}); "
                "run pip install 'kfp-rlhf[gpu]' with NVIDIA GPUs or 'kfp-rlhf[cpu]' without, or set it to hf."
            ) from error
        self.on_cpu = bool(current_platform.is_cpu())
        # No chunked prefill on CPUs: after each chunk vLLM rewinds the generator of the request, which only GPUs support.
        device_options: dict[str, Any] = (
            {
                "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(max_model_len, 2048),
            }
            if self.on_cpu
            else {"gpu_memory_utilization": config.gpu_memory_utilization, "enable_sleep_mode": True}
        )
        self._options = dict(
            model=str(model_folder),
            skip_tokenizer_init=True,  # see _start
            generation_config="vllm",  # ignore top-k, top-p and penalties of generation_config.json
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=max_model_len,
            max_num_seqs=num_sequences,
            logprobs_mode="processed_logprobs",  # of logits / temperature, with early stop ids masked
            tensor_parallel_size=config.tensor_parallel_size,
            distributed_executor_backend="external_launcher" if self._is_distributed() else "uni",
            enforce_eager=self.on_cpu,
            use_tqdm_on_load=False,
            **device_options,
        )
        self._llm: Any = None
        self._closed = False
        try:
            self.merges_because = self._start_with_adapters(lora_rank)
            if self.merges_because:
                self._start({})
        except Exception as error:  # vLLM and its kernels raise any type
            self.close()
            raise start_error(error, model_folder=model_folder, config=config, max_model_len=max_model_len) from error
        self.name = f"vllm {vllm.__version__}"
        if self.on_cpu and any(self._on_model(_has_experts)):
            self.close()
            raise InputError(
                f"vLLM 0.32 on a CPU loses the packed experts of {model_folder} when weights are updated; set ppo.rollout.engine to hf."
            )

    def _is_distributed(self) -> bool:
        return not self._owns_process_group and torch.distributed.get_world_size() > 1

    def _start_with_adapters(self, rank: int) -> str:
        """Start the engine for the trainer's adapters, or return why it cannot have all of them."""
        names = self._adapted_modules
        if not names:
            return "there are none"
        reason = reason_to_merge(self._architectures, rank)
        if reason:
            return reason
        self._start(lora_options(rank, {name.rpartition(".")[2] for name in names}))
        (ignored,) = self._on_model(lambda model: modules_without_adapter(model, names))
        if not ignored:
            return ""
        self._stop()
        return f"vLLM has no adapters for {ignored[0]}"

    def _start(self, options: dict[str, Any]) -> None:
        import vllm

        shares_memory = self.on_cpu and self.tensor_parallel_size > 1
        with preserve_process_state(), own_shared_memory() if shares_memory else contextlib.nullcontext():
            self._llm = vllm.LLM(**self._options, **options)
        # Even with generation_config="vllm", vLLM masks the EOS of generation_config.json before min_tokens; only
        # stop_ids must be masked, as in the trainer's log-probs.
        self._llm.llm_engine.input_processor.generation_config_fields = {}
        # Input and output are ids; only responses with stop strings are decoded, and without a tokenizer vLLM would ignore the strings.
        self._llm.llm_engine.output_processor.tokenizer = self.tokenizer
        # Unsupported kernels (e.g. of a head size) fail only at the first step, so run one.
        self.prompt_logprobs([0, 0])

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        seeds: Sequence[int],
        *,
        greedy: bool = False,
        after: Sequence[Sequence[int]] | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[Completion]:
        """sampling.batch_size is ignored in favor of num_sequences. On a GPU the engine sleeps afterwards.

        With tensor_parallel_size above 1 this is collective over the ranks that share the engine; each passes its prompts.
        """
        prompt_ids = encode_contexts(self.tokenizer, prompts, after)
        limits = [sampling.max_new_tokens] * len(prompt_ids) if limits is None else limits
        self._check_request(prompt_ids, limits, sampling, greedy=greedy)
        offset, requests = self._gather(list(zip(prompt_ids, seeds, limits, strict=True)))
        outputs = self._run(
            [ids for ids, _, _ in requests],
            [
                {
                    "temperature": 0.0 if greedy else sampling.temperature,
                    "max_tokens": limit,
                    "min_tokens": sampling.min_new_tokens,
                    "top_p": sampling.top_p,
                    "top_k": sampling.top_k,
                    "min_p": sampling.min_p,
                    "repetition_penalty": sampling.repetition_penalty,
                    "stop": list(sampling.stop),
                    "detokenize": bool(sampling.stop),
                    "seed": seed,
                    "stop_token_ids": list(self.stop_ids),
                    "logprobs": 0,  # only of the sampled token
                }
                for _, seed, limit in requests
            ],
        )[offset : offset + len(prompts)]
        self._sleep()
        completions = []
        for prompt, ids, output in zip(prompts, prompt_ids, outputs, strict=True):
            sampled = output.outputs[0]
            response, is_stopped = list(sampled.token_ids), isinstance(sampled.stop_reason, str)
            logprobs = [by_id[token].logprob for by_id, token in zip(sampled.logprobs, response, strict=True)]
            completions.append(
                Completion(
                    prompt=prompt,
                    prompt_ids=ids,
                    response_ids=response,
                    response=sampled.text if is_stopped else decode_response(self.tokenizer, ids, response),
                    logprobs=torch.tensor(logprobs),
                    truncated=not is_stopped and response[-1] not in self.stop_ids,
                    weight_version=self.version,
                )
            )
        return completions

    def load(self, folder: Path) -> int:
        """Load another folder in place, which needs neither the memory nor the time of a second engine.

        Raises InputError if its config is of another architecture, if vLLM cannot load it, or if weights have other values afterwards.
        """
        require_same_architecture(empty_causal_lm(self.folder), folder)
        self._wake("weights")
        try:
            self._reload(weights_path=str(folder))
        except Exception as error:  # vLLM and its loaders raise any type
            raise load_error(error, folder) from error
        version = self._next_version()
        require_weights_of(folder, self.weight_samples(), self.dtype)
        return version

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> int:
        self._wake("weights")
        adapters: dict[str, Tensor] = {}
        base = split_adapters(weights, adapters)
        if self.merges_because:
            self._reload(weights_iterator=self._copies(base))
        elif (first := next(base, None)) is not None:
            self._reload(weights_iterator=self._copies(chain([first], base)))
        if adapters:
            self._load_adapter(adapters)
        return self._next_version()

    def _reload(self, **source: Any) -> None:
        # reload_weights restores each layer's shape, loads it and processes it for its kernel again, in place: on a CPU
        # the matrices were packed at the start, and on a GPU captured graphs hold their addresses.
        self._llm.collective_rpc("reload_weights", kwargs=source)
        if self.on_cpu:
            self._llm.apply_model(_pack_heads)

    def _next_version(self) -> int:
        # Otherwise prompts with a common prefix would reuse keys and values of the old weights.
        self._llm.reset_prefix_cache()
        self.version += 1
        return self.version

    def _load_adapter(self, adapters: dict[str, Tensor]) -> None:
        """Replace the adapter by that of the next version. vLLM loads adapters from folders."""
        from vllm.lora.request import LoRARequest

        number = self.version + 1
        with tempfile.TemporaryDirectory(prefix="adapter-") as parent:
            folder = Path(parent) / "adapter"
            write_adapter(folder, adapters)
            request = LoRARequest(f"version-{number}", number, str(folder))
            self._llm.llm_engine.add_lora(request)
        self._adapter = request

    def weight_samples(self) -> dict[str, WeightSample]:
        self._wake("weights")
        (samples,) = self._on_model(_sample_weights)
        if self._adapter is not None:
            number, names = self._adapter.lora_int_id, self._adapted_modules
            (of_adapter,) = self._on_model(lambda model: sample_adapter(model, number, names))
            samples |= of_adapter
        return dict(samples)

    def prompt_logprobs(self, ids: Sequence[int]) -> Tensor:
        # A request for prompt log-probs bypasses the prefix cache, so the current weights are used for all tokens.
        (output,) = self._run([list(ids)], [{"temperature": 1.0, "max_tokens": 1, "prompt_logprobs": 0}])
        scored = zip(output.prompt_logprobs[1:], ids[1:], strict=True)
        return torch.tensor([by_id[token].logprob for by_id, token in scored])

    def _on_model(self, function: Callable[[Any], Any]) -> list[Any]:
        """The results of a function of vLLM's model, in this process."""
        return list(self._llm.apply_model(function))

    def close(self) -> None:
        """Free the engine's memory, without touching the trainer's process group.

        Idempotent: vLLM's groups and a process group may belong to a later engine when this is called again.
        """
        if not self._closed:
            self._closed = True
            self._stop()

    def _stop(self) -> None:
        with contextlib.suppress(ModuleNotFoundError):
            from vllm.distributed import parallel_state

            # vLLM's own shutdown, which would also run on garbage collection, destroys the process group even if the
            # trainer created it; so shut down the parts instead.
            if self._llm is not None:
                self._llm.apply_model(_free_weights)
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
        gc.unfreeze()  # vLLM freezes its objects, which hides them from the garbage collector
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _run(self, prompt_ids: Sequence[list[int]], parameters: Sequence[dict[str, Any]]) -> list[Any]:
        from vllm import SamplingParams

        if not prompt_ids:
            return []
        self._wake("weights")
        self._wake("kv_cache")
        with preserve_process_state():
            return list(
                self._llm.generate(
                    [{"prompt_token_ids": ids} for ids in prompt_ids],
                    [SamplingParams(**{"detokenize": False, "ignore_eos": True} | request) for request in parameters],
                    use_tqdm=False,
                    lora_request=self._adapter,
                )
            )

    def _check_request(
        self, prompt_ids: Sequence[Sequence[int]], limits: Sequence[int], sampling: SamplingConfig, *, greedy: bool
    ) -> None:
        rows = [(len(ids), limit) for ids, limit in zip(prompt_ids, limits, strict=True)]
        longest, limit = max(rows, key=sum, default=(0, 0))
        if longest + limit > self.max_model_len:
            raise InputError(
                f"A prompt of {longest} tokens and a response of up to {limit} (max_new_tokens) exceed "
                f"the max_model_len of {self.max_model_len} that vLLM was started with; lower max_new_tokens or shorten the prompts."
            )
        if not greedy and not TEMPERATURES[0] <= sampling.temperature <= TEMPERATURES[1]:
            raise InputError(
                f"temperature is {sampling.temperature}, but vLLM supports {TEMPERATURES[0]} to {TEMPERATURES[1]}; "
                "change it, or set ppo.rollout.engine to hf."
            )

    def _gather(self, rows: list[tuple[list[int], int, int]]) -> tuple[int, list[tuple[list[int], int, int]]]:
        """The rows of all ranks that share this engine, in rank order, and the offset of this rank's rows."""
        if self.tensor_parallel_size == 1:
            return 0, rows
        from vllm.distributed import get_tp_group

        group = get_tp_group()
        gathered: list[Any] = [None] * group.world_size
        torch.distributed.all_gather_object(gathered, rows, group=group.cpu_group)
        return sum(map(len, gathered[: group.rank_in_group])), [row for rank_rows in gathered for row in rank_rows]

    def _copies(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        # vLLM holds the parts of a fused matrix (q, k and v) until it has all of them, but a trainer with sharded weights
        # has freed the first by then. So copy each, in the engine's dtype; at most one layer's copies exist at a time.
        for name, weight in self._stored_form.convert((name, weight.detach()) for name, weight in weights):
            yield name, weight.to(self.dtype, copy=True)

    def _sleep(self) -> None:
        """Free GPU memory for the updates: drop the cache and offload the weights to main memory."""
        if not self.on_cpu:
            self._llm.sleep(level=1)  # level 2 would discard the weights, so that generate would need a sync
            self._sleeping = {"weights", "kv_cache"}

    def _wake(self, tag: str) -> None:
        if tag in self._sleeping:
            self._llm.wake_up(tags=[tag])
            self._sleeping.remove(tag)


def _has_experts(model: torch.nn.Module) -> bool:
    return any("Experts" in type(module).__name__ or "FusedMoE" in type(module).__name__ for module in model.modules())


def _sample_weights(model: torch.nn.Module) -> dict[str, WeightSample]:
    """Of norms, biases and embeddings: matrices may be fused, or packed for a kernel."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    embeddings = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    }
    return {
        name: WeightSample.of(weight)
        for name, weight in model.named_parameters()
        if weight.dim() == 1 or name in embeddings
    }


def _free_weights(model: torch.nn.Module) -> None:
    """Free all weights: vLLM keeps references to them for a reload, also when it has failed or the engine is gone."""
    from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.new_empty(0)
    for module in model.modules():
        LAYERWISE_INFO.pop(module, None)


def _pack_heads(model: torch.nn.Module) -> None:
    """Pack every output head again from its weight, on a CPU.

    There the head multiplies with a packed copy that is created when it is loaded. A tied head shares the weight of the
    embeddings and is never loaded: after a sync its copy would silently remain that of the old weights.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)
