"""The engine of one process: plain torch."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from components.rlhf.config.model import TrainingSettings
from components.rlhf.engine.protocol import StepInfo
from components.rlhf.errors import InputError


class SingleProcess:
    """The group of one."""

    rank = 0
    world_size = 1

    def sum(self, x: Tensor) -> Tensor:
        return x

    def max_int(self, n: int) -> int:
        return n

    def barrier(self) -> None:
        return


class TorchEngine:
    """AdamW over whatever in the module has gradients. Implements TrainEngine.

    num_steps is the length of the learning-rate schedule; steps beyond it use its last value.
    """

    def __init__(
        self, module: nn.Module, training: TrainingSettings, *, num_steps: int, learning_rate: float | None = None
    ) -> None:
        self.module = module
        self.training = training
        self.num_steps = num_steps
        self.peak = training.learning_rate if learning_rate is None else learning_rate
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
        limit = self.training.max_grad_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), limit))
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        return StepInfo(grad_norm=norm, learning_rate=rate)

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, parameter.detach()) for name, parameter in self.module.named_parameters())

    def save(self, directory: Path) -> None:
        """Weights that are trained, and the optimiser's moments, in safetensors."""
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {f"weight/{name}": p.detach().contiguous() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"{key}/{name}"] = value.detach().contiguous()
        tensors["steps_done"] = torch.tensor(self.steps_done)
        save_file(tensors, directory / "engine.safetensors")

    def load(self, directory: Path) -> None:
        tensors = load_file(directory / "engine.safetensors")
        self.steps_done = int(tensors.pop("steps_done"))
        saved = {key.removeprefix("weight/") for key in tensors if key.startswith("weight/")}
        if saved != set(self.parameters):
            raise InputError(
                f"{directory} holds other weights than are trained here; delete the checkpoint or restore the settings."
            )
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(tensors.pop(f"weight/{name}"))
        for key, value in tensors.items():
            moment, name = key.split("/", 1)
            parameter = self.parameters[name]
            self.optimizer.state[parameter][moment] = value.to(parameter.device)  # the file was read into main memory


def learning_rate_at(step: int, training: TrainingSettings, *, peak: float, num_steps: int) -> float:
    """The learning rate of a step (from 0): linear warm-up to the peak, then constant, linear or cosine to the floor."""
    warmup = math.ceil(training.warmup_fraction * num_steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    floor = training.min_learning_rate_fraction
    progress = min((step - warmup) / max(num_steps - warmup, 1), 1.0)
    match training.schedule:
        case "constant":
            share = 1.0
        case "linear":
            share = 1 - progress * (1 - floor)
        case "cosine":
            share = floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
    return peak * share
