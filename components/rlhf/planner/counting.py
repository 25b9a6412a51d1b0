"""The shape of a model whose tensors are known: every parameter is counted where it is."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping

from components.rlhf.planner.estimate import Sizes
from components.rlhf.planner.headers import Tensors
from components.rlhf.planner.shape import Linear, ModelShape

IN_LAYER = re.compile(r"^(.*?)\.(\d+)\.(.+)$")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_layer|head|score)\.")
EMBEDDING = re.compile(r"(^|\.)(\w*emb\w*|wte|wpe)\.", re.IGNORECASE)
EXPERT = re.compile(r"(^|\.)experts?\.")
GGUF_NAMES = {"token_embd.": "embed_tokens.", "blk.": "layers.", "output.weight": "lm_head.weight"}
GGUF_MODULES = {
    "attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj",
    "ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj",
}  # fmt: skip


def count(tensors: Tensors, sizes: Sizes, name: str) -> ModelShape:
    """The shape from the headers of all tensors, with the widths of config.json."""
    prefix = _layers_prefix(tensors, sizes.num_layers)
    layers: Counter[int] = Counter()
    linears, experts, embeddings, head, rest = [], 0, 0, 0, 0
    for key, tensor in tensors.items():
        match = IN_LAYER.match(key)
        if match and match[1] == prefix:
            layer, module = int(match[2]), match[3]
            layers[layer] += tensor.size
            if EXPERT.search(module):
                experts += tensor.size
            elif module.endswith(".weight") and len(tensor.shape) == 2:
                outputs, inputs = tensor.shape
                linears.append(Linear(layer=layer, name=module.split(".")[-2], inputs=inputs, outputs=outputs))
        elif HEAD.search(key):
            head += tensor.size
        elif EMBEDDING.search(key):
            embeddings += tensor.size
        else:
            rest += tensor.size
    if sizes.tied and head and embeddings:  # stored although it is the embedding
        head = 0
    return ModelShape(
        name=name,
        exact=True,
        **sizes.widths(),
        embeddings=embeddings,
        head=head,
        layers=tuple(layers[number] for number in range(max(sizes.num_layers, 1 + max(layers, default=-1)))),
        rest=rest,
        largest=max((tensor.size for tensor in tensors.values()), default=0),
        linears=tuple(linears),
        experts=experts,
        expert_share=sizes.expert_share,
        stored_bytes=sum(tensor.num_bytes for tensor in tensors.values()),
    )


def _layers_prefix(tensors: Tensors, num_layers: int) -> str:
    """The name before the number of a layer: of the prefixes with a number for each layer, the one with the most parameters."""
    numbers: Mapping[str, set[int]] = defaultdict(set)
    sizes: Counter[str] = Counter()
    for key, tensor in tensors.items():
        if match := IN_LAYER.match(key):
            numbers[match[1]].add(int(match[2]))
            sizes[match[1]] += tensor.size
    complete = [prefix for prefix, found in numbers.items() if len(found) == num_layers]
    return max(complete or sizes, key=sizes.__getitem__, default="")


def from_gguf(tensors: Tensors) -> Tensors:
    """The tensors of a GGUF file under names as in safetensors files."""
    renamed = {}
    for key, tensor in tensors.items():
        for old, new in GGUF_NAMES.items():
            if key.startswith(old):
                key = new + key[len(old) :]
        for old, new in GGUF_MODULES.items():
            key = key.replace(f".{old}.", f".{new}.")
        renamed[key] = tensor
    return renamed
