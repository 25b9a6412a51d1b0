import pytest
import torch

from components.rlhf.engine.split import split_evenly


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_parameters_are_split_so_that_no_rank_has_more_than_its_share_and_one_of_them(num_ranks: int) -> None:
    generator = torch.Generator().manual_seed(num_ranks)
    sizes = {f"p{i}": int(2 ** (20 * torch.rand((), generator=generator))) for i in range(60)}
    owners = split_evenly(sizes, num_ranks)
    assert owners.keys() == sizes.keys()
    assert set(owners.values()) == set(range(num_ranks))
    for rank in range(num_ranks):
        held = sum(size for name, size in sizes.items() if owners[name] == rank)
        assert held <= sum(sizes.values()) / num_ranks + max(sizes.values())
