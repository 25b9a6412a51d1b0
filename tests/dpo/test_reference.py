"""The shares of the reference that ranks compute, and the kept output of the frozen layers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from components.dpo.reference import Reference
from components.rlhf.engine.group import SingleProcess
from tests.support.dpo_runs import examples_of, trainer_of


@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_shares_of_ranks_add_up_also_if_some_have_none(tiny_model: Path, world_size: int, frozen: int) -> None:
    """Three texts: of five ranks two repeat a text of another one, which must not count twice."""
    texts, rows = examples_of(tiny_model)[0].texts, {"train": [1, 2, 7]}
    trainer = trainer_of(tiny_model, frozen=frozen)
    total = torch.zeros(sum(texts.num_learned[row] for row in rows["train"]))
    for rank in range(world_size):
        group = SingleProcess()
        group.rank, group.world_size = rank, world_size
        reference = Reference({"train": texts}, rows, replace(trainer.context, group=group))
        reference.compute(trainer.actor, trainer.states, trainer.device, max_tokens=30)
        total += reference.values["train"]
    alone = Reference({"train": texts}, rows, trainer.context)
    alone.compute(trainer.actor, trainer.states, trainer.device, max_tokens=4096)
    assert torch.allclose(total, alone.values["train"], atol=1e-5)
    assert (alone.values["train"] < 0).all()
    mask = torch.tensor([[True] * texts.num_learned[7]])
    assert torch.equal(alone.of("train", [7], mask)[0], alone.values["train"][-texts.num_learned[7] :])


def test_rows_get_their_values_at_the_places_of_the_mask(tiny_model: Path) -> None:
    texts = examples_of(tiny_model)[0].texts
    reference = Reference({"train": texts}, {"train": [0, 3]}, trainer_of(tiny_model).context)
    sizes = [texts.num_learned[row] for row in (0, 3)]
    reference.values["train"] = -torch.arange(1.0, sum(sizes) + 1)
    width = max(sizes) + 1
    mask = torch.arange(width)[None] < torch.tensor(sizes[::-1])[:, None]
    found = reference.of("train", [3, 0], mask)
    assert found[0, : sizes[1]].tolist() == [-1.0 - sizes[0] - n for n in range(sizes[1])]
    assert found[1, : sizes[0]].tolist() == [-1.0 - n for n in range(sizes[0])]
    assert (found[~mask] == 0).all()
