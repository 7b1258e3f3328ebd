"""One way of measuring for all starts that are compared: the same network, seeds, features and reference.

start -> images of the reporting seeds -> features -> Fréchet distance over repeats, and other measures of the
images. Choices (a spacing, a level) are made on other seeds. Every number is computed once: with a folder an
interrupted call continues.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import TypeVar

import numpy as np
import torch

from symbreak.data.held_out import check_units
from symbreak.data.images import Images, Units, describe
from symbreak.data.shape import to_fit
from symbreak.intervals import entropy_interval
from symbreak.metrics import Extractor, distance, features, floor
from symbreak.metrics.composition import CLASSES, class_counts
from symbreak.metrics.coverage import precision_recall
from symbreak.metrics.memorization import Different, different, nearest_summary
from symbreak.moments.one_pass import Moments
from symbreak.networks.denoiser import Denoiser, Denoises, as_denoiser, of_network
from symbreak.networks.families import NetworkDenoiser, as_unet, denoiser
from symbreak.networks.guidance import Guided
from symbreak.networks.samplers import LEAST_LEVEL, levels_scheduler
from symbreak.networks.types import Network, Pipeline
from symbreak.noise import generator
from symbreak.report.record import Record
from symbreak.runtime.files import InputError, digest
from symbreak.runtime.identity import identity_of, of_data, unrepeatable
from symbreak.runtime.plain import Values, plain, versions
from symbreak.runtime.rows import Shards
from symbreak.runtime.run import Run
from symbreak.start.classes import Classes
from symbreak.start.late_start import LateStart
from symbreak.start.loading import refuse_conditional
from symbreak.start.sample import Decode, evaluations, generate
from symbreak.studies.diagnosis import spread_of

__all__ = ["Comparison", "Measure", "compared", "pipeline_of", "recorded"]

SELECTION_SEED = 1_000_000  # choices are made on seeds from here on, reports on seeds from 0 on
NEAREST = 500  # images whose nearest training image is looked for
NEIGHBOURS = 1000  # features compared for precision and recall
Name = TypeVar("Name", bound=Hashable)
More = Callable[[torch.Tensor, torch.Tensor], Values]


@dataclass(frozen=True)
class Measure:
    """How a start is measured.

    Attributes:
        extract: the feature extractor (`extractor`).
        samples: images a repeat.
        repeats: of them, for the intervals; the same seeds for every start.
        micro_batch: fixed size of every network evaluation.
    """

    extract: Extractor
    samples: int = 200
    repeats: int = 5
    micro_batch: int = 100


@dataclass
class Comparison:
    """What all starts of a comparison share.

    Attributes:
        unet: the network.
        extract: the feature extractor.
        reference: moments of the held-out images' features.
        train: the training images.
        seeds: of the images that are reported on, cut into ``repeats``.
        choosing: seeds of the images that choose.
        micro_batch: fixed size of every network evaluation.
        run: where finished numbers are kept, under an identity that decides them.
        real: features of the held-out images, for precision and recall, of which a random part is compared.
        stream: of the random numbers that pick training images to noise.
        searched: the images among which copies are looked for, where they are more than ``train``.
        units: of samples that are no pictures, which are not cut to [-1, 1].
        classes: of a class-conditional network, which class every seed has.
        labels: of the training images then, for those that are noised.
        decode: of a latent network: latents -> pictures; ``train`` are latents then, and ``searched`` pictures.
    """

    unet: Network
    extract: Extractor
    reference: Moments
    train: Shards
    seeds: Sequence[int]
    choosing: Sequence[int]
    repeats: int
    micro_batch: int
    run: Run
    real: torch.Tensor | None = None
    stream: int = 62
    searched: Images | None = None
    units: Units | None = None
    classes: Classes | None = None
    labels: torch.Tensor | None = None
    decode: Decode | None = None

    @cached_property
    def known(self) -> Different:
        """The different training images, for the search for copies."""
        return different(self.train if self.searched is None else self.searched, self.run.share(1 / 2))

    def images(
        self, start: LateStart, seeds: Sequence[int], noised: bool = False, unet: Network | None = None
    ) -> torch.Tensor:
        """Images [N, C, H, W] of a start, or from training images noised to its level."""
        clean: torch.Tensor | None = None
        labels: Classes | torch.Tensor | None = self.classes
        if noised:
            # Without replacement, as the floor draws: every image once before any comes again.
            pool = self._of_classes()
            source, count = generator(self.stream, seeds[0]), len(pool)
            rounds = [torch.randperm(count, generator=source) for _ in range(-(-len(seeds) // count))]
            chosen = pool[torch.cat(rounds)[: len(seeds)]]
            clean = self.train.at(chosen)
            labels = None if self.labels is None else self.labels[chosen]
        clamp = None if (self.units, self.decode) == (None, None) else False
        x = generate(unet or self.unet, start, seeds, labels, micro_batch=self.micro_batch, clean=clean, clamp=clamp)
        return x if self.decode is None else self.decode(x)

    def _of_classes(self) -> torch.Tensor:
        """Which training images are noised: all, or those of the classes that are named."""
        if self.classes is None or self.classes.shares or self.labels is None:
            return torch.arange(len(self.train))
        pool = torch.isin(self.labels, self.classes.different()).nonzero()[:, 0]
        if not len(pool):
            raise InputError(f"no training image is of the classes {self.classes.different().tolist()}.")
        return pool

    def cell(
        self,
        start: LateStart,
        more: More | None = None,
        *,
        noised: bool = False,
        unet: Network | None = None,
        key: str = "",
    ) -> Values:
        """Level, NFE and ``distance`` of a start on the reporting seeds, and what ``more(images, features)`` says.

        Args:
            unet: another network than the pipeline's; ``key`` must name it.
        """

        def make() -> Values:
            x = self.images(start, self.seeds, noised, unet)
            f = features(self.extract, x)
            measured = distance(f, self.reference, self.repeats, self.extract.name).to_dict()
            return {"distance": measured, **({} if more is None else more(x, f))}

        name = f"cell/{key}/{_key(start)}/{noised}/{more is not None}"
        calls = evaluations(unet or self.unet, start)
        return {"sigma": start.level.sigma, "calls": calls, **self.run.value(name, make)}

    def score(self, start: LateStart, *, unet: Network | None = None, key: str = "") -> float:
        """The distance of all choosing seeds together."""

        def make() -> float:
            x = self.images(start, self.choosing, unet=unet)
            return distance(features(self.extract, x), self.reference, 1, self.extract.name).pooled

        return float(self.run.value(f"choose/{key}/{_key(start)}", make))

    def choose(self, starts: Mapping[Name, LateStart]) -> tuple[Name, dict[Name, float]]:
        """The name of the best start on the choosing seeds, and all distances there."""
        scores: dict[Name, float] = {}
        for name, start in starts.items():
            twin = next((k for k in scores if _same_grid(starts[k], start)), None)
            scores[name] = self.score(start) if twin is None else scores[twin]
        return min(scores, key=scores.__getitem__), scores

    def quality(self, x: torch.Tensor, f: torch.Tensor, copies: torch.Tensor | None = None) -> Values:
        """Precision, recall, class entropy in bits (where the extractor classifies), nearest training images, copies.

        Each with the ends of its 95 % interval, ``_low`` and ``_high``, ``None`` where it has none.

        Args:
            x, f: images, and their features.
            copies: images whose nearest training images are looked for; by default x.
        """
        if self.real is None:
            raise InputError("a comparison without features of the held-out images has no precision and recall.")
        # Held-out images may come class after class.
        some = torch.randperm(len(self.real), generator=generator(65, 0))[:NEIGHBOURS].sort().values
        near = nearest_summary((x if copies is None else copies)[:NEAREST], self.known, None, self.run)["samples"]
        both = precision_recall(f[:NEIGHBOURS], self.real[some])
        logits = getattr(self.extract, "logits", None)
        entropy = {} if logits is None else entropy_interval(class_counts(logits, x)[CLASSES])
        measures = (
            ("precision", both, "precision", "precision_"),
            ("recall", both, "recall", "recall_"),
            ("entropy", entropy, "value", ""),
            ("nearest", near, "median_nearest", "median_nearest_"),
            ("memorized", near, "memorized", "memorized_"),
        )
        out: Values = {}
        for name, values, key, ends in measures:
            out |= {name: values.get(key), **{f"{name}_{k}": values.get(ends + k) for k in ("low", "high")}}
        return dict(plain(out))


def pipeline_of(model: Pipeline | Denoises | Denoiser, data: Images) -> Pipeline:
    """A diffusers pipeline as it is; a law or a denoiser as one, with a schedule of its own.

    Its 1,000 levels are those that the denoiser knows, from sigma 0.005 on to 20 times the data's whole spread (150 at
    least), see `levels_scheduler`.

    Raises:
        InputError: for anything else, or data that vary by less than the levels of diffusers' schedulers.
    """
    if hasattr(model, "start"):  # which knows what the network's samples are measured in
        model.start.check_units(data)
    if isinstance(model, Guided | NetworkDenoiser):
        if isinstance(model, NetworkDenoiser) and not model.condition:
            return model
        source = model.conditional if isinstance(model, Guided) else model
        if isinstance(source, NetworkDenoiser):  # whose scheduler is known
            return SimpleNamespace(unet=as_unet(model, source.scheduler), scheduler=source.scheduler)
    elif hasattr(model, "unet"):
        return model
    if not isinstance(model, Denoises | Denoiser):
        raise InputError(
            f"model of the type {type(model).__name__}; expected a diffusers pipeline, sb.denoiser(...) or a law."
        )
    network = as_denoiser(model)
    spread = spread_of(data)
    each = spread / math.prod(data.shape) ** 0.5
    if each < 5 * LEAST_LEVEL:
        raise InputError(
            f"the columns of {data.name} vary by {each:.2g}, below the levels of diffusers' schedulers. Open the data "
            "with scale='standard' (--scale), and pass a network that was trained so."
        )
    low, high = network.sigma_range
    base = levels_scheduler(max(1.001 * low, LEAST_LEVEL), min(high / 1.001, max(150.0, 20 * spread)))
    return SimpleNamespace(unet=as_unet(network, base), scheduler=base)


def compared(
    data: Images, holdout: Images, pipeline: Pipeline, measure: Measure, run: Run
) -> tuple[Comparison, Values]:
    """The comparison of starts of a pipeline, with features of all held-out images, and the settings that decide it.

    Raises:
        InputError: for images of another shape than the network's, a network with classes that are open, and for fewer
            than two repeats.
    """
    if measure.samples < 2 or measure.repeats < 2:
        raise InputError(
            f"{measure.repeats} repeats of {measure.samples} samples; expected at least 2 of each for an interval."
        )
    refuse_conditional(pipeline, "the pipeline")
    network = denoiser(pipeline.unet, pipeline.scheduler)
    for name, images in (("the data", data), ("the held-out images", holdout)):
        if images.shape != tuple(network.shape):
            advice = to_fit(images.shape, tuple(network.shape))
            raise InputError(f"{name} are {images.shape}, the network makes {tuple(network.shape)}. {advice}.")
    check_units(data, holdout, "held-out samples")
    run = run.taken()
    real, samples = features(measure.extract, holdout), measure.samples
    of = of_network(network, pipeline.scheduler)
    settings = {
        "data": data.fingerprint(),
        "holdout": holdout.fingerprint(),
        "network": of["weights"],
        "answer": of["answers"],
        "extractor": measure.extract.name,
        "features": digest(real[:16]),
        "samples": samples,
        "repeats": measure.repeats,
        "micro_batch": measure.micro_batch,
    }
    decided = measure.extract.decides(data.shape) or unrepeatable(measure.extract.name)
    decides = {
        "data": of_data(data),
        "holdout": of_data(holdout),
        "network": of,
        "features": {"name": measure.extract.name, "held_out": real, **decided},
        "samples": samples,
        "repeats": measure.repeats,
        "micro_batch": measure.micro_batch,
    }
    comparison = Comparison(
        pipeline.unet,
        measure.extract,
        Moments.fit([real]),
        data.shards(run.share(1 / 4).named("images")),
        range(samples * measure.repeats),
        range(SELECTION_SEED, SELECTION_SEED + samples),
        measure.repeats,
        measure.micro_batch,
        run.identified(identity_of("cells", **decides)),
        real,
        units=data.units,
    )
    return comparison, settings


def recorded(
    kind: str, comparison: Comparison, data: Images, holdout: Images, settings: Values, content: Values
) -> Record:
    """The record of a comparison, saved where the run has a folder."""
    run, extract, unet = comparison.run, comparison.extract, comparison.unet
    samples, repeats = len(comparison.seeds) // comparison.repeats, comparison.repeats
    real = floor(features(extract, data), comparison.reference, samples, repeats, extract.name)
    about = {
        "data": describe(data),
        "held_out": describe(holdout),
        "network": {"parameters": sum(p.numel() for p in unet.parameters()), "weights": settings["network"]},
        "extractor": {"name": extract.name, "held_out_accuracy": extract.to_dict()["held_out_accuracy"]},
        "floor": real.to_dict(),
    }
    record = Record(kind, settings, {**about, **content}, versions(torch.get_num_threads()), run.timings)
    if run.folder is not None:
        record.save(run.folder)
        run.close()
    return record


def _key(start: LateStart) -> str:
    """What decides an image beside the network and its seed: the scheduler, its times, and where it starts from."""
    shape = (1, 4, 4) if start.law is None else start.law.shape
    probe = start(torch.randn(4, *shape, generator=generator(64, 0)))
    config = start.scheduler.to_json_string() if hasattr(start.scheduler, "to_json_string") else ""
    times = torch.as_tensor(start.scheduler.timesteps)
    learned = () if start.learned is None else (str(start.learned.coefficients),)
    return digest(type(start.scheduler).__name__, config, start.steps, start.level, probe, times, *learned)


def _same_grid(a: LateStart, b: LateStart) -> bool:
    """Whether two starts of one scheduler and law visit the same levels."""

    def grid(s: LateStart) -> list[float]:
        levels = np.asarray(s.scheduler.sigmas, dtype=float).tolist()
        return [*map(float, s.scheduler.timesteps), *levels, float(s.scheduler.init_noise_sigma)]

    # Schedulers without sigmas step differently for equal timesteps, so only grids with sigmas are compared.
    return hasattr(a.scheduler, "sigmas") and a.learned == b.learned and grid(a) == grid(b)
