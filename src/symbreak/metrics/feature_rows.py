"""Feature extractors by name, and the features of images. The only loader of feature weights.

A distance is only as good as the features it is measured in, so every extractor has a name and every
number carries it. ``digits-classifier`` is a small network trained on the training half of the 8 x 8
digits; distances in it are Fréchet distances in its 64 features and nothing else. Networks published by
others are in `pretrained`.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn

from symbreak.data.images import Images
from symbreak.metrics.extractors import Extractor, FromFunction, Function
from symbreak.metrics.pretrained import Dinov2, EfficientNet, Inception
from symbreak.noise import generator
from symbreak.runtime.files import InputError, damaged, read_tensors, write_tensors
from symbreak.runtime.ranks import from_each, own_rows, shares, summed
from symbreak.runtime.rows import Shards
from symbreak.runtime.run import Run, padded_blocks, renamed

__all__ = [
    "Classifier",
    "Features",
    "NamedExtractor",
    "accuracy",
    "chosen",
    "extractor",
    "feature_blocks",
    "feature_shards",
    "features",
    "load_classifier",
    "train_classifier",
]

BUNDLED = str(resources.files("symbreak") / "weights" / "digits-classifier.safetensors")
FEATURES = 64
MAX_PIXELS = 4096
SCALED_BY = 4096  # training samples that say the mean and the standard deviation of the columns


class Classifier(nn.Module, Extractor):
    """A small convolutional classifier; its features are the 64 units before the last layer.

    Vectors, and samples of more than three axes beside the channels, go through plain layers instead.

    Args:
        shape: (C, H, W) of the images, or the shape of other samples.
        classes: names of the classes.
        standardize: whether samples are brought to mean 0 and standard deviation 1, column by column, at first; the
            training samples say how.
    """

    centre: torch.Tensor
    spread: torch.Tensor

    def __init__(self, shape: tuple[int, ...], classes: tuple[str, ...], standardize: bool = False) -> None:
        super().__init__()
        self.shape, self.classes, self.name = tuple(shape), tuple(classes), "classifier"
        self.standardize = standardize
        if standardize:
            for name, start in (("centre", 0.0), ("spread", 1.0)):
                self.register_buffer(name, torch.full((shape[0], *[1] * (len(shape) - 1)), start))
        self.body = nn.Sequential(*_layers(self.shape), nn.Flatten())
        with torch.no_grad():
            flat = self.body(torch.zeros(1, *shape)).shape[1]
        self.penultimate = nn.Linear(flat, FEATURES)
        self.head = nn.Linear(FEATURES, len(classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features [B, 64]."""
        if tuple(x.shape[1:]) != self.shape:
            raise InputError(
                f"images of shape {tuple(x.shape[1:])} for the extractor {self.name}, which needs {self.shape}."
            )
        if self.standardize:
            x = (x - self.centre) / self.spread
        out: torch.Tensor = torch.relu(self.penultimate(self.body(x)))
        return out

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Class logits [B, K]."""
        out: torch.Tensor = self.head(self(x))
        return out


def _layers(shape: tuple[int, ...]) -> list[nn.Module]:
    """The layers before the last two."""
    axes = len(shape) - 1
    if not 1 <= axes <= 3:
        return [
            nn.Flatten(),
            nn.Linear(math.prod(shape), FEATURES),
            nn.ReLU(),
            nn.Linear(FEATURES, FEATURES),
            nn.ReLU(),
        ]
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[axes - 1]
    layers: list[nn.Module] = []
    channels, width, side = shape[0], 16, min(shape[1:])
    while True:
        layers += [conv(channels, width, 3, padding=1), nn.ReLU()]
        channels = width
        if side <= 4:
            return layers
        layers.append(pool(2, ceil_mode=True))
        side, width = (side + 1) // 2, min(64, 2 * width)


def _fit_scale(model: Classifier, x: Shards, seed: int) -> None:
    """Take the mean and the standard deviation of every column or channel from some of the training samples."""
    index = torch.randperm(len(x), generator=generator(seed, 4))[:SCALED_BY].sort().values
    some = x.at(index).double().transpose(0, 1).flatten(1)
    model.centre.copy_(some.mean(1).reshape(model.centre.shape))
    model.spread.copy_(some.std(1).clamp_min(1e-12).reshape(model.spread.shape))


@renamed()
def train_classifier(
    train: Images, *, held_out: Images | None = None, epochs: int = 60, seed: int = 0, run: Run | None = None
) -> Classifier:
    """Train a `Classifier` on labelled samples (Adam, cosine rate; images are shifted by up to one pixel).

    Its ``accuracy`` is measured on ``held_out`` where that comes with labels, which is used for nothing else. Ranks
    read and hold a part of the images each, in the run's memory or its folder (see `Shards`), and take the same steps.

    Raises:
        InputError: without labels, with fewer than two classes, or for held-out images of another class.
    """
    if train.labels is None or len(train.classes) < 2:
        raise InputError(f"{train.name} has no labels of at least two classes; a classifier needs them.")
    run = run or Run()
    held_out = None if held_out is None else held_out.numbered(train.classes)
    x, y = train.shards(run), train.labels
    with torch.random.fork_rng(devices=[]):  # layers draw their weights from the global generator
        torch.default_generator.manual_seed(seed)
        model = Classifier(train.shape, train.classes, train.units is not None)
    if model.standardize:
        _fit_scale(model, x, seed)
    batch = 64
    steps = epochs * math.ceil(len(x) / batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    done = 0
    for epoch in range(epochs):
        g = generator(seed, 3, epoch)
        for index in torch.randperm(len(x), generator=g).split(batch):
            images = x.at(index)
            if train.units is None:
                images = torch.nn.functional.pad(images, (1, 1, 1, 1), value=-1.0)
                dy, dx = torch.randint(0, 3, (2,), generator=g).tolist()
                images = images[:, :, dy : dy + x.shape[2], dx : dx + x.shape[3]]
            loss = torch.nn.functional.cross_entropy(model.logits(images), y[index], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            rate.step()
            done += 1
        run.tell(done, steps)
    model.eval().requires_grad_(False)
    if held_out is not None and held_out.labels is not None:
        model.accuracy = accuracy(model, held_out)
    return model


def accuracy(model: Classifier, images: Images) -> float:
    """Share of labelled images whose class a classifier finds; classes are matched by name.

    Raises:
        InputError: for images without labels, or of a class that the classifier was not trained on.
    """
    labels = images.numbered(model.classes).labels
    if labels is None:
        raise InputError(f"{images.name} has no labels to measure a classifier's accuracy with. Pass labelled images.")
    part, first, shared = own_rows(images)
    with torch.inference_mode():
        answers = torch.cat([model.logits(batch).argmax(1) for batch in part])
    right = (answers == labels[first : first + len(answers)]).double().sum()
    if shared:
        summed(right)
    return float(right) / len(labels)


def save_classifier(model: Classifier, path: str | Path, name: str) -> Path:
    """Write weights, shape, classes and held-out accuracy as safetensors."""
    metadata = {
        "format": "symbreak.classifier",
        "name": name,
        "shape": ",".join(map(str, model.shape)),
        "classes": "\t".join(model.classes),
        "held_out_accuracy": f"{model.accuracy:.4f}",
    }
    return write_tensors(path, model.state_dict(), metadata)


def load_classifier(path: str | Path) -> Classifier:
    """Read what `save_classifier` wrote."""
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != "symbreak.classifier":
        raise InputError(f"{path} holds no symbreak classifier. Train one with train_classifier.")
    with damaged(path, "a classifier"):
        shape = tuple(int(n) for n in metadata["shape"].split(","))
        model = Classifier(shape, tuple(metadata["classes"].split("\t")), "centre" in tensors)
        model.load_state_dict(tensors)
        model.name, model.accuracy = metadata["name"], float(metadata["held_out_accuracy"])
        return model.eval().requires_grad_(False)


class _Values(Extractor):
    """The samples themselves."""

    def __init__(self, name: str) -> None:
        self.name = self.identity = name

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x[0].numel() > MAX_PIXELS:
            what = "pixel features" if self.name == "pixels" else self.name
            raise InputError(f"{x[0].numel()} {what} are too many for a distance; use another extractor.")
        return x.reshape(len(x), -1)


@renamed()
def extractor(
    name: str,
    data: Images | None = None,
    weights: str | Path | None = None,
    sha256: str | None = None,
    device: str | torch.device | None = None,
    run: Run | None = None,
) -> Extractor:
    """An extractor by name.

    Args:
        name: ``"digits-classifier"`` (bundled), ``"pixels"`` or ``"values"`` (the samples themselves), ``"classifier"``
            (trained here on the labels of ``data``), ``"inception"``, ``"dinov2"``, ``"efficientnet-lite0"`` (with the
            side of its input, such as ``"efficientnet-lite0-112"``, by default 224), a ``.safetensors`` file written by
            `save_classifier`, or ``"module:callable"``.
        weights: weights of ``"inception"`` (file) and ``"dinov2"`` (folder).
        sha256: of other Inception weights than the published ones.
        device: where its network runs; by default on the CPU.
        run: of ``"classifier"``, see `train_classifier`.

    Raises:
        InputError: for an unknown name, a module that has no such callable, a device that is not there, or weights
            that are missing or wrong.
    """
    if sha256 is not None and name != "inception":
        raise InputError(f"a sha256 came with the extractor {name}; it belongs to the weights of inception.")
    if weights is not None and name not in ("inception", "dinov2"):
        raise InputError(f"weights came with the extractor {name}; they belong to inception or dinov2.")
    if name == "classifier" and data is None:
        raise InputError("the extractor 'classifier' is trained on labelled data; pass --data with labels.")
    known: dict[str, Callable[[], Extractor]] = {
        "inception": lambda: Inception(weights, sha256),
        "dinov2": lambda: Dinov2(weights),
        "efficientnet-lite0": lambda: EfficientNet(),
        "digits-classifier": lambda: load_classifier(BUNDLED),
        "pixels": lambda: _Values("pixels"),
        "values": lambda: _Values("values"),
        "classifier": lambda: train_classifier(cast(Images, data), run=run),
    }
    if name in known:
        return known[name]().on(device)
    if re.fullmatch(r"efficientnet-lite0-\d{1,6}", name):
        return EfficientNet(int(name.rpartition("-")[2])).on(device)
    if name.endswith(".safetensors"):
        return load_classifier(name).on(device)
    module, _, attribute = name.partition(":")
    if not attribute:
        raise InputError(
            f"unknown extractor {name!r}. Known: {', '.join(known)}, a .safetensors file, module:callable."
        )
    try:
        return FromFunction(getattr(importlib.import_module(module), attribute), name).on(device)
    except (ImportError, AttributeError) as error:
        raise InputError(f"the extractor {name} cannot be imported ({error}).") from None


@dataclass(frozen=True)
class NamedExtractor:
    """An extractor that is made once the training images are known, which ``"classifier"`` learns from.

    Args:
        name, weights, sha256, device: see `extractor`; without a name the study's default.
    """

    name: str | None = None
    weights: str | Path | None = None
    sha256: str | None = None
    device: str | torch.device | None = None


Features = str | NamedExtractor | Extractor | Function


def chosen(features: Features, default: str, data: Images, run: Run) -> Extractor:
    """An extractor as it is, a function as one, or the one of a name, trained on ``data`` where it is to be."""
    if isinstance(features, str):
        features = NamedExtractor(features)
    if isinstance(features, NamedExtractor):
        name = features.name or default
        name = "values" if name == "pixels" and data.units is not None else name
        return extractor(name, data, features.weights, features.sha256, features.device, run)
    return Extractor.of(features)


def feature_blocks(extract: Extractor | Function, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Features of a stream of image batches, block by block: [B, F] float64.

    Raises:
        InputError: for NaN or infinity among the features.
    """
    extract = Extractor.of(extract)
    where = extract.device
    for block, rows in padded_blocks(batches, extract.batch):
        with torch.inference_mode():
            values = extract(block.to(where))[:rows].double().cpu().clone()
        if not bool(torch.isfinite(values).all()):
            raise InputError(f"the extractor {extract.name} gave NaN or infinity; check the images' range.")
        yield values


def features(extract: Extractor | Function, batches: Images | torch.Tensor | Iterable[torch.Tensor]) -> torch.Tensor:
    """Features [N, F] float64 of images, on padded batches of one fixed size.

    Args:
        extract: the extractor.
        batches: `Images` or one tensor [N, C, H, W], which ranks share, or a stream of batches.
    """
    extract = Extractor.of(extract)
    part, _, shared = own_rows(batches, extract.batch)
    out = list(feature_blocks(extract, [part] if isinstance(part, torch.Tensor) else part))
    if not out:
        raise InputError("no images to extract features from; expected at least one.")
    parts = from_each({"features": torch.cat(out).numpy()}, shared)
    return torch.from_numpy(np.concatenate([p["features"] for p in parts]))


def feature_shards(extract: Extractor | Function, images: Images | Shards, run: Run) -> Shards:
    """Features [N, F] float64 of images as rows read on demand, of which every rank computes and holds a part.

    Args:
        extract: the extractor.
        images: the images.
        run: its memory and folder hold them, see `Shards`.
    """
    extract = Extractor.of(extract)
    edges = images.edges if isinstance(images, Shards) else shares(len(images), extract.batch)
    part, _, _ = own_rows(images, extract.batch)  # shards have edges of their own
    blocks = (rows.numpy() for rows in feature_blocks(extract, part))
    return Shards(blocks, edges, run.bytes(), run.folder, progress=run.tell)
