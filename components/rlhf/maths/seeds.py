"""Seeds of everything that a run draws at random."""

from typing import Literal

Purpose = Literal["rollout", "validation", "epoch order", "calibration", "evaluation", "turn"]
STRIDE = 1_000_003  # a prime, so that neighbouring positions of neighbouring seeds do not meet
# Per purpose: the stride of the last position, and what is added to the result.
_STREAMS: dict[Purpose, tuple[int, int]] = {
    "rollout": (STRIDE, 0),
    "validation": (STRIDE, 7_919),
    "epoch order": (1_009, 0),
    "calibration": (STRIDE, 0),
    "evaluation": (STRIDE, 500_009),
    "turn": (STRIDE, 300_007),  # after the first turn of a response, whose seed is that of the response
}


def derive_seed(purpose: Purpose, seed: int, *position: int) -> int:
    """The seed of one draw, from the seed of the run and the draw's position, such as (iteration, row).

    It depends on its arguments alone, so that a resumed run repeats the draws of an uninterrupted one. Returns an integer in
    [0, 2**63), which torch.Generator.manual_seed accepts.
    """
    last_stride, offset = _STREAMS[purpose]
    for number, index in enumerate(position, start=1):
        seed = seed * (last_stride if number == len(position) else STRIDE) + index
    return (seed + offset) % 2**63
