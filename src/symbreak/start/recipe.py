"""A training recipe: everything that decides a run, as JSON under ``recipes/``."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from symbreak.runtime.files import InputError, read_json
from symbreak.runtime.plain import Values

__all__ = ["Recipe"]

LARGEST = 8192  # channels, layers: beyond what any machine trains
KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("channels", "layers", "steps", "batch", "warmup", "seed", "folds"), (int,)),
    "clusters": (int, type(None)),
    **dict.fromkeys(("dropout", "lr", "ema", "weight_decay"), (float, int)),
    **dict.fromkeys(("minutes", "top"), (float, int, type(None))),
    "conditional": (bool,),
}
WORDS = {int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run; as JSON under ``recipes/``.

    Attributes:
        channels: UNet channels a resolution, each a multiple of 8.
        layers: ResNet blocks a resolution.
        dropout: dropout inside the ResNet blocks.
        steps: optimizer steps.
        batch: images a step.
        lr: peak AdamW learning rate, after ``warmup`` steps, then a cosine down to 0.
        ema: decay of the weight average that is saved.
        seed: of initial weights, data order, noise and dropout.
        conditional: whether the network is told the class of its images, a tenth of them without: the class after the
            last one stands for none.
        minutes: train for so long instead of ``steps``: as many steps as this machine makes in that time, from the
            reading of the images to the written network, 16 at least; counted anew at every look, for a machine may
            get busy.
        clusters: with a law that is fitted: its components, by default one for 20 images and at most 60.
        folds: with a law that is fitted: laws that leave a part of the images out, which a network is trained at.
        top: with a law: sigma above which it answers alone; by default `TOP` standard deviations of the leading mode.
    """

    channels: tuple[int, ...] = (24, 48)
    layers: int = 1
    dropout: float = 0.1
    steps: int = 8000
    batch: int = 128
    lr: float = 1e-3
    warmup: int = 200
    ema: float = 0.999
    weight_decay: float = 0.01
    seed: int = 0
    conditional: bool = False
    minutes: float | None = None
    clusters: int | None = None
    folds: int = 4
    top: float | None = None

    def settings(self) -> Values:
        """Plain values; what came later than the first recipes only where it is not the default."""
        values: Values = {**asdict(self), "channels": list(self.channels)}
        late = ("conditional", "minutes", "clusters", "folds", "top")
        return {k: v for k, v in values.items() if k not in late or v != getattr(Recipe, k)}

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe; unknown or impossible settings are named."""
        raw = read_json(path)
        known = {f.name for f in fields(cls)}
        if not isinstance(raw, dict) or set(raw) - known:
            extra = sorted(set(raw) - known) if isinstance(raw, dict) else "no settings"
            raise InputError(f"{path} holds {extra}; a recipe has the settings {', '.join(sorted(known))}.")
        try:
            recipe = cls(**{**raw, "channels": tuple(raw.get("channels", cls.channels))})
        except TypeError as error:
            raise InputError(f"{path} is no recipe ({error}).") from None
        try:
            recipe.check()
        except OverflowError as error:
            raise InputError(f"{path} is no recipe ({error}).") from None
        return recipe

    def check(self) -> None:
        """Settings that cannot be trained raise an error that names them."""
        for name, kinds in KINDS.items():
            value = getattr(self, name)
            for one in value if name == "channels" else (value,):
                if isinstance(one, bool) != (kinds == (bool,)) or not isinstance(one, kinds):
                    raise InputError(f"recipe {name} {one!r}; expected {WORDS[kinds[0]]}.")
        if not self.channels or any(c < 8 or c % 8 for c in self.channels):
            raise InputError(f"recipe channels {self.channels}; expected positive multiples of 8.")
        if min(self.layers, self.steps, self.batch) < 1 or not self.lr > 0 or not 0 <= self.ema < 1:
            raise InputError("a recipe needs layers, steps and batch >= 1, lr > 0 and 0 <= ema < 1.")
        if max(self.channels) > LARGEST or self.layers > LARGEST or len(self.channels) > LARGEST:
            raise InputError(f"a recipe has at most {LARGEST:,} channels and layers.")
        if min(self.warmup, self.seed, self.weight_decay) < 0 or self.seed >= 2**63:
            raise InputError("a recipe needs warmup, seed and weight_decay >= 0, and a seed below 2^63.")
        if not (math.isfinite(self.lr) and math.isfinite(self.weight_decay)):
            raise InputError("a recipe needs finite numbers for lr and weight_decay.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"recipe dropout {self.dropout}; expected 0 <= dropout < 1.")
        for name, number in (("minutes", self.minutes), ("top", self.top)):
            if not (number is None or 0 < number < 1e6):
                raise InputError(f"{name} {number:g}; expected a number above 0, or none.")
        if self.clusters is not None and self.clusters < 1:
            raise InputError(f"recipe clusters {self.clusters}; expected at least 1, which is a Gaussian.")
        if not 1 <= self.folds <= 64:
            raise InputError(f"recipe folds {self.folds}; expected a whole number from 1 (no folds) to 64.")
