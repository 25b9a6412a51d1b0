"""Bytes of temporary tensors: activations that a backward pass needs, logits, caches of sampling, and work space of a forward pass."""

from dataclasses import dataclass

from components.rlhf.config.model import LoraConfig, SamplingConfig, TrainingConfig
from components.rlhf.planner.constants import CACHE_ROOM, MAX_LOGITS, MAX_LOGITS_ON_GPU
from components.rlhf.planner.copies import Numeric
from components.rlhf.planner.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward and backward pass of a trained model over this many tokens, of which some are answers."""

    shape: ModelShape
    tokens: int
    answer_tokens: int
    frozen_layers: int
    lora: LoraConfig | None
    training: TrainingConfig
    numeric: Numeric
    sampling: SamplingConfig | None = None  # of the answers, if they were sampled: its controls change the logits
    with_entropy: bool = False  # whether the entropy of each answer token has a gradient

    @property
    def is_bf16_throughout(self) -> bool:
        """Whether the weights, and therefore the hidden states between layers, are in bf16."""
        return self.numeric.bf16 and (self.training.engine == "deepspeed" or self.lora is not None)

    @property
    def stream(self) -> int:
        """Bytes of a value of the hidden states between layers."""
        return 2 if self.is_bf16_throughout else 4


def saved_per_token(run: Pass) -> int:
    """Bytes that autograd keeps for one token in one layer of the Llama family, without gradient checkpointing.

    The feed-forward layer keeps the gate, its activation, the other half and their product; attention its queries, keys, values and
    output, and the output again as the input of the next matrix. The rest are the states around both norms: in fp32 the input, its
    normalized form and the result; under autocast the first two, and copies of the result in bf16; with frozen norms the form is not kept.
    tests/rlhf/planner/test_activations.py counts what autograd keeps.
    """
    shape, width = run.shape, run.numeric.width
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    feed_forward = (4 if shape.gated else 2) * shape.intermediate * width
    attention = (3 * queries + 2 * keys) * width
    if not run.numeric.bf16:
        norms = 16 if run.lora else 24
    elif run.lora:
        norms = 18
    else:
        norms = 16 if run.is_bf16_throughout else 24
    saved = feed_forward + attention + norms * shape.hidden
    if run.lora:
        _, count = shape.adapter_outputs(run.lora.target_modules, run.frozen_layers)
        trained_layers = max(shape.num_layers - run.frozen_layers, 1)
        saved += 4 * run.lora.rank * count // trained_layers
    return saved


def saved_activations(run: Pass) -> int:
    """Bytes that autograd keeps for the layers that are trained."""
    layers = run.shape.num_layers - run.frozen_layers
    per_layer = saved_per_token(run) * run.tokens
    between = run.stream * run.shape.hidden * run.tokens
    if run.training.gradient_checkpointing:
        return layers * between + per_layer
    return layers * per_layer


def backward_workspace(run: Pass) -> int:
    """Gradients of the activations of one layer, and of its largest tensor while it is added to those before."""
    shape, width = run.shape, run.numeric.width
    activations = run.tokens * (3 * shape.intermediate * width + 2 * shape.hidden * run.stream)
    adapters = 0
    if run.lora:  # the output of each adapter beside that of its module
        outputs, _ = shape.adapter_outputs(run.lora.target_modules, run.frozen_layers)
        adapters = 2 * width * run.tokens * outputs // max(shape.num_layers - run.frozen_layers, 1)
    return activations + adapters


def lost_to_adapters(run: Pass) -> int:
    """Bytes that the modules with adapters allocate and free in a forward pass, and that a heap does not reuse: outputs, and weights that
    are dequantized for a matrix product."""
    if run.lora is None:
        return 0
    outputs, _ = run.shape.adapter_outputs(run.lora.target_modules, run.frozen_layers)
    layers = max(run.shape.num_layers - run.frozen_layers, 1)
    once = run.numeric.width * run.tokens * outputs
    once += run.numeric.width * run.shape.linear_parameters if run.lora.quantization else 0
    return once // layers if run.training.gradient_checkpointing else once


def logits(
    shape: ModelShape,
    answer_tokens: int,
    numeric: Numeric,
    sampling: SamplingConfig | None,
    *,
    with_entropy: bool = False,
) -> int:
    """Bytes of the logits that exist at once: in the head's precision, their log-probs, a gradient, and what sampling controls add.

    An entropy with a gradient has log-probs and a gradient of its own.
    """
    # On a GPU the logits are converted, divided by the temperature and normalized as a whole, on a CPU a few rows at a time.
    each = 2 * numeric.width + (12 if numeric.on_gpu else 4) + _control_bytes(sampling, numeric.width)
    each += 8 if with_entropy else 0
    return _num_logits(shape, answer_tokens, numeric) * each


def kl_logits(shape: ModelShape, answer_tokens: int, numeric: Numeric, sampling: SamplingConfig) -> int:
    """Bytes of the logits of two models and of their exact KL (maths/kl.py), in which five tensors in fp32 exist at once.

    Masked stop tokens and the controls of sampling copy the logits.
    """
    each = (
        2 * numeric.width * (2 if sampling.min_new_tokens else 1) + 5 * 4 + 2 * _control_bytes(sampling, numeric.width)
    )
    return _num_logits(shape, answer_tokens, numeric) * each


def _control_bytes(sampling: SamplingConfig | None, width: int) -> int:
    """Bytes for each logit that sampling controls add: copies in the precision of the logits, and masks."""
    if sampling is None:
        return 0
    truncates = sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0
    return (width + 3 if truncates else 0) + (2 * width + 3 if sampling.repetition_penalty != 1 else 0)


def _num_logits(shape: ModelShape, answer_tokens: int, numeric: Numeric) -> int:
    """How many logits of one model are computed at once."""
    limit = max((MAX_LOGITS_ON_GPU if numeric.on_gpu else MAX_LOGITS) // shape.vocab, 1)
    return min(limit, max(answer_tokens, 1)) * shape.vocab


def forward_workspace(shape: ModelShape, tokens: int, numeric: Numeric) -> int:
    """Temporary tensors of a forward pass without gradients: those of one layer, and the last hidden states."""
    queries = shape.num_heads * shape.head_dim
    return tokens * (3 * shape.intermediate * numeric.width + 4 * queries * numeric.width + 12 * shape.hidden)


def cache(shape: ModelShape, sequences: int, tokens: int, numeric: Numeric) -> int:
    """Keys and values of sequences of this length."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * numeric.width * sequences * tokens


def sampling_workspace(
    shape: ModelShape, rows: int, prompt: int, sampling: SamplingConfig, numeric: Numeric, *, in_turns: bool = False
) -> dict[str, int]:
    """Temporary tensors of transformers sampling for at most batch_size of `rows` prompts of this length.

    in_turns: the last turn of a response begins with one pass over all that was said before, not only over the prompt.
    """
    read = prompt + sampling.max_new_tokens if in_turns else prompt
    rows = min(rows, sampling.batch_size)
    length = prompt + sampling.max_new_tokens + CACHE_ROOM
    return {
        "KV cache": cache(shape, rows, length, numeric) * (shape.num_layers + 1) // shape.num_layers,
        "activations": forward_workspace(shape, rows * read, numeric),
        "logits": rows * shape.vocab * (numeric.width + 12 + _control_bytes(sampling, 4)),
    }
