"""Values of rows of different lengths, stored without padding."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Ragged:
    """One value per position of each of B rows, such as hidden states; filled in and read some rows at a time."""

    def __init__(self, lengths: Tensor) -> None:
        """lengths [B] int64 are the numbers of positions."""
        self.lengths: list[int] = lengths.tolist()
        self.starts: list[int] = [0, *lengths.cumsum(0).tolist()]
        self.values: Tensor | None = None  # [sum of lengths, *]

    def put(self, rows: Tensor, padded: Tensor) -> None:
        """Store the rows [b] from a right-padded tensor [b, S, *]; the padding is dropped."""
        if self.values is None:
            self.values = torch.empty(self.starts[-1], *padded.shape[2:], dtype=padded.dtype, device=padded.device)
        for row, values in zip(rows.tolist(), padded, strict=True):
            self.values[self.starts[row] : self.starts[row + 1]] = values[: self.lengths[row]]

    def select(self, rows: Tensor) -> Tensor:
        """The rows [b], right-padded with zeros to the longest of them: [b, S, *]."""
        assert self.values is not None, "put() comes first"
        found = [self.values[self.starts[row] : self.starts[row + 1]] for row in rows.tolist()]
        return pad_sequence(found, batch_first=True)
