"""Making a start: from a law at a level, or fitted to a data set and chosen for a network."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from symbreak.critical import CriticalTime
from symbreak.data.held_out import held_out
from symbreak.data.images import Images
from symbreak.laws import Gaussian, PrincipalMixture
from symbreak.laws.class_posterior import Labels
from symbreak.laws.law import Law, Transports
from symbreak.moments.one_pass import Moments
from symbreak.networks.denoiser import Batches, Denoiser, Denoises
from symbreak.networks.families import as_unet, denoises, posing
from symbreak.networks.families import denoiser as adapted_denoiser
from symbreak.networks.latents import Latents
from symbreak.networks.types import Network, Pipeline, Scheduler
from symbreak.noise import NoiseLevel, Schedule
from symbreak.phases.speciation import speciation_time
from symbreak.runtime.files import InputError
from symbreak.runtime.run import Run
from symbreak.start.choose import Measured, choose, free_start
from symbreak.start.cut_schedule import (
    check_levels,
    check_scheduler,
    check_steps,
    check_unclipped,
    no_levels,
    schedule_of,
)
from symbreak.start.late_start import Grid, LateStart, LateStartWarning, cut, on_grid, standard_start
from symbreak.start.learn import check_learnable, learn_steps

__all__ = ["candidate_laws", "cluster_count", "fit_start", "gaussian_law", "late_start"]

CHOOSERS = 256  # images kept back for choosing
FEWEST = 16  # images to choose with
FULL = 4096  # above this dimension the Gaussian keeps RANK modes
RANK = 100


def _resolve(at: NoiseLevel | CriticalTime | str | int | float, law: Transports, full: Schedule) -> NoiseLevel:
    """The level that ``at`` means."""
    if isinstance(at, str):
        if at != "speciation":
            raise InputError(f"at={at!r}; expected 'speciation', 'auto', a level, a CriticalTime or a step.")
        at = speciation_time(cast(Law, law))
    if isinstance(at, CriticalTime):
        if at.level is None:
            raise InputError(
                f"there is no {at.criterion} time to start at: {at.reason} Pass a level or a step instead."
            )
        at = at.level
    if isinstance(at, (int, float, np.integer, np.floating)) and not isinstance(at, bool):
        try:
            at = full.level(float(at))
        except ValueError as error:
            raise InputError(str(error)) from None
    if not isinstance(at, NoiseLevel):
        raise InputError(f"at={at!r}; expected 'speciation', a NoiseLevel, a CriticalTime or a step.")
    try:
        full.time(at)
    except ValueError as error:
        raise InputError(str(error)) from None
    if not 0 < at.sigma < float("inf"):
        raise InputError(f"a late start at sigma {at.sigma:g}; expected a finite level above 0.")
    return at


def late_start(
    scheduler: Scheduler,
    law: Transports | Sequence[Transports],
    steps: int = 5,
    at: NoiseLevel | CriticalTime | str | int | float = "auto",
    denoiser: Denoises | Denoiser | None = None,
    data: Batches | None = None,
    labels: Labels | None = None,
    check: bool = True,
    run: Run | None = None,
    grid: str | Sequence[float] | Grid | None = None,
    learn: int | None = None,
) -> LateStart:
    """Cut a scheduler so that it begins at a level, and start there from a law.

    Args:
        scheduler: a diffusers scheduler (`SUPPORTED` lists the classes); it is not changed.
        law: a law with ``.transport(noise, sigma)``, such as `Gaussian`; for ``"auto"`` also a list of laws.
        steps: num_inference_steps below the start; ``.calls`` says how many network evaluations they cost.
        at: ``"auto"`` weighs what the law costs against what the sampler costs (docs/choosing-a-start.md)
            and may choose the standard start (``law`` is then ``None``); it needs ``denoiser`` and ``data``,
            and without them falls back to ``"speciation"`` (spectral). ``"standard"`` chooses among grids for the
            standard start only. Or a `NoiseLevel`, a `CriticalTime`, or a step of the schedule.
        denoiser: for ``"auto"``: the network as a `Denoiser`, from `denoiser`.
        data: for ``"auto"``: at least 16 images, better 256, best ones that neither law nor network saw.
        labels: for ``"auto"`` with a class-conditional network: class of every image in ``data``.
        check: warn where the level lies below the spectral speciation level, or where ``"auto"`` finds signs
            that the start is not to be trusted.
        run: for ``"auto"``: its progress counts the levels of the losses and the grids that are tried.
        grid: levels of the steps. ``None``: the scheduler's own, or for ``"auto"`` the best of three. ``"free"``: found
            together with the start level on the sampler's cost, never worse in it than those three, without a network
            evaluation. ``"entropic"``: equal steps of the rescaled entropy rate, measured on the network
            (arXiv:2504.13612). Or falling sigmas, or the ``grid`` of another start.
        learn: learn coefficients of the sampler's steps from so many of the network's own fine trajectories, after
            level and grid are known; needs ``denoiser``, and spends network evaluations once (`learn_steps`). ``None``:
            the sampler's own.

    Returns:
        A `LateStart`: ``start(noise)`` is the state that ``start.scheduler.step`` expects first.

    Raises:
        InputError: for a scheduler that cannot be cut, a level outside the schedule, more steps
            than the cut schedule has, or shapes and ranges that do not fit; for a grid that does not fall, has another
            number of steps, or was made for another network; for ``learn`` without a network, too few trajectories, or
            a sampler that draws noise or asks more than once a step.

    Warns:
        LateStartWarning: where the start is later than the spectral speciation level, or not to be trusted.

    Source: arXiv:2305.19693 (Gaussian late start).
    """
    _check_early(scheduler, steps, grid, learn)
    if learn is not None:
        if denoiser is None:
            raise InputError(
                f"learn={learn} came without the network whose trajectories are learned from. Pass denoiser=."
            )
        start = late_start(scheduler, law, steps, at, denoiser, data, labels, check, run, grid)
        return learn_steps(start, denoiser, learn, labels, run=run)
    laws: list[Transports] = list(law) if isinstance(law, Sequence) else [law]
    if not laws:
        raise InputError("no law to start from; expected one, or a list of them.")
    for one in laws:
        if not hasattr(one, "transport"):
            raise InputError(f"{type(one).__name__} is no law to start from: it has no .transport(noise, sigma).")
    if grid is not None and not isinstance(grid, str):
        return _on_levels(scheduler, laws, int(steps), at, denoiser, grid)
    if grid not in (None, "free", "entropic"):
        raise InputError(f"grid={grid!r}; expected 'free', 'entropic', a start's grid, or falling sigmas.")
    standard = isinstance(at, str) and at == "standard"
    automatic = standard or (isinstance(at, str) and at == "auto")
    if automatic and (denoiser is None) != (data is None):
        came, wanted = ("data", "denoiser") if denoiser is None else ("denoiser", "data")
        raise InputError(f"at={at!r} came with {came}= but without {wanted}=. Pass both, or neither.")
    if automatic and denoiser is not None and data is not None:
        start, choice = choose(scheduler, laws, int(steps), denoiser, data, labels, 0, run, grid, standard)
        if check:
            for note in choice.signatures:
                warnings.warn(note, LateStartWarning, stacklevel=2)
        return replace(start, notes=(*start.notes, choice.sentence, *choice.signatures), choice=choice)
    if len(laws) > 1:
        raise InputError(
            f"{len(laws)} laws came without what choosing among them needs. Pass at='auto' with denoiser= and data=, "
            "or one law."
        )
    law = laws[0]
    requested = None if standard else _resolve("speciation" if automatic else at, law, schedule_of(scheduler))
    if standard or grid is not None:
        start = _found(scheduler, law, int(steps), requested, grid)
    else:
        start = cut(scheduler, law, steps, cast(NoiseLevel, requested))
    if check and start.law is not None and hasattr(law, "moments"):
        spectral = speciation_time(cast(Law, law))
        if spectral.sigma is not None and start.level.sigma < spectral.sigma * (1 - 0.02):
            note = (
                f"The start at sigma {start.level.sigma:.4g} lies below the spectral speciation level "
                f"{spectral.sigma:.4g}: the data are no longer Gaussian there; compare non-Gaussianity before you rely "
                "on it."
            )
            start = replace(start, notes=(*start.notes, note))
            warnings.warn(note, LateStartWarning, stacklevel=2)
    return start


def _check_early(scheduler: Scheduler, steps: int, grid: object, learn: int | None) -> None:
    """What can be known of grid and learned steps raises an error before anything costs time."""
    check_scheduler(scheduler)
    check_steps(steps)
    full = schedule_of(scheduler)
    if grid is not None and full.steps is not None and steps > full.steps:
        raise InputError(
            f"{steps} steps are more than the {full.steps:,} levels that the network knows. Ask for fewer."
        )
    if learn is not None:
        check_learnable(standard_start(scheduler, steps), learn)


def _found(scheduler: Scheduler, law: Transports, steps: int, level: NoiseLevel | None, grid: str | None) -> LateStart:
    """A start at a level, or the standard one, on a grid that needs no network."""
    if grid == "entropic":
        raise InputError("grid='entropic' is measured on a network. Pass at='auto' or 'standard', denoiser= and data=.")
    if grid is None:
        raise InputError("at='standard' chooses a grid, but none was named. Pass grid='free', or denoiser= and data=.")
    if not (isinstance(law, Denoises) and hasattr(law, "moments")):
        raise InputError(f"{type(law).__name__} has no .denoise and .moments, which a free grid needs. Leave grid out.")
    reason = no_levels(scheduler)
    if reason:
        start = standard_start(scheduler, steps) if level is None else cut(scheduler, law, steps, level)
        return replace(start, notes=(*start.notes, f"{reason}; its own grid was taken instead of the grid free."))
    return free_start(scheduler, cast(Measured, law), steps, level)


def _on_levels(
    scheduler: Scheduler,
    laws: Sequence[Transports],
    steps: int,
    at: object,
    denoiser: Denoises | Denoiser | None,
    grid: Sequence[float] | Grid,
) -> LateStart:
    """A start on levels that are given, from the first of them."""
    made = grid if isinstance(grid, Grid) else Grid("given", check_levels(grid, steps))
    check_levels(made.sigmas, steps)
    if at not in ("auto", "standard"):
        raise InputError(f"at={at!r} came with a grid, which begins at sigma {made.sigmas[0]:.4g}. Leave at out.")
    if len(laws) > 1:
        raise InputError(f"{len(laws)} laws came with a grid of given levels; expected one law.")
    if denoiser is not None:
        made.check(as_unet(denoiser, scheduler).parameters())
    return on_grid(scheduler, None if at == "standard" else laws[0], made)


def gaussian_law(data: Images) -> Gaussian:
    """The Gaussian of a data set, of rank 100 above 4,096 dimensions."""
    return Gaussian.fit(data) if math.prod(data.shape) <= FULL else Gaussian(Moments.fit(data, rank=RANK))


def cluster_count(n: int) -> int:
    """Clusters of a mixture law of n images: one for 20, at least 2 and at most 60."""
    return min(60, max(2, n // 20))


def candidate_laws(data: Images, clusters: int | None = None) -> list[Gaussian | PrincipalMixture]:
    """Laws worth trying for a data set: one Gaussian, one a class where there are labels, and clusters.

    Args:
        data: images.
        clusters: of the last law; by default those of `cluster_count`.

    Returns:
        A `gaussian_law` and `PrincipalMixture` laws over it.
    """
    gaussian = gaussian_law(data)
    laws: list[Gaussian | PrincipalMixture] = [gaussian]
    if data.labels is not None:
        _, counts = data.labels.unique(return_counts=True)
        if len(counts) > 1 and int(counts.min()) >= 2:
            laws.append(PrincipalMixture.fit(data, labels=True, gaussian=gaussian))
    k = cluster_count(len(data)) if clusters is None else int(clusters)
    if clusters is not None and not 2 <= k <= len(data) // 2:
        raise InputError(f"{k} clusters for {len(data):,} images; expected 2 to {len(data) // 2:,}.")
    if k <= len(data) // 2:
        laws.append(PrincipalMixture.fit(data, components=k, gaussian=gaussian))
    return laws


def fit_start(
    data: Images | Latents,
    unet: Network | Pipeline | Denoises | Denoiser,
    scheduler: Scheduler | None = None,
    steps: int = 5,
    holdout: Batches | None = None,
    clusters: int | None = None,
    check: bool = True,
    run: Run | None = None,
    grid: str | None = None,
    at: str = "auto",
    learn: int | None = None,
    **condition: Any,
) -> LateStart:
    """From a data set and a network to a start, in one call: fit the laws, choose among them.

    Args:
        data: images, or samples of any shape, that the laws are fitted to; or latents, of `encode`.
        unet, scheduler: the network (or a `denoiser`, or a law) and the diffusers scheduler to sample with; or a
            pipeline, which has its own scheduler.
        steps: num_inference_steps.
        holdout: images to choose with (`Images` or a tensor); by default up to 256 of ``data``, a fifth at
            most, are kept back from the fit.
        clusters: see `candidate_laws`.
        check: as in `late_start`.
        run: its progress counts the levels of the losses and the grids that are tried.
        grid: ``"free"`` or ``"entropic"``, see `late_start`.
        at: ``"auto"``, or ``"standard"`` for the standard start's grid only.
        learn: trajectories to learn the sampler's steps from, see `late_start`.
        **condition: of the network, such as ``prompt`` of a pipeline; see `denoiser`.

    Raises:
        InputError: as `late_start`; and for a class-conditional network whose data have no labels.
    """
    if isinstance(data, Latents):
        data = data.images()
    pipeline = hasattr(unet, "scheduler") and not isinstance(unet, Denoises | Denoiser)
    if pipeline or condition:
        told = adapted_denoiser(unet, None if pipeline else scheduler, **condition)
        scheduler, unet = getattr(told, "scheduler", None) if scheduler is None else scheduler, told
    if scheduler is None:
        raise InputError("no scheduler came to sample with; expected one, or a pipeline that has its own.")
    check_scheduler(scheduler)
    for name, value in (("data", data), ("holdout", holdout)):
        if isinstance(value, (str, Path)):
            raise InputError(f"{name}={str(value)!r} is a name; expected images. Pass sb.images({str(value)!r}).")
    if not isinstance(data, Images):
        raise InputError(
            f"data of the type {type(data).__name__}; expected images. Pass sb.images(...) or sb.samples(...)."
        )
    network = denoises(unet, scheduler)
    unet = posing(unet, scheduler)
    if unet.config.get("cross_attention_dim"):
        raise InputError("the network needs a text condition. Use late_start with sb.denoiser(unet, ..., **condition).")
    if data.units is not None:
        check_unclipped(scheduler, f"the samples of {data.name}")
    if tuple(data.shape) != network.shape:
        raise InputError(
            f"{data.name} has {data.noun} of {' x '.join(map(str, data.shape))}, the network works on "
            f"{' x '.join(map(str, network.shape))}. Fit the start on data of the network's shape."
        )
    if holdout is None or isinstance(holdout, Images):
        # The digits' other half is what starts are evaluated on: a start is not chosen with it.
        parts = held_out(data, holdout, min(0.2, CHOOSERS / len(data)), fewest=FEWEST, bundled=False)
        data, holdout = parts.train, parts.test
    labels = None
    if unet.config.get("num_class_embeds"):
        labels = getattr(holdout, "labels", None)
        if labels is None:
            raise InputError("the network is class-conditional, but the images to choose with have no labels.")
    if at not in ("auto", "standard"):
        raise InputError(f"at={at!r}; expected 'auto' or 'standard'. Use late_start for a level.")
    _check_early(scheduler, steps, grid, learn)
    laws = candidate_laws(data, clusters)
    start = late_start(scheduler, laws, steps, at, network, holdout, labels, check, run, grid, learn)
    return start.of(data)
