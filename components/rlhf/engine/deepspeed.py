"""The engine that shards: DeepSpeed ZeRO."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from components.rlhf.config.model import TrainingConfig
from components.rlhf.engine.protocol import Group, StepInfo
from components.rlhf.engine.schedule import learning_rate_at
from components.rlhf.engine.split import split_evenly
from components.rlhf.text.errors import InputError

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
import deepspeed
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
    set_z3_leaf_module,
)

MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedEngine:
    """AdamW in fp32 over weights in dtype, sharded according to zero_stage. Implements TrainEngine.

    Losses are shares of one loss, already divided by the token count of the whole step, so gradients are summed over
    microbatches and ranks. DeepSpeed averages over both; that is undone here.

    A checkpoint holds whole tensors, each written by one rank, so a run can resume with any number of ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        training: TrainingConfig,
        *,
        num_steps: int,
        group: Group,
        dtype: torch.dtype,
    ) -> None:
        self.module, self.training, self.group = module, training, group
        self.num_steps = num_steps
        self.peak = training.learning_rate
        self.steps_done = 0
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=self.peak, betas=(0.9, 0.95), weight_decay=training.weight_decay
        )
        init_deepspeed()
        _gather_experts_together(module)
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=deepspeed_config(training, dtype=dtype, world_size=group.world_size),
            dist_init_required=False,
        )
        self._allocate_moments()

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed 0.19 does the next two things in its forward(), but here modules are called directly. Without the first,
        # stage 3 drops the gradients of earlier microbatches; without the second, stage 1 counts them twice in bf16.
        self.optimizer.clear_backward_seen_flag()
        scaled = loss * self.group.world_size
        scaled.register_hook(lambda _: self.engine._backward_prologue())  # type: ignore[no-untyped-call]
        self.engine.backward(scaled, scale_wrt_gas=False)

    def step(self) -> StepInfo:
        rate = learning_rate_at(self.steps_done, self.training, peak=self.peak, num_steps=self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()
        self.steps_done += 1
        return StepInfo(grad_norm=float(self.engine.get_global_grad_norm() or 0.0), learning_rate=rate)

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from whole_weights(self.module)

    def snapshot(self, *, moments: bool = True) -> dict[str, Tensor]:
        """Trained weights in fp32 and the optimizer's moments, of whole parameters: of each rank at most its share and one parameter."""
        tensors = {"steps_done": torch.tensor(self.steps_done)}
        sizes = {name: _whole_size(parameter) for name, parameter in self.parameters.items()}
        owners = split_evenly(sizes, self.group.world_size)
        for name, parameter in self.parameters.items():
            for key in ("weight", *MOMENTS) if moments else ("weight",):
                value = self._read(parameter, key)
                if owners[name] == self.group.rank:
                    tensors[f"{key}/{name}"] = value.to("cpu", copy=True, memory_format=torch.contiguous_format)
        return tensors

    def load(self, directory: Path) -> None:
        files: list[Any] = [safe_open(path, framework="pt") for path in sorted(directory.glob("engine*.safetensors"))]
        where = {key: file for file in files for key in file.keys()}  # noqa: SIM118
        self.steps_done = int(where.pop("steps_done").get_tensor("steps_done"))
        weights, moments = (
            {f"{key}/{name}" for key in keys for name in self.parameters} for keys in (("weight",), MOMENTS)
        )
        if set(where) not in (weights, weights | moments):
            raise InputError(
                f"{directory} holds a different set of trained weights; delete the checkpoint or restore the settings."
            )
        for name, parameter in self.parameters.items():
            weight = where[f"weight/{name}"].get_tensor(f"weight/{name}")
            self._write(parameter, "weight", weight)
            for key in MOMENTS:
                found = where.get(f"{key}/{name}")
                self._write(
                    parameter, key, found.get_tensor(f"{key}/{name}") if found is not None else torch.zeros_like(weight)
                )
        self._set_adam_step(self.steps_done if moments <= set(where) else 0)

    def _read(self, parameter: nn.Parameter, key: str) -> Tensor:
        """The whole fp32 weight or moment, on every rank."""
        sharded = (
            safe_get_full_fp32_param(parameter) if key == "weight" else safe_get_full_optimizer_state(parameter, key)
        )
        found: Tensor = sharded.detach()
        return found

    @torch.no_grad()
    def _write(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        if self.training.zero_stage == 3:
            # DeepSpeed's setter for whole values fails when their number is not divisible: the last rank's share is padded.
            size = cast(Any, parameter).ds_tensor.numel()
            share = value.flatten()[size * self.group.rank :][:size]
            share = nn.functional.pad(share, (0, size - share.numel()))
            if key == "weight":
                safe_set_local_fp32_param(parameter, share)
            else:
                safe_set_local_optimizer_state(parameter, share, key)
        elif key == "weight":
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)
        if key == "weight":
            with gathered(parameter, changed=True):  # the weight that the forward pass uses
                parameter.copy_(value)

    @torch.no_grad()
    def _allocate_moments(self) -> None:
        """Allocate Adam's state before the first step, so that a checkpoint can be loaded into it."""
        inner = self.optimizer.optimizer
        stage3 = self.training.zero_stage == 3
        flats = self.optimizer.fp32_partitioned_groups_flat if stage3 else [g["params"][0] for g in inner.param_groups]
        for flat in flats:
            inner.state[flat] = {key: torch.zeros_like(flat) for key in MOMENTS}
        if not stage3:
            self.optimizer._lazy_init_hp_params_optimizer_state()
        self._set_adam_step(0)

    def _set_adam_step(self, number: int) -> None:
        for state in self.optimizer.optimizer.state.values():
            state["step"] = torch.tensor(float(number))


class WeightShards:
    """Shards the weights of a model over the ranks (ZeRO-3) one after another, while they are loaded.

    A parameter given to it must be whole and equal on every rank; no rank talks to another, except to compare.
    """

    def __init__(self, training: TrainingConfig, *, group: Group, dtype: torch.dtype) -> None:
        init_deepspeed()
        config = deepspeed_config(training, dtype=dtype, world_size=group.world_size)
        self.group = group
        # Around an empty module, because its own conversion would send every whole weight from rank 0 to the others.
        self.context = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=config)
        self.scratch = torch.empty(0, dtype=torch.uint8, device=self.context.local_device)

    def __call__(self, parameter: nn.Parameter, dtype: torch.dtype) -> None:
        """Cast a parameter, and keep only this rank's share; nothing if it is already sharded."""
        if hasattr(parameter, "ds_id"):
            return
        whole, device = parameter.data, self.context.local_device
        if (whole.device, whole.dtype) != (device, dtype):
            parameter.data = self._scratch_for(whole, dtype).copy_(whole)
        self.context._convert_to_deepspeed_param(parameter)
        cast(Any, parameter).partition()

    def _scratch_for(self, whole: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory for one whole weight, the same for all of them: between the shards, freed pieces would add up."""
        size = whole.numel() * dtype.itemsize
        if self.scratch.nbytes < size:
            del self.scratch
            self.scratch = torch.empty(size, dtype=torch.uint8, device=self.context.local_device)
        return self.scratch[:size].view(dtype).view(whole.shape)

    def equal(self, first: nn.Parameter, second: nn.Parameter) -> bool:
        """Whether two sharded parameters have the same values. Collective."""
        own, other = (_share(parameter) for parameter in (first, second))
        differ = own.shape != other.shape or not torch.equal(own, other)
        return self.group.max_int(int(differ)) == 0


def _whole_size(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _share(parameter: Any) -> Tensor:
    """This rank's share of a sharded parameter, without the padding of the last rank."""
    shard: Tensor = parameter.ds_tensor
    start = parameter.ds_zero_partition_rank * shard.numel()
    return shard[: max(parameter.ds_numel - start, 0)]


def shard_frozen_model(module: nn.Module, training: TrainingConfig, *, group: Group, dtype: torch.dtype) -> None:
    """Shard a module that is not trained over the ranks; each layer is gathered while it computes."""
    init_deepspeed()
    config = deepspeed_config(training, dtype=dtype, world_size=group.world_size)
    _gather_experts_together(module)
    deepspeed.initialize(model=module, config=config, dist_init_required=False)
    # DeepSpeed keeps small weights whole, but only from their first use on, and some models use one outside of its module's forward.
    parameters: list[Any] = list(module.parameters())
    small = [parameter for parameter in parameters if parameter.ds_persist]
    if small:
        small[0].all_gather(small)


def whole_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """One weight at a time: under stage 3 a rank holds its shards and the one gathered weight. Every rank calls it."""
    for name, parameter in module.named_parameters():
        with gathered(parameter):
            yield name, parameter.detach()


@torch.no_grad()
def free_shards(module: nn.Module) -> None:
    """Free the weights of a sharded module that is not needed any more: DeepSpeed keeps references to every module it has seen."""
    for parameter in module.parameters():
        for held in (parameter, cast(Any, parameter).ds_tensor):
            held.data = held.data.new_empty(0)


def _gather_experts_together(module: nn.Module) -> None:
    """Make ZeRO-3 gather all experts of a layer at once where they are a list of modules, or one module that is called for each.

    Which experts run depends on the tokens of a rank, and gathering them one by one is collective: ranks would wait for each other.
    Experts that are computed by one call, as in most models, need nothing.
    """
    for parent in list(module.modules()):
        experts = parent._modules.get("experts")
        if isinstance(experts, nn.ModuleList | nn.ModuleDict):
            set_z3_leaf_module(parent, True)
        elif experts is not None and sum(any(True for _ in child.parameters()) for child in experts.children()) == 1:
            set_z3_leaf_module(experts, True)


def gathered(parameter: nn.Parameter, *, changed: bool = False) -> Any:
    """Gather a parameter on every rank within the block; with changed=True all ranks must write the same values to it."""
    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if changed else None)


def init_deepspeed() -> None:
    """Initialize DeepSpeed on torch's process group, or on a new group of one process."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # A shared-memory extension that DeepSpeed would compile for minutes before the first collective on a CPU.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed requires it even in a single process
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, dist_init_required=False)


def deepspeed_config(training: TrainingConfig, *, dtype: torch.dtype, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration (https://www.deepspeed.ai/docs/config-json)."""
    zero: dict[str, Any] = {
        "stage": training.zero_stage,
        "overlap_comm": torch.cuda.is_available(),
        "contiguous_gradients": True,
        "stage3_param_persistence_threshold": 10_000,
    }
    if training.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # unused: batches are built elsewhere
        "gradient_accumulation_steps": 1,  # unused: backward() sets the boundary of a step
        "train_batch_size": world_size,
        "gradient_clipping": training.max_grad_norm,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # its CPU Adam is compiled for minutes at first use
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},  # summing many microbatches in bf16 loses precision
        "steps_per_print": 2**31,
    }
