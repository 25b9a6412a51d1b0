"""Counts what happens to the records of a source, and rejects a source of which too little is usable."""

from collections import Counter
from dataclasses import dataclass, field

from components.rlhf.data.examples import Unusable
from components.rlhf.text.errors import InputError

MIN_USABLE = 0.8
NUM_REASONS = 3  # that an error message names


@dataclass
class Tally:
    """Counts of one source: records read, kept, dropped by reason, and kept but changed."""

    name: str
    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    defects: set[str] = field(
        default_factory=set
    )  # the reasons that make a source suspicious; others are normal, such as ties
    first: dict[str, str] = field(default_factory=dict)  # where and why a record was dropped, by reason: the first case
    unread_columns: set[str] = field(default_factory=set)

    def drop(self, error: Unusable, location: str) -> None:
        self.dropped[error.reason] += 1
        self.first.setdefault(error.reason, f"{location}: {error}")
        if error.is_defect:
            self.defects.add(error.reason)

    def require_usable(self) -> None:
        """Raise InputError when no records, or less than 80% of them, are usable, with the three commonest reasons.

        Duplicates, ties and records beyond a limit are usable, but not needed.
        """
        num_defects = sum(self.dropped[reason] for reason in self.defects)
        if self.kept and self.read - num_defects >= MIN_USABLE * self.read:
            return
        if self.read == 0:
            raise InputError(f"{self.name} has no records; correct the path or the data.")
        counted = self.defects or set(self.dropped)
        commonest = sorted(counted, key=lambda reason: (-self.dropped[reason], reason))[:NUM_REASONS]
        reasons = "; ".join(
            f"{self.dropped[reason]} {reason} (for example {self.first[reason].rstrip('.')})" for reason in commonest
        )
        raise InputError(
            f"{self.name}: only {self.read - num_defects} of {self.read} records are usable, at least {MIN_USABLE:.0%} must be: "
            f"{reasons}."
        )
