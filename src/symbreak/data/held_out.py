"""The one rule by which held-out images are chosen, for every study."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from symbreak.data.images import SPLIT_SEED, Images, describe
from symbreak.data.readers import images
from symbreak.data.shape import to_fit
from symbreak.runtime.errors import InputError

__all__ = ["HeldOut", "check_units", "held_out"]


@dataclass(frozen=True)
class HeldOut:
    """Images to fit or train with, and images kept apart from them.

    Attributes:
        train: the images to fit with.
        test: the held-out images; none where none were to be kept back.
        how: ``"passed"``, ``"other half of the digits"``, ``"kept back"`` or ``"none"``.
        share, seed: of the data that was kept back, and of its choice; ``None`` for other images.
    """

    train: Images
    test: Images
    how: str
    share: float | None = None
    seed: int | None = None

    @property
    def note(self) -> str:
        """What a reader must know of the held-out images."""
        if not len(self.test):
            return f"No held-out {self.train.noun}."
        source = (
            f"{self.test.noun} of {self.test.name}"
            if self.how == "passed"
            else "digits of the half that is never fitted to"
        )
        if self.how != "kept back":
            return f"The held-out {self.test.noun} are {len(self.test):,} {source}."
        return (
            f"{len(self.test):,} {self.test.noun} ({self.share:.0%} of {self.test.name}, evenly over the classes, seed "
            f"{self.seed}) are kept back from the fit. A network may have been trained on them; pass --holdout with "
            f"{self.test.noun} it has not seen."
        )

    def to_dict(self) -> dict[str, object]:
        """What a record says of the held-out images, see `describe`, and how they were chosen."""
        return {**describe(self.test), "how": self.how, "share": self.share, "seed": self.seed}


def check_units(data: Images, other: Images, what: str) -> None:
    """Samples in other units than the data raise an error."""
    units, others = (None if d.units is None else d.units.to_dict() for d in (data, other))
    if units is None or others is None:
        if units is not others:
            raise InputError(
                f"one of {data.name} and {other.name} is pictures, the other samples in units of their own. Open both "
                "with sb.images or both with sb.samples."
            )
    elif any(units[k] != others[k] for k in ("mean", "std")):
        raise InputError(
            f"the {what} of {other.name} are scaled in another way than {data.name}. Open them with "
            "sb.samples(..., scale=data), where data are the training samples."
        )


def held_out(
    data: Images,
    holdout: Images | None = None,
    share: float = 0.2,
    seed: int = SPLIT_SEED,
    *,
    fewest: int = 2,
    bundled: bool = True,
) -> HeldOut:
    """Images to fit with and held-out images, by one rule.

    Images that are passed are taken. For the digits it is their other half, which is never fitted to, of the classes in
    ``data``. From other data a share is kept back: the same for the same seed, and of every class.

    Args:
        data: images to fit or train with.
        holdout: images of the same source that are not among ``data``.
        share: of the data to keep back, 0 <= share < 1; 0 keeps nothing back.
        seed: of what is kept back.
        fewest: held-out images that are needed at least, where they are kept back.
        bundled: whether digits take their other half; ``False`` keeps a share back from them, too, where the other half
            is to stay unseen.

    Raises:
        InputError: for a holdout of another shape, or with a class that the data do not have; for too few images to
            keep a share of them back.

    >>> parts = held_out(images("digits:all"), share=0.25)
    >>> len(parts.train), len(parts.test)
    (1347, 450)
    """
    if holdout is not None:
        if holdout.shape != data.shape:
            raise InputError(
                f"the data are {data.shape}, the held-out {holdout.noun} {holdout.shape}. "
                f"{to_fit(holdout.shape, data.shape)}."
            )
        check_units(data, holdout, "held-out samples")
        return HeldOut(data, holdout if data.labels is None else holdout.numbered(data.classes), "passed")
    if bundled and data.name == "digits" and data.history[:1] == images("digits").history:
        half = images("digits:held-out", pad=data.pad)
        present = half.classes if data.labels is None else [half.classes[i] for i in data.labels.unique().tolist()]
        half = half if len(present) == len(half.classes) else half.only(present)
        return HeldOut(data, half, "other half of the digits")
    if share == 0:
        return HeldOut(data, data.take(np.array([], np.int64), "none"), "none")
    if len(data) * share < fewest:
        raise InputError(
            f"{data.name} has {len(data)} {data.noun}, of which {share:.0%} would be kept back; expected at least "
            f"{math.ceil(fewest / share)}. Pass more, or held-out {data.noun} with --holdout."
        )
    train, test = data.split(1 - share, seed)
    return HeldOut(train, test, "kept back", share, seed)
