"""When does it decide? Every criterion on one sigma axis: data set (and network) -> `Record` of kind "phases".

    data alone     (`ask_data`) spectrum and ladder of modes, class mixture (free entropy, clones, class entropy,
                   stability), the labelled data set itself, loss curves of the laws, collapse
    with a network (`ask_network`) its clones and U-turns, stability, denoising losses and what follows from them, the
                   checks of the mechanism, copies

Every criterion keeps its own name, interval, source and seconds; nothing is averaged into one "critical time".
"""

from __future__ import annotations

from dataclasses import asdict

import torch

from symbreak.data.held_out import held_out
from symbreak.data.images import Images
from symbreak.data.shape import to_fit
from symbreak.laws.class_posterior import class_of
from symbreak.metrics.extractors import device_of
from symbreak.moments.one_pass import Moments
from symbreak.networks.denoiser import Denoiser, Denoises, LawDenoiser, network_of, of_network, open_classes
from symbreak.networks.families import denoises
from symbreak.networks.guidance import Guided, without_condition
from symbreak.networks.types import Pipeline
from symbreak.noise import schedule
from symbreak.phases.branches import Classify
from symbreak.report.record import Record
from symbreak.report.verdict import sentences
from symbreak.runtime.errors import InputError
from symbreak.runtime.files import digest
from symbreak.runtime.identity import Identity, identity_of, of_callable, of_data
from symbreak.runtime.plain import Values, plain, versions
from symbreak.runtime.run import Run, renamed
from symbreak.start.loading import refuse_conditional
from symbreak.studies.ask_data import class_laws, collapse, law_losses, laws_of, spectrum, told_apart
from symbreak.studies.ask_network import along, ask_network, class_reader, name_of
from symbreak.studies.diagnosis import Diagnosis, Effort, some_images, spread_of

__all__ = ["Effort", "about_network", "diagnose", "network_for"]


NO_CLASSES = "No two classes of at least 2 images by the labels: no criterion of classes. Pass --clusters K for some."


@renamed()
def diagnose(
    data: Images,
    model: Pipeline | Denoises | Denoiser | None = None,
    modes: int = 10,
    moments: Moments | None = None,
    *,
    holdout: Images | None = None,
    classify: Classify | None = None,
    clusters: int | None = None,
    effort: Effort | None = None,
    seed: int = 0,
    run: Run | None = None,
) -> Record:
    """When does it decide? Every criterion, for a data set and, where one is given, a network.

    Args:
        data: images, or `samples` of any shape; their labels give the classes.
        model: a diffusers pipeline with ``.unet`` and ``.scheduler``, whose own schedule gives the steps; or a
            `denoiser`, or a law. A class-conditional network is asked with its null class, and for its class
            information; one that does not say which class that is comes as a denoiser with it:
            ``sb.denoiser(unet, scheduler, class_labels=torch.tensor([10]))``. A prompt, or another single condition,
            comes beside the network without it, as `guided` of scale 1: then the record says when it decides, too.
        modes: rungs of the ladder, and pictures of modes.
        moments: of the data, where they are already fitted.
        holdout: images for losses and U-turns that neither laws nor network have seen; by default the other half of
            the digits, else a fifth of ``data`` is kept back. A network may have seen those; the notes say so.
        classify: images [B, *S] -> classes [B] or logits [B, K]; by default a small classifier is trained
            on the labels.
        clusters: classes are this many k-means clusters, of the data for the laws and of the network's own images;
            10 where a network comes without labels and classifier.
        effort: how much to spend; `Effort` counts.
        seed: of all noise.
        run: the folder for ``record.json``, and for finished parts meanwhile: the same call goes on after an
            interruption and gives the same numbers. Memory for the covariance, and for the images held at a time: of
            the collapse's those that do not fit are kept in a file without a name, in the folder or where temporary
            files are; trajectories of a network are watched as they fall onto a subset. By default 4 GiB and 1 GiB.

    Returns:
        A `Record` of kind ``"phases"``; `write_report` draws it.

    Raises:
        InputError: for data, networks, labels and classifiers that do not fit each other.
    """
    effort, run = effort or Effort(), (run or Run()).taken()
    effort.check()
    model, without = _apart(model)
    network = None if model is None else network_for(model, data)
    scheduler = getattr(model, "scheduler", None)
    _check_clusters(data, clusters, classify)
    parts = held_out(data, holdout)
    count = min(len(parts.test), effort.images)
    if network is not None and count < 20:
        raise InputError(
            f"{count} {data.noun} for the losses of a network; expected at least 20. Pass --holdout with more."
        )
    of = None if network is None else of_network(network, scheduler)
    name = "ddpm-linear" if scheduler is None else type(scheduler).__name__
    settings = {
        "data": data.name,
        "content": data.fingerprint(),
        "holdout": None if holdout is None else holdout.fingerprint(),
        "selection": list(data.history),
        "pad": data.pad,
        "value_range": [-data.scale - data.offset, data.scale - data.offset] if data.units is None else None,
        "network": None if of is None else of["weights"],
        "scheduler": None if scheduler is None else {name: plain(dict(scheduler.config))},
        "classify": None if classify is None else name_of(classify),
        "clusters": clusters,
        "modes": modes,
        "seed": seed,
        "memory": run.memory,
        **plain(asdict(effort)),
    }
    decides = {
        "data": of_data(data),
        "holdout": of_data(holdout),
        "network": of,
        "classify": None if classify is None else _classifier(classify, parts.test),
        "moments": None if moments is None else digest(*(v for _, v in sorted(moments.tensors()[0].items()))),
        **{k: settings[k] for k in ("clusters", "modes", "seed", "memory")},
        "effort": asdict(effort),
    }
    run = run.identified(identity_of("phases", **decides))
    steps = schedule("ddpm-linear" if scheduler is None else scheduler)
    d = Diagnosis(data, parts.train, parts.test, effort, seed, run, steps)
    d.notes.append(f"Losses and U-turns: {parts.note}")
    moments, content = spectrum(d, moments, modes)
    if network is not None:
        reader = class_reader(d, classify, clusters)
        clusters = reader.clusters
    elif clusters is None and not told_apart(d.train):
        d.notes.append(NO_CLASSES)
    laws = laws_of(d, moments, clusters)
    class_laws(d, laws)
    if network is None:
        law_losses(d, laws)
    collapse(d, laws)
    if network is not None:
        ask_network(d, network, laws, moments, reader, without)
        content["network"] = about_network(network)
    along(d, network or laws.classes or laws.gaussian)
    content |= {"schedule": name, "held_out": parts.to_dict(), **d.content()}
    content["verdict"] = sentences("phases", content)
    record = Record("phases", settings, content, versions(torch.get_num_threads()), run.timings)
    if run.folder is not None:
        record.save(run.folder)
        run.close()
    return record


def _check_clusters(data: Images, clusters: int | None, classify: Classify | None) -> None:
    """Clusters that there can be, and no classifier beside them."""
    if clusters is not None and not 2 <= clusters <= len(data) // 4:
        raise InputError(f"{clusters} clusters for {len(data):,} {data.noun}; expected 2 to {len(data) // 4:,}.")
    if clusters is not None and classify is not None:
        raise InputError("clusters and a classifier came together; pass one of them.")


Model = Pipeline | Denoises | Denoiser | None


def _apart(model: Model) -> tuple[Model, Denoiser | None]:
    """A network with a single condition, and the same without it, where both came and nothing is guided."""
    if isinstance(model, Guided) and model.scale == 1 and open_classes(model.conditional) is None:
        return model.conditional, model.unconditional
    return model, None


def network_for(model: Pipeline | Denoises | Denoiser, data: Images) -> Denoiser:
    """The denoiser of a pipeline without conditions, a denoiser or a law, that makes samples like the data."""
    if isinstance(model, Denoises):  # a law knows all levels: those that the data need are asked about
        spread = spread_of(data)
        network: Denoiser = LawDenoiser(model, (1e-4 * spread, 100 * spread))
    elif isinstance(model, Denoiser):
        network = model
    elif not hasattr(model, "unet"):
        raise InputError(
            f"model of the type {type(model).__name__}; expected a diffusers pipeline, sb.denoiser(...) or a law."
        )
    else:
        refuse_conditional(model, "the pipeline", classes=True)
        if hasattr(model, "start"):
            model.start.check_units(data)
        network = denoises(model.unet, model.scheduler)
        if open_classes(network) is not None:
            network = without_condition(network)
    if tuple(network.shape) != data.shape:
        raise InputError(
            f"the network makes {data.noun} of {tuple(network.shape)}, but the data are {data.shape}. "
            f"{to_fit(data.shape, tuple(network.shape))}, or choose another network."
        )
    return network


def about_network(network: Denoiser) -> Values:
    """What a record says of a network."""
    inner, guidance = network_of(network), getattr(network, "guidance", None)
    return {
        **({} if guidance is None else {"guidance": guidance}),
        "parameters": 0 if inner is None else sum(p.numel() for p in inner.parameters()),
        "prediction": getattr(network, "prediction", "sample"),
        "sigma_range": list(network.sigma_range),
    }


def _classifier(classify: Classify, test: Images) -> Identity:
    """What tells a classifier from another: its raw answers to images, clean and noised, beside code and weights.

    Raises:
        InputError: for a classifier that gives NaN or a wrong shape, or does not answer the same twice.
    """
    some, _ = some_images(test, 64, 0)
    function = getattr(classify, "logits", classify)
    with torch.inference_mode():
        class_of(function, some)
    decides = of_callable(function, some, device_of(function))
    if decides is None:
        raise InputError(
            f"the classifier {name_of(classify)} does not answer the same images twice in the same way; expected one "
            "without noise of its own. Put it in eval mode."
        )
    return decides
