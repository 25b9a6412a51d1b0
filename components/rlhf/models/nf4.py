"""Frozen linear layers in 4 bits, for QLoRA (Dettmers et al. 2023): NF4 in blocks of 64 values, whose scales are quantized too.

The kernels are those of bitsandbytes, on GPUs and CPUs. A weight that an earlier stage has trained is 4 bits plus the low-rank update
of that stage, and artifacts carry this form (`save_nf4`): quantizing the merged weight again would lose nearly all of the update,
because it is smaller than the distance between two of the 16 values.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from components.rlhf.models.layers import layers_of
from components.rlhf.models.precision import default_device
from components.rlhf.text.errors import InputError

BLOCK = 64  # values with one scale
SCALE_BLOCK = 256  # scales with one scale of their own
ALIGNMENT = 16  # bytes, of each part of the packed form
FOLDER = "nf4"  # of an artifact
FILE = f"{FOLDER}/weights.safetensors"
PACKED, LOW_RANK = "nf4", "nf4_low_rank"  # names of the parameters of a layer
ROUNDING = 2.0**-7  # of the largest value of a weight: more than bf16 rounds a merged weight by

# It would say in every log that it did not find a kernel for sampling, which is not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class Nf4Linear(nn.Linear):
    """A frozen linear layer with its weight in 4 bits, and optionally a low-rank part: W = dequantized + B A.

    All its parameters but the bias are bytes, which no cast of a model to another precision changes. `weight` is W [out, in] in dtype,
    computed when it is read, for code that does not call the layer.
    """

    def __init__(
        self,
        size: tuple[int, int],
        packed: Tensor,
        *,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        low_rank: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """size is (out, in); packed is that of pack(); low_rank is (A [r, in], B [out, r]) in fp32."""
        nn.Module.__init__(self)
        self.out_features, self.in_features = size
        self.dtype = dtype
        self.nf4 = nn.Parameter(packed, requires_grad=False)
        self.nf4_low_rank: nn.Parameter | None
        factors = None if low_rank is None else torch.cat([_as_bytes(factor) for factor in low_rank])
        self.register_parameter(LOW_RANK, None if factors is None else nn.Parameter(factors, requires_grad=False))
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.dequantized(self.dtype)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """W [out, in], computed in fp32 and rounded once."""
        size = (self.out_features, self.in_features)
        factors = self.low_rank_factors()
        if factors is None:
            return unpack(self.nf4, size, dtype)
        a, b = factors
        return torch.addmm(unpack(self.nf4, size, torch.float32), b, a).to(dtype)

    def low_rank_factors(self) -> tuple[Tensor, Tensor] | None:
        """A [r, in] and B [out, r] in fp32."""
        if self.nf4_low_rank is None:
            return None
        values = self.nf4_low_rank.data.view(torch.float32)
        rank = len(values) // (self.in_features + self.out_features)
        a, b = torch.split(values, [rank * self.in_features, rank * self.out_features])
        return a.view(rank, self.in_features), b.view(self.out_features, rank)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return cast(Tensor, _Multiply.apply(x.to(dtype), self, bias))  # type: ignore[no-untyped-call]


class _Multiply(torch.autograd.Function):
    """x W^T + bias. The backward pass computes W again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Nf4Linear, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        # W is computed in fp32 and not under autocast, which would round the low-rank part by itself.
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x, layer.dequantized(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        with torch.autocast(grad.device.type, enabled=False):
            return grad @ ctx.layer.dequantized(grad.dtype), None, None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Sizes of the packed form of a weight of n values, which is the parts in this order, each padded to a multiple of ALIGNMENT."""

    codes: int  # bytes with two 4-bit codes
    scales: int  # 8-bit codes, one per block of values
    scale_scales: int  # fp32, one per block of scales, and the mean of the scales

    @classmethod
    def of(cls, n: int) -> "Parts":
        blocks = -(-n // BLOCK)
        return cls(codes=blocks * BLOCK // 2, scales=blocks, scale_scales=4 * (-(-blocks // SCALE_BLOCK) + 1))

    def split(self, packed: Tensor) -> list[Tensor]:
        sizes = (self.codes, self.scales, self.scale_scales)
        parts = torch.split(packed, [_padded(size) for size in sizes])
        return [part[:size] for part, size in zip(parts, sizes, strict=True)]


def pack(weight: Tensor) -> Tensor:
    """The packed form [bytes] uint8 of a weight [out, in], on its device. It is quantized on the GPU if there is one."""
    functional = _bitsandbytes()
    values = weight.detach().to(default_device(), torch.float32).flatten()
    blocks = nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    codes, state = functional.quantize_4bit(blocks, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    parts = (codes, state.absmax, torch.cat([state.state2.absmax.float(), state.offset.float().view(1)]))
    flat = [_as_bytes(part) for part in parts]
    return torch.cat([nn.functional.pad(part, (0, _padded(len(part)) - len(part))) for part in flat]).to(weight.device)


def unpack(packed: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight [out, in] of a packed form.

    It is dequantized as a matrix of whole blocks: of rows that begin within a block the CPU kernel of bitsandbytes 0.50.2 mixes up
    the scales.
    """
    functional = _bitsandbytes()
    codes, scales, scale_scales = Parts.of(size[0] * size[1]).split(packed.detach())
    floats = scale_scales.view(torch.float32)
    absmax = functional.dequantize_blockwise(scales, absmax=floats[:-1], blocksize=SCALE_BLOCK) + floats[-1]
    shape = torch.Size((len(scales), BLOCK))
    state = functional.QuantState(absmax=absmax, shape=shape, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
    values = cast(Tensor, functional.dequantize_4bit(codes[:, None], state))
    return values.view(-1)[: size[0] * size[1]].view(size)


def quantize_layers(model: Any, directory: Path | None, *, dtype: torch.dtype) -> None:
    """Replace the linear layers of all decoder layers by Nf4Linear, one by one, so that each weight is freed before the next.

    From the 4-bit form in directory if it is the folder of an artifact that has one. What is not a plain linear layer, such as
    experts in one tensor, stays as it is. dtype is the precision that the model computes in. Raises InputError.
    """
    found = linear_layers(model)
    if not found:
        raise InputError(
            f"{type(model).__name__} has no linear layers that could be kept in 4 bits; set model.lora.quantization to null."
        )
    file = None if directory is None else directory / FILE
    stored = _read(file) if file is not None and file.is_file() else {}
    for (name, linear), (parent, child) in zip(found.items(), _places(model, found.values()), strict=True):
        if not stored:
            layer = _nf4_of(linear, pack(linear.weight), dtype=dtype)
        elif (read := _stored_layer(linear, name, stored, dtype=dtype)) is not None:
            layer = read
        else:
            raise InputError(f"{file} does not belong to the weights beside it ({name}); delete the folder {FOLDER}.")
        parent._modules[child] = layer


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """The plain linear layers of all decoder layers, by number of the layer and name within it, except those that share a weight."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {
        f"{number}.{name}": module
        for number, layer in enumerate(layers_of(model))
        for name, module in layer.named_modules()
        if type(module) is nn.Linear and owners[id(module.weight)] == 1
    }


def share_in_4_bits(model: Any) -> float:
    """The share of the parameters of the decoder layers that quantize_layers keeps in 4 bits."""
    total = sum(p.numel() for p in layers_of(model).parameters())
    return sum(linear.weight.numel() for linear in linear_layers(model).values()) / max(total, 1)


def save_nf4(lm: Any, weights: Mapping[str, Tensor], directory: Path, *, adapter: str, scale: float) -> None:
    """Write the 4-bit form of a model with its low-rank updates, those of its adapters (from weights) included.

    For layer N: `N.NAME.nf4` are the bytes of pack(), `N.NAME.A` [r, in] and `N.NAME.B` [out, r] the update in fp32.
    """
    tensors = {}
    names = {module: name for name, module in lm.named_modules()}
    for number, layer in enumerate(layers_of(lm)):
        for path, module in layer.named_modules():
            if not isinstance(module, Nf4Linear):
                continue
            path = path.removesuffix(".base_layer")
            tensors[f"{number}.{path}.nf4"] = module.nf4.detach().cpu().contiguous()
            factors = module.low_rank_factors()
            pairs = [] if factors is None else [(factors[0].cpu(), factors[1].cpu())]
            owner = names[module].removesuffix(".base_layer")
            if (a := weights.get(f"{owner}.lora_A.{adapter}.weight")) is not None:
                pairs.append((a.float().cpu(), scale * weights[f"{owner}.lora_B.{adapter}.weight"].float().cpu()))
            if pairs:
                tensors[f"{number}.{path}.A"] = torch.cat([a for a, _ in pairs])
                tensors[f"{number}.{path}.B"] = torch.cat([b for _, b in pairs], dim=1)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "weights.safetensors")


def _nf4_of(
    linear: nn.Linear, packed: Tensor, *, dtype: torch.dtype, low_rank: tuple[Tensor, Tensor] | None = None
) -> Nf4Linear:
    size = (linear.out_features, linear.in_features)
    layer = Nf4Linear(size, packed, bias=linear.bias, dtype=dtype, low_rank=low_rank)
    return layer.requires_grad_(False).train(linear.training)


def _stored_layer(
    linear: nn.Linear, name: str, stored: Mapping[str, Callable[[], Tensor]], *, dtype: torch.dtype
) -> Nf4Linear | None:
    """The layer of a stored 4-bit form, or None if that is not the form of this merged weight, up to rounding."""
    packed, a, b = (stored[key]() if (key := f"{name}.{part}") in stored else None for part in ("nf4", "A", "B"))
    num_bytes = sum(map(_padded, vars(Parts.of(linear.weight.numel())).values()))
    if packed is None or packed.dtype != torch.uint8 or packed.shape != (num_bytes,) or (a is None) != (b is None):
        return None
    low_rank = None
    if a is not None and b is not None:
        shapes = ((len(a), linear.in_features), (linear.out_features, len(a)))
        if (a.shape, b.shape) != shapes or {a.dtype, b.dtype} != {torch.float32}:
            return None
        low_rank = (a, b)
    layer, merged = _nf4_of(linear, packed, dtype=dtype, low_rank=low_rank), linear.weight.detach().float()
    gap = (layer.dequantized(torch.float32) - merged).abs().max()
    return layer if gap <= ROUNDING * merged.abs().max() else None


def _places(model: Any, modules: Any) -> list[tuple[nn.Module, str]]:
    """The parent of each module and its name there."""
    places = {id(child): (parent, name) for parent in model.modules() for name, child in parent._modules.items()}
    return [places[id(module)] for module in modules]


def _read(file: Path) -> dict[str, Callable[[], Tensor]]:
    """Functions that read one tensor of a file, by its name."""
    try:
        opened: Any = safe_open(file, framework="pt")
    except Exception as error:  # a broken file raises any type
        raise InputError(f"{file} cannot be read ({error}); delete the folder {FOLDER}.") from error
    return {name: lambda name=name: opened.get_tensor(name) for name in opened.keys()}  # type: ignore[misc]  # noqa: SIM118


def _as_bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional  # takes seconds to import, and few runs need it
    except ImportError as error:
        raise InputError(
            f"model.lora.quantization needs bitsandbytes, which cannot be imported here ({error}); "
            "run pip install bitsandbytes, or set it to null."
        ) from error
    return bitsandbytes.functional
