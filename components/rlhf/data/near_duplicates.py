from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Overlap:
    total: int
    examples: tuple


def group_near_duplicates(texts, *, threshold):
    return list(range(len(texts)))


def overlap(groups_of, *, threshold):
    seen = {}
    n = 0
    for role, ts in groups_of.items():
        for t in ts:
            if seen.setdefault(t, role) != role:
                n += 1
    return Overlap(total=n, examples=())
