"""Classifiers of attributes: logistic regressions on features, each with its balanced accuracy on held-out images."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from symbreak.data.images import Images
from symbreak.data.labels import Classes, attributes
from symbreak.intervals import balanced_share
from symbreak.metrics.extractors import Extractor
from symbreak.metrics.feature_rows import features
from symbreak.noise import generator
from symbreak.runtime.errors import InputError
from symbreak.runtime.plain import Values
from symbreak.runtime.run import Run

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import Pipeline

__all__ = ["FEWEST", "RESOLVED", "AttributeClassifier", "attribute_classifier", "attribute_names", "enough"]

RESOLVED = 0.7  # balanced accuracy below which an attribute is not resolved
COMPONENTS = 128  # leading components of the features that a classifier sees
HELD_OUT = 0.2
FEWEST = 20  # images of each class
MOST = 10_000  # images that are learned from, and measured with
JOINT = 6  # attributes that are named, up to which their combinations are counted, too


@dataclass(frozen=True)
class AttributeClassifier:
    """Images -> scores [B, K] of the classes of every attribute, a dictionary by its name.

    Attributes:
        extract: what the classifiers see.
        classes: names of the classes by attribute.
        accuracies: by attribute balanced accuracy on held-out images with its interval: ``value``, ``low``, ``high``,
            and whether it is ``resolved``.
        joint: name of the combinations of all attributes, where they are few; "" for none.
    """

    extract: Extractor
    reduce: Pipeline
    judges: dict[str, LogisticRegression]
    classes: dict[str, list[str]]
    accuracies: dict[str, Values]
    joint: str = ""

    @property
    def name(self) -> str:
        """What is printed beside its numbers."""
        return f"attributes in {self.extract.name}"

    def __call__(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = _seen(self.extract)(x.to(self.extract.device)).double().cpu().numpy()
        reduced = self.reduce.transform(rows)
        out = {}
        for name, judge in self.judges.items():
            scores = judge.decision_function(reduced)
            out[name] = torch.from_numpy(np.stack([-scores, scores], 1) if scores.ndim == 1 else scores)
        if self.joint:
            index = np.zeros(len(x), np.int64)
            for scores in out.values():
                index = index * scores.shape[1] + scores.argmax(1).numpy()
            out[self.joint] = torch.from_numpy(index)
        return out


def attribute_names(classify: object) -> tuple[bool, list[str] | None]:
    """Whether attributes are meant, ``"attributes"`` or ``"attributes:Male,Smiling"``, and which; ``None`` for all."""
    if not isinstance(classify, str) or classify.partition(":")[0] != "attributes":
        return False, None
    names = classify.partition(":")[2]
    return True, names.split(",") if names else None


def attribute_classifier(
    data: Images, names: Sequence[str] | None, extract: Extractor, seed: int = 0, run: Run | None = None
) -> AttributeClassifier:
    """Train a classifier for every attribute of a data set.

    A logistic regression with balanced classes on the 128 leading components of the features (of pixels, where the
    extractor is those). A fifth of the images is held out from all of them to measure their balanced accuracies.

    Args:
        data: images of a source with columns of attributes, see `symbreak.data.labels.attributes`.
        names: the attributes; ``None`` takes all that tell two classes apart.
        extract: features.
        seed: of the choice of the held-out images.
        run: finished features of the images.

    Raises:
        InputError: for an attribute that is not there, or, where it is named, with fewer than 20 images in a class.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    order = torch.randperm(len(data), generator=generator(seed, 72))[:MOST].sort().values.numpy()
    some = data if len(order) == len(data) else data.take(order, f"random {MOST} {seed}")
    wanted = {name: c for name, c in attributes(some, names).items() if enough(name, c, names is not None)}
    if not wanted:
        raise InputError(f"no attribute of {data.name} has {FEWEST} images in each class. Pass more images.")
    key = (extract.to_dict(), some.fingerprint())
    rows = (run or Run()).part("attribute-features", lambda: {"x": features(_seen(extract), some).numpy()}, *key)["x"]
    place = torch.randperm(len(rows), generator=generator(seed, 73)).numpy()
    new = place < HELD_OUT * len(rows)
    reduce = make_pipeline(
        StandardScaler(), PCA(min(COMPONENTS, rows.shape[1], int((~new).sum()) // 2), random_state=0), StandardScaler()
    ).fit(rows[~new])
    reduced = reduce.transform(rows)
    judges, names_, accuracies = {}, {}, {}
    for name, classes in wanted.items():
        present, codes = np.unique(classes.codes, return_inverse=True)
        codes -= int((present < 0).sum())  # without a value: -1
        known = codes >= 0
        judge = LogisticRegression(class_weight="balanced", max_iter=500, C=0.1)
        judge.fit(reduced[known & ~new], codes[known & ~new])
        at = known & new
        if len(np.unique(codes[at])) < len(np.unique(codes[known])):
            if names is None:
                continue
            raise InputError(
                f"the attribute {name!r}: none of the {int(at.sum())} images that are held out has its rarest class. "
                "Pass more images, or other attributes."
            )
        accuracies[name] = _accuracy(judge.predict(reduced[at]), codes[at])
        judges[name], names_[name] = judge, [classes.names[c] for c in present[present >= 0]]
    joint = " and ".join(judges) if names is not None and 2 <= len(judges) <= JOINT else ""
    if joint:
        names_[joint] = [", ".join(each) for each in itertools.product(*names_.values())]
    return AttributeClassifier(extract, reduce, judges, names_, accuracies, joint)


def enough(name: str, classes: Classes, named: bool) -> bool:
    """Whether there are enough images of each class; where the attribute was named, an error says so."""
    fewest = int(np.unique(classes.codes[classes.codes >= 0], return_counts=True)[1].min())
    if named and fewest < FEWEST:
        raise InputError(f"the attribute {name!r} has {fewest} images in its rarest class; expected at least {FEWEST}.")
    return fewest >= FEWEST


def _seen(extract: Extractor) -> Callable[[torch.Tensor], torch.Tensor]:
    """What is seen of images: pixels as they are, however many; else features."""
    return _flat if extract.name in ("pixels", "values") else extract


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1)


def _accuracy(said: np.ndarray, codes: np.ndarray) -> Values:
    """Balanced accuracy, its interval, and whether that resolves the attribute."""
    of = np.bincount(codes)
    share = balanced_share(np.bincount(codes[said == codes], minlength=len(of)), of)
    return {**share, "resolved": share["value"] >= RESOLVED, "count": len(codes)}
