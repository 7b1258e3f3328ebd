"""The command line: each command is a thin face of one function.

Exit codes: 0 done; 2 the input is wrong (one line on stderr); 1 the machine failed; 130 / 143 interrupted.
With ``--json`` stdout holds one JSON object and nothing else; progress always goes to stderr.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from dataclasses import replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

from cyclopts import App, CycloptsError, Parameter

from symbreak.cli.console import err, fail, note, note_of, running, say, say_record
from symbreak.cli.options import (
    CLASSIFIERS,
    DATA,
    EXTRACTORS,
    MICRO,
    MODEL,
    Beginning,
    Clusters,
    Conditions,
    Data,
    Folder,
    Json,
    Limit,
    Machine,
    Memory,
    Prompt,
    Reading,
    SamplesRange,
    Sha256,
    Vae,
    Weights,
    flag,
    guided_lines,
    memory_size,
    option,
    required,
    warnings_as_lines,
)
from symbreak.runtime.errors import InputError, visible

if TYPE_CHECKING:
    import torch

    from symbreak.data.images import Images
    from symbreak.laws.law import Law
    from symbreak.networks.denoiser import Denoiser
    from symbreak.report.record import Record
    from symbreak.runtime.identity import Answer
    from symbreak.runtime.plain import Values
    from symbreak.runtime.run import Run
    from symbreak.start.loading import LatentPipeline
    from symbreak.start.sample import Decode
    from symbreak.studies.diagnosis import Effort

POINTS = 500  # at most, of a data set whose world is drawn
OWN = 100  # samples of a network at least, where they stand for data

app = App(
    name="symbreak",
    help="Find the moments at which a diffusion model decides, and start sampling there.",
    help_format="plaintext",
    help_epilogue="Start with: symbreak phases --data digits",
    version=lambda: f"symbreak {version('symbreak')}",
    # Of an option that comes twice the last one counts: scripts add theirs to a common line.
    default_parameter=Parameter(negative=(), show_env_var=False, allow_repeating=True),
    result_action="return_value",
)


@app.command(help_epilogue="Example: symbreak study --data digits --model digits --out build/demo")
def study(
    *,
    data: Data = "digits",
    model: Annotated[str, option(None, MODEL)] = "digits",
    out: Annotated[Path, option(None, "folder for record.json and report.html")] = Path("build/study"),
    holdout: Annotated[str | None, option(None, "images to measure against (default: half of D)")] = None,
    samples: Annotated[int, option(None, "images a cell, over all repeats")] = 1000,
    repeats: Annotated[int, option(None, "repeats for the interval")] = 5,
    samplers: Annotated[str | None, option(None, "rows of the table, such as ddim,dpm++2m")] = None,
    calls: Annotated[str, option(None, "network evaluations (NFE) of the rows")] = "3,5,10",
    features: Annotated[str | None, option(None, f"pixels, efficientnet-lite0, {CLASSIFIERS}")] = None,
    quick: Annotated[bool, flag(None, "a smoke run of a minute: no evidence")] = False,
    conditions: Conditions = Conditions(),
    reading: Reading = Reading(),
    memory: Memory = None,
    machine: Machine = Machine(),
    as_json: Json = False,
) -> None:
    """Measure the late start against the standard start, at equal network evaluations, and write a report."""
    from symbreak.studies.compare_samplers import SAMPLERS, Study, run

    try:
        numbers = tuple(int(n) for n in calls.split(","))
    except ValueError:
        raise InputError(f"--calls {calls}; expected numbers such as 3,5,10.") from None
    settings = Study(
        data,
        model,
        holdout,
        SAMPLERS if samplers is None else tuple(samplers.split(",")),
        numbers,
        samples,
        repeats,
        features=features,
        **reading.options(),
    )
    conditions.check(model)
    with running(out, memory_size(memory)) as work:
        pipe: Any = machine.load(model, True, conditions.prompt, conditions.vae)
        named, about = None, dict[str, Any]()
        if conditions != Conditions():
            opened = reading.open(data)
            unet, classes, about = conditions.applied(pipe, opened, reading.open_if(holdout, opened), work.unstored())
            if unet is not pipe.unet:
                pipe = pipe.of_network(unet) if hasattr(pipe, "decode") else unet
            named = None if classes is None or classes.shares else classes
        record = run(settings.smoke() if quick else settings, pipe, work, named, about)
    note(data, *record.content["data"]["notes"])
    say_record(record, out, as_json, {**record.to_dict(), "report": str(out / "report.html")})


@app.command(
    help_epilogue="Examples: symbreak phases --data digits; "
    "symbreak phases --data digits --model digits --out build/phases; "
    "symbreak phases --model FOLDER --prompt 'a cat' --classify module:callable"
)
def phases(
    *,
    data: Annotated[str | None, option(None, f"{DATA}; with --prompt samples of the network are enough")] = None,
    model: Annotated[str | None, option(None, f"{MODEL}; with it the network")] = None,
    out: Folder = None,
    holdout: Annotated[str | None, option(None, "images for losses and U-turns (default: a part of D)")] = None,
    classify: Annotated[str | None, option(None, CLASSIFIERS)] = None,
    clusters: Annotated[int | None, option(None, "classes are this many clusters of the images")] = None,
    attributes: Annotated[
        str | None,
        option(None, "only: when each attribute is decided, all or columns such as Male,Smiling; --classify: features"),
    ] = None,
    pairs: Annotated[int | None, option(None, "pairs of clones (default 300)")] = None,
    steps: Annotated[int | None, option(None, "sampler steps of a trajectory (default 40)")] = None,
    branches: Annotated[int | None, option(None, "branch levels of the clones (default 12)")] = None,
    conditions: Conditions = Conditions(),
    seed: Annotated[int, option(None, "of all noise")] = 0,
    quick: Annotated[bool, flag(None, "about a minute on the digits: wider intervals")] = False,
    reading: Reading = Reading(),
    limit: Limit = None,
    memory: Memory = None,
    machine: Machine = Machine(),
    as_json: Json = False,
) -> None:
    """When does it decide? Every criterion on one sigma axis, of a data set and, with --model, of a network."""
    from symbreak.metrics.feature_rows import extractor
    from symbreak.studies.attributes import attribute_levels
    from symbreak.studies.diagnose import Effort, diagnose

    if classify == "pixels" and attributes is None:
        raise InputError(
            "--classify pixels gives no classes; expected a classifier, FILE.safetensors or module:callable."
        )
    sizes: dict[str, Any] = {"pairs": pairs, "steps": steps, "branches": branches}
    prompt = conditions.prompt
    if attributes is not None:
        others = {"clusters": clusters, "prompt": prompt, "vae": conditions.vae, "class": conditions.of_class}
        of_network = {"holdout": holdout, "classify": classify, **sizes, "null-label": conditions.null_label}
        of_network |= {"quick": quick or None}
        misplaced = next((name for name, value in others.items() if value is not None), None)
        if misplaced is not None:
            raise InputError(f"--{misplaced} came with --attributes, which have classes of their own. Leave it out.")
        misplaced = next((name for name, value in of_network.items() if value is not None), None)
        if misplaced is not None and model is None:
            raise InputError(f"--{misplaced} came with --attributes, and is asked of a network. Add --model.")
    effort = Effort().quick() if quick else Effort()
    effort = replace(effort, **{k: v for k, v in sizes.items() if v is not None})
    if attributes is not None or prompt is None or holdout is not None:
        required(data, "--data")
    conditions.check(model)
    with running(out, memory_size(memory)) as work:
        pipe: Any = machine.load_if(model, True, prompt, conditions.vae)
        judge, decode = _judge(classify), getattr(pipe, "decode", None)
        if attributes is not None and reading.labels is None:
            reading = replace(reading, labels="none")  # the attributes are the classes
        opened = None if data is None else reading.open(data, limit)
        unseen = None if opened is None else reading.open_if(holdout, opened)
        network: Any = None if pipe is None else conditions.alone(pipe, opened, unseen, work.unstored())
        if opened is None:
            opened = _samples(pipe, network, str(prompt), effort, seed, work)
        else:
            opened = _seen(opened, conditions.of_class, pipe)
            unseen = None if unseen is None else _seen(unseen, conditions.of_class, pipe)
        if attributes is not None:
            names, seen = None if attributes == "all" else attributes.split(","), judge and extractor(str(classify))
            record = attribute_levels(
                opened, names, model=network, holdout=unseen, extract=seen, effort=effort, seed=seed, run=work
            )
            say_record(record, out, as_json)
            return
        if decode is not None and judge is not None:
            judge = _decoded(judge, decode)
        record = diagnose(
            opened, network, holdout=unseen, classify=judge, clusters=clusters, effort=effort, seed=seed, run=work
        )
    say_record(record, out, as_json)


def _judge(classify: str | None) -> Any:
    """The classifier that --classify names; ``None`` for one that is trained."""
    from symbreak.metrics.feature_rows import extractor

    named = None if classify in (None, "classifier") else extractor(str(classify))
    return getattr(named, "function", named)  # a callable may give classes, which are no features


def _seen(data: Images, of_class: str | None, pipe: object) -> Images:
    """Images as a network of one class sees them: those of the class, where they are labelled; latents, where it does.

    Raises:
        InputError: for a class that the data do not have.
    """
    if data.labels is not None and of_class is not None:
        if int(of_class) >= len(data.classes):
            raise InputError(f"{data.name} has the classes 0 to {len(data.classes) - 1}; --class {of_class} is none.")
        data = data.only([data.classes[int(of_class)]])
    return cast("Images", pipe.encode(data)) if hasattr(pipe, "encode") else data


def _samples(pipe: LatentPipeline, network: Denoiser, prompt: str, effort: Effort, seed: int, run: Run) -> Images:
    """Samples of a network that was told a prompt, in place of data: as many latents as a diagnosis asks for."""
    from symbreak.data.samples import samples
    from symbreak.start.late_start import standard_start
    from symbreak.start.sample import generate

    start, count = standard_start(pipe.scheduler, effort.steps), max(OWN, effort.pairs)
    x = generate(network, start, range(seed, seed + count), micro_batch=MICRO, clamp=False, run=run.unstored())
    note(prompt, f"no --data: {count} of the network's own samples, of {effort.steps} steps each, stand for them")
    return replace(samples(x), name=prompt)


def _decoded(judge: Answer, decode: Decode) -> Answer:
    """A classifier of pictures asked of latents."""

    def classify(latents: torch.Tensor) -> object:
        return judge(decode(latents))

    classify.__name__ = f"{getattr(judge, '__name__', 'classifier')} of decoded images"
    return classify


@app.command(
    help_epilogue="Examples: symbreak fit --data digits --out build/digits.safetensors; "
    "symbreak fit --data digits --start --model digits --sampler dpm++2m --steps 3 --out build/start.safetensors"
)
def fit(
    *,
    data: Data,
    out: Annotated[Path, option(None, "safetensors file to write")],
    rank: Annotated[int | None, option(None, "leading modes only, by a streaming sketch: large images")] = None,
    start: Annotated[bool, flag(None, "fit laws and choose a start for a network: law, level and grid")] = False,
    model: Annotated[str | None, option(None, f"with --start: {MODEL}")] = None,
    sampler: Annotated[str | None, option(None, "with --start: ddpm, ddim, dpm++2m, ...")] = None,
    steps: Annotated[int | None, option(None, "with --start: num_inference_steps (default: 5)")] = None,
    holdout: Annotated[str | None, option(None, "with --start: images to choose with (default: a part of D)")] = None,
    clusters: Clusters = None,
    prompt: Prompt = None,
    vae: Vae = None,
    grid: Annotated[
        Literal["free", "entropic"] | None,
        option(None, "with --start: find the levels of all steps, too (free), or equal steps of entropy (entropic)"),
    ] = None,
    at: Annotated[
        Literal["auto", "standard"],
        option(None, "with --start: standard finds a grid for white noise only, without a late start"),
    ] = "auto",
    learn: Annotated[
        int | None,
        option(None, "with --start: learn the sampler's steps from N of the network's own fine trajectories"),
    ] = None,
    reading: Reading = Reading(),
    memory: Memory = None,
    machine: Machine = Machine(),
    as_json: Json = False,
) -> None:
    """Mean and covariance of a data set in one pass; with --start, a start for a network, ready to sample with."""
    from symbreak.moments.one_pass import Moments
    from symbreak.runtime.files import try_writing

    if out.is_dir():
        raise InputError(f"{out} is a folder; expected a file name such as {out / 'moments.safetensors'}.")
    belong = (model, sampler, steps, holdout, clusters, prompt, grid, learn)
    if not start and (belong, at) != ((None,) * len(belong), "auto"):
        raise InputError(
            "--model, --sampler, --steps, --holdout, --clusters, --prompt, --grid, --at and --learn belong to a start. "
            "Add --start."
        )
    if start and (rank, memory) != (None, None):
        raise InputError("--rank and --memory are for moments; a start decides on the rank itself. Leave them out.")
    try_writing(out.parent)
    if start:
        pipe = machine.load(required(model, "--model"), True, prompt, vae)
        beginning = Beginning(sampler=sampler, steps=steps)
        opened = reading.open(data)
        begin = beginning.fit(pipe, opened, reading.open_if(holdout, opened), clusters, 5, grid, at, learn)
        begin.save(out)
        say(as_json, {"out": str(out), **begin.to_dict()}, lambda: _print(begin.explain(), f"start: {out}"))
        return
    machine.load_if(None)
    images = reading.open(data)
    if vae is not None:  # moments of pictures need no diffusers, which takes seconds to import
        from symbreak.start.loading import latents_of, load_autoencoder

        images = latents_of(load_autoencoder(vae, machine.place()), images)
    with running(None, memory_size(memory)) as work:
        moments = Moments.fit(images, rank=rank, run=work)
    moments.save(out)
    value, lines = _about_moments(moments, rank, images)
    value |= {"out": str(out), "skipped": list(images.skipped), "notes": list(images.notes)}
    say(as_json, value, lambda: _print(*lines, f"moments: {out}"))


def _about_moments(moments: Any, rank: int | None, data: Images) -> tuple[dict[str, Any], list[str]]:
    """What `fit` says of moments: plain values, and lines to read."""
    from symbreak.laws import Gaussian
    from symbreak.phases.speciation import speciation_time

    spectrum, critical = moments.spectrum(min(5, moments.dim)), speciation_time(moments)
    value = {
        "count": moments.count,
        "shape": list(moments.shape),
        "eigenvalues": spectrum.values.tolist(),
        "speciation": critical.to_dict(),
    }
    lines = [
        f"{moments.count:,} {data.noun} of {' x '.join(map(str, moments.shape))}; leading eigenvalues "
        + ", ".join(f"{v:.4g}" for v in spectrum.values),
        "no spectral speciation level"
        if critical.sigma is None
        else f"spectral speciation at sigma {critical.sigma:.4g}",
    ]
    if data.units is not None:
        value["units"] = data.units.to_dict()
        if critical.sigma is not None:
            value["units"]["speciation"] = data.units.sigma(critical.sigma).tolist()
            lines[-1] += f" in {data.units.spelled(critical.sigma)}"
    if rank is not None and critical.sigma is not None:
        certificate = Gaussian(moments).certificate(critical.sigma)
        value["certificate_nats"] = certificate.nats
        lines.append(certificate.sentence())
    return value, lines


def _print(*lines: str) -> None:
    sys.stdout.write(visible("\n".join(lines)) + "\n")


@app.command(
    help_epilogue="Example: symbreak sample --model digits --start build/digits.safetensors --steps 5 "
    "--seeds 0-99 --out build/images"
)
def sample(
    *,
    out: Annotated[Path, option(None, "folder for one PNG a seed; of samples that are no pictures one .npy")],
    model: Annotated[str, option(None, MODEL)] = "digits",
    beginning: Beginning = Beginning(),
    conditions: Conditions = Conditions(),
    data: Annotated[
        str | None,
        option(None, "the training images, with --start auto, --class data or --window auto; a table, for its units"),
    ] = None,
    holdout: Annotated[
        str | None, option(None, "with --start auto or --window auto: images to choose with, or to find it by")
    ] = None,
    clusters: Clusters = None,
    seeds: Annotated[str, option(None, "one image a seed, such as 0-99")] = "0-15",
    reading: Reading = Reading(),
    micro_batch: Annotated[int, option(None, "fixed size of every network evaluation")] = MICRO,
    machine: Machine = Machine(),
    as_json: Json = False,
) -> None:
    """Sample images, one a seed, from white noise or from a late start."""
    from symbreak.start.sample import decisive, parse_seeds, write_images

    wanted, auto = parse_seeds(seeds), beginning.start == "auto"
    misplaced = "--data and its options, --holdout and --clusters belong to --start auto. Add it."
    reads = auto or conditions.needs_data
    if (holdout is not None and not reads) or (clusters is not None and not auto):
        raise InputError(misplaced)
    if data is None and reading != Reading():
        raise InputError(misplaced)
    beginning.check()
    conditions.check(model)
    source = required(data, "--data") if reads else data
    opened = None if source is None else reading.open(source)
    if not reads and opened is not None and opened.units is None:
        raise InputError(misplaced)
    with running(out) as work:
        pipe: Any = machine.load(model, True, conditions.prompt, conditions.vae)
        held_out, decode = None if opened is None else reading.open_if(holdout, opened), getattr(pipe, "decode", None)
        begin = None if auto else beginning.plan(pipe, steps=5)  # before a window is looked for
        unet, classes, about = conditions.applied(pipe, opened, held_out, work.unstored())
        if begin is None:
            begin = beginning.fit(pipe, cast("Images", opened), held_out, clusters, steps=5)
        settings = decisive(unet, begin, micro_batch, {**beginning.names(model, machine, pipe), **about})
        more = {"data": opened} if decode is None else {"decode": decode}
        made = write_images(unet, begin, wanted, out, settings, classes, micro_batch=micro_batch, run=work, **more)
    value = {**settings, "out": str(out), "seeds": seeds, "images": len(wanted), "made": made}
    together = [path for path in (out / "samples.csv", out / "samples.npy") if path.is_file()]
    lines = [begin.explain(), *guided_lines(settings), f"{made} of {len(wanted)} samples made: {out}"]
    lines += [f"in the units of the data: {p}" for p in together]
    say(as_json, value, lambda: _print(*lines))


@app.command(
    help_epilogue="Examples: symbreak evaluate --samples build/images --data digits; symbreak evaluate "
    "--samples build/images --data train --holdout test --features inception --weights inception.pth "
    "--out build/evaluation"
)
def evaluate(
    *,
    data: Data,
    samples: Annotated[str | None, option(None, "generated images: a folder or a file")] = None,
    model: Annotated[str | None, option(None, "sample this network instead")] = None,
    holdout: Annotated[str | None, option(None, "images to measure against (default: half of D)")] = None,
    features: Annotated[str | None, option(None, EXTRACTORS)] = None,
    weights: Weights = None,
    weights_sha256: Sha256 = None,
    classify: Annotated[
        str | None, option(None, f"for composition: {CLASSIFIERS}, attributes, attributes:Male,Smiling")
    ] = None,
    reference: Annotated[
        Path | None, option(None, "file of statistics of the held-out images: read, or written if new")
    ] = None,
    repeats: Annotated[int, option(None, "parts of the samples, for the interval")] = 5,
    rows: Annotated[int, option(None, "features held of each set, for all but the Fréchet distance")] = 10_000,
    seed: Annotated[int, option(None, "of parts and subsets")] = 0,
    cache: Annotated[
        bool, Parameter(negative="--no-cache", help="keep statistics of real images in ~/.cache/symbreak")
    ] = True,
    out: Folder = None,
    beginning: Beginning = Beginning(),
    conditions: Conditions = Conditions(),
    clusters: Clusters = None,
    seeds: Annotated[str, option(None, "with --model, such as 0-999")] = "0-999",
    reading: Reading = Reading(),
    samples_range: SamplesRange = None,
    memory: Memory = None,
    machine: Machine = Machine(),
    as_json: Json = False,
) -> None:
    """How far samples are from held-out images, what they leave out, and whether they copy training images."""
    from symbreak.metrics.feature_rows import NamedExtractor
    from symbreak.report.record import Record
    from symbreak.runtime.ranks import rank_of
    from symbreak.start.sample import parse_seeds
    from symbreak.studies.evaluate import Subset, evaluate_network
    from symbreak.studies.evaluate import evaluate as measure

    if (samples is None) == (model is None):
        raise InputError("evaluate needs either --samples or --model.")
    beginning.check(model is not None, clusters)
    conditions.check(model)
    wanted, where = parse_seeds(seeds), machine.place()
    with running(out, memory_size(memory)) as work:
        pipe = machine.load_if(model, True, conditions.prompt, conditions.vae)
        measuring: dict[str, Any] = {
            "features": NamedExtractor(features, weights, weights_sha256, where),
            "classify": None if classify is None else NamedExtractor(classify, device=where),
            "reference": reference,
            "repeats": repeats,
            "subset": Subset(rows, seed),
            "cache": cache,
            "run": work,
        }
        train = reading.open(data)
        held_out = reading.open_if(holdout, train)
        if pipe is not None:
            identity = beginning.names(str(model), machine, pipe)
            begin = beginning.measured(pipe, train, held_out, clusters, steps=10)
            unet, classes, about = conditions.applied(pipe, train, held_out, work.unstored())
            content = evaluate_network(
                unet,
                begin,
                wanted,
                train,
                held_out,
                classes,
                micro_batch=MICRO,
                identity=identity | about,
                decode=getattr(pipe, "decode", None),
                **measuring,
            )
            note("network", *guided_lines(content["sampling"]))
        else:
            images = Reading(samples_range, reading.skip_bad).open(required(samples, "--samples"), like=train)
            content = measure(images, train, held_out, **measuring)
    # only the first process may read the record: it has written it
    record = Record("evaluation", {}, content) if out is None or rank_of()[0] else Record.load(out)
    say_record(record, out, as_json, content)


@app.command(
    help_epilogue="Examples: symbreak audit --data digits --model digits --out build/audit; "
    "symbreak audit --data train/ --samples made/ --holdout test/"
)
def audit(
    *,
    data: Data,
    samples: Annotated[str | None, option(None, "generated images: a folder or a file")] = None,
    model: Annotated[str | None, option(None, "sample this network instead")] = None,
    holdout: Annotated[str | None, option(None, "images it has not seen (default: other half of the digits)")] = None,
    features: Annotated[str, option(None, EXTRACTORS)] = "pixels",
    weights: Weights = None,
    weights_sha256: Sha256 = None,
    threshold: Annotated[float, option(None, "memorized where d1/d2 is below it")] = 1 / 3,
    near: Annotated[
        float | None, option(None, "near duplicates: part of the median eighth-neighbour distance (default 0.1)")
    ] = None,
    count: Annotated[int | None, option(None, "with --model (default: 1000)")] = None,
    steps: Annotated[int | None, option(None, "with --model (default: of its own start, else 50)")] = None,
    sampler: Annotated[str | None, option(None, "with --model (default: of its own start, else dpm++2m)")] = None,
    seeds: Annotated[str | None, option(None, "with --model, instead of --count, such as 0-99")] = None,
    conditions: Conditions = Conditions(),
    seed: Annotated[int, option(None, "of the thinned references and the permutations")] = 0,
    memory: Memory = None,
    out: Folder = None,
    samples_range: SamplesRange = None,
    reading: Reading = Reading(),
    limit: Limit = None,
    machine: Machine = Machine(),
    as_json: Json = False,
) -> None:
    """Does it copy? Duplicates in the data, memorized samples, training against held-out images."""
    from symbreak.metrics.feature_rows import NamedExtractor
    from symbreak.start.sample import parse_seeds
    from symbreak.studies.audit import Sampling
    from symbreak.studies.audit import audit as measure

    sampling: dict[str, Any] = {"count": count, "steps": steps, "sampler": sampler, "seeds": seeds}
    sampling = {k: v for k, v in sampling.items() if v is not None}
    if samples is not None and model is not None:
        raise InputError("--samples and --model came together; pass one of them.")
    if sampling and model is None:
        raise InputError(f"--{next(iter(sampling))} belongs to the samples of a network. Add --model.")
    if count is not None and seeds is not None:
        raise InputError("--count and --seeds came together; pass one of them.")
    if seeds is not None:
        sampling["seeds"] = parse_seeds(seeds)
    conditions.check(model)
    with running(out, memory_size(memory)) as work:
        pipe: Any = machine.load_if(model, True, conditions.prompt, conditions.vae)
        opened = reading.open(data, limit)
        held_out = reading.open_if(holdout, opened)
        if pipe is not None:
            unet, sampling["classes"], about = conditions.applied(pipe, opened, held_out, work.unstored())
            if hasattr(pipe, "decode"):
                sampling |= {"decode": pipe.decode, "identity": about}
            if unet is not pipe.unet:
                sampling["start"], pipe = getattr(pipe, "start", None), unet
        record = measure(
            opened,
            None if samples is None else Reading(samples_range, reading.skip_bad).open(samples, like=opened),
            model=pipe,
            sampling=Sampling(**sampling),
            holdout=held_out,
            features=NamedExtractor(features, weights, weights_sha256, machine.place()),
            threshold=threshold,
            **({} if near is None else {"near": near}),
            seed=seed,
            run=work,
        )
    say_record(record, out, as_json)


@app.command(help_epilogue="Example: symbreak train --data digits --recipe recipes/digits.json --out build/digits")
def train(
    *,
    data: Data,
    out: Annotated[Path, option(None, "folder for the diffusers pipeline")],
    recipe: Annotated[Path | None, option(None, "JSON settings; see recipes/")] = None,
    steps: Annotated[int | None, option(None, "optimizer steps, instead of the recipe's")] = None,
    minutes: Annotated[
        float | None,
        option(None, "train for so long in all, with the law, the previews and the start; 16 steps at least"),
    ] = None,
    residual: Annotated[
        bool, flag(None, "fit a law to the data, and train only what it does not know; brings its own start")
    ] = False,
    conditional: Annotated[bool, flag(None, "tell the network the class of its images, with a null class")] = False,
    init: Annotated[str | None, option(None, f"go on from a finished network: {MODEL}")] = None,
    reading: Reading = Reading(),
    limit: Limit = None,
    memory: Memory = None,
    machine: Machine = Machine(),
    as_json: Json = False,
) -> None:
    """Train a small network; continues from its checkpoint when called again."""
    from symbreak.start.late_start import LateStartWarning
    from symbreak.start.loading import load_pipeline
    from symbreak.start.recipe import Recipe
    from symbreak.start.train import recipe_for, train_network

    if steps is not None and minutes is not None:
        raise InputError("--steps and --minutes came together; pass one of them.")
    loaded = None if recipe is None else Recipe.load(recipe)
    before = None if init is None else load_pipeline(init)
    with running(out, memory_size(memory)) as work, warnings_as_lines(LateStartWarning):
        opened = reading.open(data, limit)
        settings = recipe_for(opened.shape, loaded, before, residual)
        settings = settings if steps is None else replace(settings, steps=steps)
        if steps is None and minutes is None:
            minutes = settings.minutes
        result = train_network(
            opened,
            out,
            replace(settings, minutes=minutes, conditional=conditional or settings.conditional),
            law="auto" if residual else None,
            init=before,
            device=machine.place(),
            precision=machine.precision,
            compiled=machine.compiled,
            run=work,
        )
    steps = result["recipe"]["steps"]
    line = f"{result['parameters']:,} parameters, {steps:,} steps in {result['seconds']:.0f} s, final loss "
    line = f"{line}{result['loss'][-1]:.4f}" + " (1: the network adds nothing)" * residual
    lines = [line, *result.get("start", {}).get("notes", ()), f"pipeline: {out}"]
    sample = f"symbreak sample --model {shlex.quote(str(out))} --seeds 0-15"
    sample += " --class 0" * bool(result["recipe"].get("conditional"))
    sample += f" --out {shlex.quote(f'{out}-samples')}"
    lines += [f"picture: {out / 'training.png'}", f"next: {sample}"]
    say(as_json, {**result, "out": str(out)}, lambda: _print(*lines))


@app.command(
    help_epilogue="Examples: symbreak world two-deltas --train; symbreak world sphere --dim 50; "
    "symbreak world mixture --means FILE --weights .25,.75 --variance .1; symbreak world data FILE"
)
def world(
    name: Annotated[str, option(None, "two-deltas, sphere, mixture, digits; or data, with a FILE")],
    file: Annotated[str | None, option(None, "of samples, whose points are the law (world data FILE)")] = None,
    *,
    dim: Annotated[int | None, option(None, "sphere: dimension of its space (default 3)")] = None,
    means: Annotated[str | None, option(None, "mixture: .csv or .npy FILE of the means, a row each")] = None,
    weights: Annotated[str | None, option(None, "mixture: of the means, such as .25,.75 (default: equal)")] = None,
    variance: Annotated[str | None, option(None, "mixture: of every direction; one number, or one a mean")] = None,
    out: Annotated[Path | None, option(None, "HTML file (default: build/world-NAME.html)")] = None,
    train: Annotated[bool, flag(None, "two-deltas: train a small network and lay it over the exact law")] = False,
    seed: Annotated[int, option(None, "of the trajectories and of the network")] = 0,
    as_json: Json = False,
) -> None:
    """Draw a world where everything is known: potential, fixed points, trajectories, critical times."""
    from symbreak.report.tables import show
    from symbreak.runtime.files import try_writing
    from symbreak.runtime.run import Run
    from symbreak.studies.worlds import check_world, draw_world

    law = _own_law(name, file, dim, means, weights, variance)
    check_world(law, train, seed)
    target = _page(Path(f"build/world-{name}.html") if out is None else out, "world.html")
    try_writing(target.parent)
    with err.status(name) as status:
        run = Run(progress=lambda stage, *_: status.update(f"{name}: {stage}"))
        record = draw_world(law, target, train, seed, run=run)
    say(as_json, {**_undrawn(record), "out": str(target)}, lambda: show(record, target))


def _undrawn(record: Record) -> Values:
    """The record of a world without the curves of its page, which has them."""
    drawn = ("potential", "branches", "trajectories", "position", "sigma", "branch_sigma", "branch_index")
    content = {name: value for name, value in record.content.items() if name not in drawn}
    if content["network"] is not None:
        content["network"] = {name: value for name, value in content["network"].items() if name not in drawn}
    return {**record.to_dict(), "content": content}


def _own_law(
    name: str, file: str | None, dim: int | None, means: str | None, weights: str | None, variance: str | None
) -> str | Law:
    """A world's name, or the law that its options describe."""
    from symbreak.data.samples import opened, samples
    from symbreak.laws import Empirical, Mixture, Sphere

    owners = {
        "FILE": (file, "data"),
        "--dim": (dim, "sphere"),
        "--means": (means, "mixture"),
        "--weights": (weights, "mixture"),
        "--variance": (variance, "mixture"),
    }
    for option_, (value, owner) in owners.items():
        if value is not None and owner != name:
            raise InputError(f"{option_} {value} belongs to symbreak world {owner}, not to {name}. Leave it out.")
    if name == "data":
        data = opened(required(file, "FILE of symbreak world data FILE"))
        data = data if len(data) <= POINTS else data.subset(POINTS)
        note_of(data)
        return Empirical(data.tensor().double())
    if dim is not None:
        if dim < 2:
            raise InputError(f"--dim {dim}; expected at least 2.")
        return Sphere(dim, 1.0)
    if means is None and (weights, variance) == (None, None):
        return name
    centres = samples(required(means, "--means FILE"), labels="none").tensor().double()
    spread = _numbers("--variance", required(variance, "--variance"))
    shares = None if weights is None else _numbers("--weights", weights)
    return Mixture.from_parameters(centres, spread[0] if len(spread) == 1 else spread, shares)


def _numbers(name: str, text: str) -> list[float]:
    """Numbers with commas between them."""
    try:
        return [float(v) for v in text.split(",")]
    except ValueError:
        raise InputError(f"{name} {text}; expected numbers such as .25,.75.") from None


@app.command(help_epilogue="Example: symbreak report build/demo/record.json --out build/demo/report.html")
def report(
    record: Annotated[Path, option(None, "record.json or its folder")],
    *,
    out: Annotated[Path | None, option(None, "HTML file (default: beside the record)")] = None,
    as_json: Json = False,
) -> None:
    """Draw the report of a record again."""
    from symbreak.report.html import write_report
    from symbreak.report.record import Record

    content = Record.load(record)
    target = _page(
        (record if record.is_dir() else record.parent) / "report.html" if out is None else out, "report.html"
    )
    write_report(content, target)
    say(as_json, {"report": str(target)}, lambda: _print(f"report: {target}"))


def _page(target: Path, name: str) -> Path:
    """A file to write a page to.

    Raises:
        InputError: where it is a folder.
    """
    if target.is_dir():
        raise InputError(f"{target} is a folder; expected a file name such as {target / name}.")
    return target


# of a command's records
KINDS = {"study": ("study",), "phases": ("phases", "attributes"), "evaluate": ("evaluation",), "audit": ("audit",)}


def _check_out(command: str, arguments: dict[str, Any]) -> None:
    """An output that is an input, or that holds another command's record, raises an error before anything is done."""
    out = arguments.get("out")
    if out is None or not Path(out).exists():
        return
    inputs = {k: v for k, v in arguments.items() if k != "out" and isinstance(v, str | Path)}
    inputs["start"] = getattr(arguments.get("beginning"), "start", None) or ""
    place = Path(out).resolve()
    for name, value in inputs.items():
        if str(value) not in ("digits", "") and place in (
            Path(value).resolve(),
            (Path(value) / "record.json").resolve(),
        ):
            raise InputError(f"--out {out} is an input, too ({name}). Choose another --out.")
    record = place if place.is_file() else place / "record.json"
    if record.name != "record.json" or not record.is_file() or (command == "report" and place.is_dir()):
        return
    from symbreak.runtime.files import read_json

    content = read_json(record)
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind not in KINDS.get(command, ()):
        raise InputError(
            f"{record} is a record of the kind {kind}, which {command} does not replace. Choose another --out."
        )


def _check_whole(arguments: list[str]) -> None:
    """Whole numbers are whole: cyclopts would round --steps 2.5."""
    options = app[arguments[0]].assemble_argument_collection()
    whole = {name for option in options if int in (option.hint, *get_args(option.hint)) for name in option.names}
    for before, text in pairwise(arguments):
        name, equals, value = text.partition("=")
        name, value = (name, value) if equals else (before, text)
        if name in whole and "." in value and not float(value).is_integer():
            raise InputError(f"{name} {value}; expected a whole number.")


def _called(arguments: list[str]) -> None:
    """Read the arguments, then run the command, on all processes that a launcher started."""
    for before, value in pairwise(["", *arguments]):
        name, equals, rest = value.partition("=")
        if not value or (name.startswith("--") and equals and not rest):  # a shell variable that is not set
            raise InputError(f"{name or before or 'an argument'} came with nothing behind it; expected a value.")
    command, bound, _ = app.parse_args(arguments or ["--help"], exit_on_error=False, print_error=False)
    if command.__module__ != __name__:  # help or version, which need no library
        command(*bound.args, **bound.kwargs)
        return
    from symbreak.runtime.ranks import joined

    _check_whole(arguments)
    _check_out(command.__name__, bound.arguments)
    with joined() as (rank, _):
        err.quiet = rank > 0  # one process speaks for all
        try:
            command(*bound.args, **bound.kwargs)
        finally:
            from symbreak.runtime.lock import release_all

            release_all()


def main(argv: list[str] | None = None) -> None:
    """Run a command and leave with its exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads sleep instead of spinning

    def terminate(*_: object) -> None:
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, terminate)
    code: Any = 0
    try:
        _called(sys.argv[1:] if argv is None else argv)
    except CycloptsError as error:
        fail(2, f"symbreak: {error} See symbreak --help.")
    except InputError as error:
        fail(2, f"symbreak: {error}")
    except SystemExit as left:
        code = left.code
    except KeyboardInterrupt:
        code = 130
    except (OSError, MemoryError) as error:
        fail(1, f"symbreak: the machine failed: {error or type(error).__name__}")
    except Exception as error:
        from safetensors import SafetensorError

        from symbreak.runtime.ranks import lost

        if isinstance(error, SafetensorError):  # how diffusers meets a full disk
            fail(1, f"symbreak: the machine failed: {error}")
        if not lost(error):
            raise
        fail(1, f"symbreak: the machine failed: another process of this run ended ({str(error)[:160]}).")
    if code in (130, 143):
        fail(code, "symbreak: interrupted; the same command continues from what is finished.")
    raise SystemExit(code if isinstance(code, int) else 0)
