"""Feature extractors: images [B, C, H, W] in [-1, 1] -> features [B, F]. The only loader of feature weights.

A distance is only as good as the features it is measured in, so every extractor has a name and every
number carries it. ``digits-classifier`` is a small network trained on the training half of the 8 x 8
digits; distances in it are Fréchet distances in its 64 features and nothing else. Networks published by
others are in `pretrained`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from symbreak.data.images import Images
from symbreak.metrics.pretrained import Dinov2, Inception
from symbreak.networks.loading import usable, weights_hash
from symbreak.noise import generator
from symbreak.runtime.files import InputError, damaged, read_tensors, write_tensors
from symbreak.runtime.ranks import from_each, own_rows, shares, summed
from symbreak.runtime.rows import HELD, Shards
from symbreak.runtime.run import padded_blocks

__all__ = [
    "Classifier",
    "Extractor",
    "accuracy",
    "chosen",
    "described",
    "extractor",
    "feature_blocks",
    "feature_shards",
    "features",
    "load_classifier",
    "named",
    "train_classifier",
]

FEATURES = 64
BATCH = 256  # fixed and padded, so that an image's features do not depend on its neighbours
MAX_PIXELS = 4096


class Extractor(Protocol):
    """Anything that turns images into features; ``name`` is printed beside every number.

    Optional attributes: ``batch``, images a call; ``resize``, what happens to an image before; ``identity``, what its
    statistics are cached by (`described`).
    """

    name: str

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Features [B, F] of images [B, C, H, W] in [-1, 1]."""


class Classifier(nn.Module):
    """A small convolutional classifier; its features are the 64 units before the last layer.

    Args:
        shape: (C, H, W) of the images.
        classes: names of the classes.
    """

    def __init__(self, shape: tuple[int, int, int], classes: tuple[str, ...]) -> None:
        super().__init__()
        self.shape, self.classes, self.name, self.accuracy = tuple(shape), tuple(classes), "classifier", math.nan
        layers: list[nn.Module] = []
        channels, width, side = shape[0], 16, min(shape[1:])
        while True:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
            if side <= 4:
                break
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            side, width = (side + 1) // 2, min(64, 2 * width)
        self.body = nn.Sequential(*layers, nn.Flatten())
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
        out: torch.Tensor = torch.relu(self.penultimate(self.body(x)))
        return out

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Class logits [B, K]."""
        out: torch.Tensor = self.head(self(x))
        return out


def train_classifier(
    train: Images,
    *,
    held_out: Images | None = None,
    epochs: int = 60,
    seed: int = 0,
    memory: int = HELD,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Classifier:
    """Train a `Classifier` on labelled images (Adam, cosine rate, shifts by up to one pixel).

    Its ``accuracy`` is measured on ``held_out`` where given with labels, which is used for nothing else. Ranks read and
    hold a part of the images each, in ``memory`` bytes or a file (see `Shards`), and take the same steps.

    Raises:
        InputError: without labels, with fewer than two classes, or for held-out images of another class.
    """
    if train.labels is None or len(train.classes) < 2:
        raise InputError(f"{train.name} has no labels of at least two classes; a classifier needs them.")
    held_out = None if held_out is None else held_out.numbered(train.classes)
    x, y = train.shards(memory, folder), train.labels
    with torch.random.fork_rng(devices=[]):  # layers draw their weights from the global generator
        torch.default_generator.manual_seed(seed)
        model = Classifier(train.shape, train.classes)
    batch = 64
    steps = epochs * math.ceil(len(x) / batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    done = 0
    for epoch in range(epochs):
        g = generator(seed, 3, epoch)
        for index in torch.randperm(len(x), generator=g).split(batch):
            images = torch.nn.functional.pad(x.at(index), (1, 1, 1, 1), value=-1.0)
            dy, dx = torch.randint(0, 3, (2,), generator=g).tolist()
            images = images[:, :, dy : dy + x.shape[2], dx : dx + x.shape[3]]
            loss = torch.nn.functional.cross_entropy(model.logits(images), y[index], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            rate.step()
            done += 1
        if progress is not None:
            progress(done, steps)
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
    own, first, shared = own_rows(images)
    with torch.inference_mode():
        found = torch.cat([model.logits(batch).argmax(1) for batch in own])
    right = (found == labels[first : first + len(found)]).double().sum()
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
        model = Classifier(shape, tuple(metadata["classes"].split("\t")))  # type: ignore[arg-type]
        model.load_state_dict(tensors)
        model.name, model.accuracy = metadata["name"], float(metadata["held_out_accuracy"])
        return model.eval().requires_grad_(False)


class _Pixels:
    name = identity = "pixels"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x[0].numel() > MAX_PIXELS:
            raise InputError(f"{x[0].numel()} pixel features are too many for a distance; use another extractor.")
        return x.reshape(len(x), -1)


class _Callable:
    def __init__(self, name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.name, self.function = name, function
        self.batch: int = getattr(function, "batch", BATCH)
        self.resize: str = getattr(function, "resize", "its own")
        self.identity: str | None = getattr(function, "identity", None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = self.function(x)
        if not isinstance(out, torch.Tensor) or out.ndim != 2 or len(out) != len(x):
            came = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise InputError(f"the extractor {self.name} gave {came} for {len(x)} images; expected a tensor [B, F].")
        return out


def extractor(
    name: str,
    data: Images | None = None,
    weights: str | Path | None = None,
    sha256: str | None = None,
    memory: int = HELD,
    folder: Path | None = None,
) -> Any:
    """An extractor by name.

    Args:
        name: ``"digits-classifier"`` (bundled), ``"pixels"``, ``"classifier"`` (trained here on the labels of
            ``data``), ``"inception"``, ``"dinov2"``, a ``.safetensors`` file written by `save_classifier`, or
            ``"module:callable"``.
        weights: weights of ``"inception"`` (file) and ``"dinov2"`` (folder).
        sha256: of other Inception weights than the published ones.
        memory, folder: of ``"classifier"``, see `train_classifier`.

    Raises:
        InputError: for an unknown name, a module that has no such callable, or weights that are missing or wrong.
    """
    if name == "inception":
        return Inception(weights, sha256)
    if sha256 is not None:
        raise InputError(f"a sha256 came with the extractor {name}; it belongs to the weights of inception.")
    if name == "dinov2":
        return Dinov2(weights)
    if weights is not None:
        raise InputError(f"weights came with the extractor {name}; they belong to inception or dinov2.")
    if name == "digits-classifier":
        return load_classifier(str(resources.files("symbreak") / "weights" / "digits-classifier.safetensors"))
    if name == "pixels":
        return _Pixels()
    if name == "classifier":
        if data is None:
            raise InputError("the extractor 'classifier' is trained on labelled data; pass --data with labels.")
        return train_classifier(data, memory=memory, folder=folder)
    if name.endswith(".safetensors"):
        return load_classifier(name)
    module, _, attribute = name.partition(":")
    if not attribute:
        raise InputError(
            f"unknown extractor {name!r}. Known: digits-classifier, classifier, pixels, inception, dinov2, a "
            ".safetensors file, module:callable."
        )
    try:
        return _Callable(name, getattr(importlib.import_module(module), attribute))
    except (ImportError, AttributeError) as error:
        raise InputError(f"the extractor {name} cannot be imported ({error}).") from None


def chosen(
    features: str | Any,
    data: Images,
    weights: str | Path | None = None,
    sha256: str | None = None,
    device: str | torch.device | None = None,
    memory: int = HELD,
    folder: Path | None = None,
) -> Any:
    """The extractor of a name (see `extractor`) on a device, or the one given, which brings weights and place."""
    if isinstance(features, str):
        return placed(extractor(features, data, weights, sha256, memory, folder), device)
    if (weights, sha256) != (None, None):
        raise InputError("weights came with an extractor that is no name; it brings its own. Leave them out.")
    return named(features)


def _network(function: Any) -> nn.Module | None:
    """What has weights in an extractor, a classifier or a method of one."""
    owner = getattr(function, "__self__", function)
    network = getattr(owner, "network", owner)
    return network if isinstance(network, nn.Module) else None


def placed(function: Any, device: str | torch.device | None) -> Any:
    """An extractor or classifier with its network on a device, which is refused where it is not there."""
    network, there = _network(function), None if device is None else usable(device)
    if network is not None and there is not None:
        network.to(there)
    return function


def place_of(function: Any) -> torch.device:
    """Where an extractor or classifier wants its images."""
    network = _network(function)
    weight = None if network is None else next(network.parameters(), None)
    return torch.device("cpu") if weight is None else weight.device


def named(function: Any) -> Any:
    """An extractor or classifier as it is, a plain function under its own name."""
    return function if hasattr(function, "name") else _Callable(getattr(function, "__name__", "a callable"), function)


def described(extract: Extractor) -> dict[str, Any]:
    """Name, resize, identity (a hash of weights, ``None`` where they are not known) and accuracy.

    Two extractors of one name, resize and identity give an image the same features: cached statistics rest on it.
    A function may hold anything, so it has no identity unless it brings one.
    """
    identity = getattr(extract, "identity", None)
    network = getattr(extract, "function", extract)
    if identity is None and isinstance(network, nn.Module):
        identity = weights_hash(network)
    accuracy = getattr(extract, "accuracy", None)
    return {
        "name": extract.name,
        "resize": getattr(extract, "resize", "none"),
        "identity": identity,
        "held_out_accuracy": None if accuracy is None or math.isnan(accuracy) else accuracy,
    }


def feature_blocks(extract: Extractor, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Features of a stream of image batches, block by block: [B, F] float64.

    Raises:
        InputError: for NaN or infinity among the features.
    """
    where = place_of(extract)
    for block, rows in padded_blocks(batches, getattr(extract, "batch", BATCH)):
        with torch.inference_mode():
            found = extract(block.to(where))[:rows].double().cpu().clone()
        if not bool(torch.isfinite(found).all()):
            raise InputError(f"the extractor {extract.name} gave NaN or infinity; check the images' range.")
        yield found


def features(extract: Extractor, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """Features [N, F] float64 of images, on padded batches of one fixed size.

    Args:
        extract: the extractor.
        batches: `Images` or one tensor [N, C, H, W], which ranks share, or a stream of batches.
    """
    own, _, shared = own_rows(batches, getattr(extract, "batch", BATCH))
    out = list(feature_blocks(extract, [own] if isinstance(own, torch.Tensor) else own))
    if not out:
        raise InputError("no images to extract features from; expected at least one.")
    found = from_each({"features": torch.cat(out).numpy()}, shared)
    return torch.from_numpy(np.concatenate([f["features"] for f in found]))


def feature_shards(
    extract: Extractor,
    images: Images | Shards,
    memory: int = HELD,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Shards:
    """Features [N, F] float64 of images as rows to be asked for, of which every rank makes and holds a part.

    Args:
        extract: the extractor.
        images: the images.
        memory, folder, progress: see `Shards`.
    """
    size = getattr(extract, "batch", BATCH)
    edges = images.edges if isinstance(images, Shards) else shares(len(images), size)
    own, _, _ = own_rows(images, size)  # shards have edges of their own
    blocks = (rows.numpy() for rows in feature_blocks(extract, own))
    return Shards(blocks, edges, memory, folder, progress=progress)
