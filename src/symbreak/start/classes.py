"""Classes of samples: which class the sample of a seed has."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from symbreak.data.images import Images
from symbreak.runtime.errors import InputError
from symbreak.runtime.plain import Values

__all__ = ["Classes"]

GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples fill the unit interval evenly, however many there are


@dataclass(frozen=True)
class Classes:
    """The class of every seed, whatever its neighbours: some classes in turn, or those of data in their shares.

    Attributes:
        pool: classes in turn, or with ``shares`` the class of every image, sorted.
        shares: whether a seed stands for a place among the images: any run of seeds has the data's shares, nearly.

    >>> Classes((0, 3, 7)).of([0, 1, 2, 3]).tolist()
    [0, 3, 7, 0]
    >>> Classes((0, 0, 0, 5), shares=True).of(range(100)).tolist().count(5)
    24
    """

    pool: tuple[int, ...]
    shares: bool = False

    @classmethod
    def of_data(cls, data: Images) -> Classes:
        """Those of data, in their shares.

        Raises:
            InputError: for data without labels.
        """
        if data.labels is None:
            raise InputError(f"{data.name} has no labels; expected data with classes. Name the classes, such as 0,3,7.")
        return cls(tuple(sorted(data.labels.tolist())), True)

    def of(self, seeds: Sequence[int]) -> torch.Tensor:
        """The classes [N] of seeds."""
        n = len(self.pool)
        places = [int(n * (s * GOLDEN % 1.0)) if self.shares else s % n for s in seeds]
        return torch.tensor([self.pool[i] for i in places], dtype=torch.int64)

    def different(self) -> torch.Tensor:
        """Every class once, rising."""
        return torch.tensor(sorted(set(self.pool)))

    def to_dict(self) -> Values:
        """Plain values, for records: the classes in turn, or how many images of every class there are."""
        if not self.shares:
            return {"in_turn": list(self.pool)}
        return {"shares": {str(k): count for k, count in sorted(Counter(self.pool).items())}}
