"""The engine without sharding: plain torch on every rank."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from components.rlhf.config.model import TrainingConfig
from components.rlhf.engine.group import SINGLE_PROCESS
from components.rlhf.engine.protocol import Group, StepInfo
from components.rlhf.engine.schedule import learning_rate_at
from components.rlhf.text.errors import InputError

BUCKET = 2**24  # gradients that are reduced at once: 64 MiB in fp32


class TorchEngine:
    """AdamW over the parameters of the module that require gradients. Implements TrainEngine.

    num_steps is the length of the learning-rate schedule; later steps use its last value. Gradients are summed over the ranks
    of the group, which all hold the same weights and take the same step.
    """

    def __init__(
        self,
        module: nn.Module,
        training: TrainingConfig,
        *,
        num_steps: int,
        group: Group = SINGLE_PROCESS,
    ) -> None:
        self.module, self.training, self.group = module, training, group
        self.num_steps = num_steps
        self.peak = training.learning_rate
        self.steps_done = 0
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=self.peak,
            betas=(0.9, 0.95),
            weight_decay=training.weight_decay,
            fused=True,
        )

    def backward(self, loss: Tensor, last: bool) -> None:
        torch.autograd.backward(loss)

    def step(self) -> StepInfo:
        rate = learning_rate_at(self.steps_done, self.training, peak=self.peak, num_steps=self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._sum_gradients()
        limit = self.training.max_grad_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), limit))
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        return StepInfo(grad_norm=norm, learning_rate=rate)

    def _sum_gradients(self) -> None:
        """Sum the gradients over the ranks, many at a time: each reduction waits for the slowest rank."""
        if self.group.world_size == 1:
            return
        for bucket in _buckets(list(self.parameters.values())):
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
            for parameter in bucket:
                parameter.grad = None
            sums = torch.split(self.group.sum(flat), [parameter.numel() for parameter in bucket])
            for parameter, total in zip(bucket, sums, strict=True):
                parameter.grad = total.view_as(parameter)

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, parameter.detach()) for name, parameter in self.module.named_parameters())

    def snapshot(self, *, moments: bool = True) -> dict[str, Tensor]:
        """Trained weights and the optimizer's moments; all ranks hold the same, so rank 0 has all of it."""
        if self.group.rank > 0:
            return {}
        tensors = {f"weight/{name}": _copy_to_cpu(p) for name, p in self.parameters.items()}
        for name, p in self.parameters.items() if moments else ():
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"{key}/{name}"] = _copy_to_cpu(value)
        tensors["steps_done"] = torch.tensor(self.steps_done)
        return tensors

    def load(self, directory: Path) -> None:
        tensors = load_file(directory / "engine-00000.safetensors")
        self.steps_done = int(tensors.pop("steps_done"))
        saved = {key.removeprefix("weight/") for key in tensors if key.startswith("weight/")}
        if saved != set(self.parameters):
            raise InputError(
                f"{directory} holds a different set of trained weights; delete the checkpoint or restore the settings."
            )
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(tensors.pop(f"weight/{name}"))
        self.optimizer.state.clear()  # a snapshot before the first step has none
        for key, value in tensors.items():
            moment, name = key.split("/", 1)
            parameter = self.parameters[name]
            self.optimizer.state[parameter][moment] = value.to(parameter.device)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters of the same dtype, together at most BUCKET values or a single parameter."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        full = sum(p.numel() for p in bucket) + parameter.numel() > BUCKET
        if bucket and (full or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def _copy_to_cpu(x: Tensor) -> Tensor:
    """A copy in main memory that the next step does not change."""
    return x.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
