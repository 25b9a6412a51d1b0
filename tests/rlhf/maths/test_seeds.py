import pytest
import torch

from components.rlhf.maths.seeds import Purpose, derive_seed


@pytest.mark.parametrize(
    ("purpose", "position", "expected"),
    [
        ("rollout", (4, 7), (3 * 1_000_003 + 4) * 1_000_003 + 7),
        ("validation", (7,), 3 * 1_000_003 + 7 + 7_919),
        ("epoch order", (4, 1), (3 * 1_000_003 + 4) * 1_009 + 1),
        ("calibration", (7,), 3 * 1_000_003 + 7),
        ("evaluation", (7,), 3 * 1_000_003 + 7 + 500_009),
    ],
)
def test_seed_follows_from_purpose_run_and_position(purpose: Purpose, position: tuple[int, ...], expected: int) -> None:
    assert derive_seed(purpose, 3, *position) == expected


def test_rows_of_neighbouring_iterations_and_runs_have_different_seeds() -> None:
    seeds = [derive_seed("rollout", seed, i, row) for seed in range(4) for i in range(8) for row in range(64)]
    assert len(set(seeds)) == len(seeds)


def test_seed_of_the_largest_run_seed_fits_a_torch_generator() -> None:
    seed = derive_seed("rollout", 2**31 - 1, 10**6, 10**6)
    assert torch.Generator().manual_seed(seed).initial_seed() == seed
