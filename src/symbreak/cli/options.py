"""Options that several commands share, in groups: cyclopts lays each dataclass flat into a command's options.

A group opens what its options name. Errors name the options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from cyclopts import Parameter

from symbreak.cli.console import err, note, note_of
from symbreak.runtime.errors import InputError

if TYPE_CHECKING:
    from symbreak.data.images import Images
    from symbreak.networks.denoiser import Denoiser
    from symbreak.networks.guidance import Guided
    from symbreak.networks.types import Network, Pipeline, Scheduler
    from symbreak.noise import NoiseLevel
    from symbreak.phases.class_information import ConditionInformation
    from symbreak.runtime.plain import Values
    from symbreak.runtime.run import Run
    from symbreak.start.classes import Classes
    from symbreak.start.late_start import LateStart
    from symbreak.start.loading import LatentPipeline

DATA = "digits, a folder of images (sub-folders are classes), a .parquet, .npz, .npy or .csv file, or a hub id"
MODEL = "digits, a diffusers folder or a hub id"
START = (
    "a file of `symbreak fit` (moments, law or start), auto: fitted to --data and chosen, none: white noise "
    "(default: the model's own start where it has one, else none)"
)
EXTRACTORS = (
    "pixels, digits-classifier, classifier, efficientnet-lite0 (or -112), inception (FID), dinov2, FILE.safetensors, "
    "module:callable"
)
CLASSIFIERS = "digits-classifier, classifier (trained on the labels), FILE.safetensors, module:callable"
MICRO = 64  # states of one network evaluation
CONDITIONED = 512  # images by which the window of guidance is found
PROMPTED, PROMPTED_STEPS = 64, 25  # samples of a prompt by which its window is found, and steps of each


def option(name: str | None, text: str) -> Parameter:
    """An option with its help; a value may begin with a minus sign, as in --range -1,1."""
    return Parameter(name, help=text, allow_leading_hyphen=True)


def flag(name: str | None, text: str) -> Parameter:
    """A switch with its help; it is off without it."""
    return Parameter(name, help=text, show_default=False)


Data = Annotated[str, option("--data", DATA)]
Limit = Annotated[int | None, option("--limit", "keep only N of the images, spread evenly over the classes")]
Memory = Annotated[str | None, option("--memory", "working memory, such as 4GB")]
Clusters = Annotated[int | None, option("--clusters", "clusters of a start's mixture law")]
SamplesRange = Annotated[str | None, option("--samples-range", "--range of the samples")]
NullLabel = Annotated[
    int | None,
    option("--null-label", "label of the network's class that stands for none (default: the one that it names)"),
]
Prompt = Annotated[str | None, option("--prompt", "of a text-to-image pipeline: what it is told")]
Vae = Annotated[
    str | None, option("--vae", "of a latent network: folder of its autoencoder, or of a pipeline that has it")
]
Weights = Annotated[str | None, option("--weights", "of inception (file) or dinov2 (folder)")]
Sha256 = Annotated[str | None, option("--weights-sha256", "of other Inception weights than FID's")]
Folder = Annotated[Path | None, option("--out", "folder for record.json and report.html; resumable")]
Json = Annotated[bool, flag("--json", "print one JSON object on stdout and nothing else")]


def required(value: str | None, name: str) -> str:
    """A value that another option asks for.

    Raises:
        InputError: where it is missing.
    """
    if value is None:
        raise InputError(f"{name} is missing.")
    return value


def limits(text: str | None, name: str = "--range", such: str = "0,255") -> tuple[float, float] | None:
    """LOW,HIGH as two numbers."""
    if text is None:
        return None
    try:
        low, high = (float(v) for v in text.split(","))
    except ValueError:
        raise InputError(f"{name} {text}; expected LOW,HIGH such as {such}.") from None
    return low, high


def memory_size(text: str | None) -> int | None:
    """A size such as 4GB, 512MiB or a number of bytes."""
    if text is None:
        return None
    units = {"": 1, "b": 1} | {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}
    units |= {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    try:
        size = float(number) * units[text.strip()[len(number) :].lower()]
    except (ValueError, KeyError):
        size = 0.0
    if not 2**20 <= size < 2**60:
        raise InputError(f"--memory {text}; expected at least 1 MiB, such as 512MB or 4GB.")
    return int(size)


def level(text: str) -> str | float | NoiseLevel:
    """What --at says: speciation, a step, or a noise level by one of its views."""
    from symbreak.noise import NoiseLevel

    if text == "speciation":
        return text
    name, _, value = text.rpartition("=")
    makers: dict[str, Callable[[float], float | NoiseLevel]] = {
        "": float,
        "step": float,
        "sigma": NoiseLevel,
        "tau": NoiseLevel.from_ou_time,
        "log_snr": NoiseLevel.from_log_snr,
    }
    try:
        return makers[name](float(value))
    except (ValueError, OverflowError, KeyError):
        raise InputError(
            f"--at {text}; expected speciation, a step such as 400, sigma=1.5, tau=0.6 or log_snr=-1."
        ) from None


@Parameter(name="*")
@dataclass(frozen=True)
class Reading:
    """How data are read."""

    value_range: Annotated[str | None, option("--range", "value range LOW,HIGH of float arrays, such as 0,255")] = None
    skip_bad: Annotated[bool, flag(None, "leave unusable images out and count them")] = False
    classes: Annotated[str | None, option(None, "keep only these classes, such as cat,dog")] = None
    pad: Annotated[int | None, option(None, "pad images with black to N x N pixels")] = None
    size: Annotated[int | None, option(None, "resize images to N x N pixels, after --crop")] = None
    crop: Annotated[str | None, option(None, "center (the largest square in the middle) or the pixels of its side")] = (
        None
    )
    mode: Annotated[str | None, option(None, "RGB or L (grey); default: RGB where pictures are in colour")] = None
    labels: Annotated[str | None, option(None, "label column, or columns, of a table, such as Smiling; or none")] = None
    split: Annotated[str | None, option(None, "of data with splits, such as test (default: train)")] = None
    layout: Annotated[str | None, option(None, "of arrays: NHWC, NCHW or NHW, where the shape does not tell")] = None
    scale: Annotated[str | None, option(None, "of values that are no pixels: standard, none, or MEAN,STD")] = None

    def options(self) -> Values:
        """The options as `images` takes them."""
        return {
            "value_range": limits(self.value_range),
            "skip_bad": self.skip_bad,
            "classes": None if self.classes is None else tuple(self.classes.split(",")),
            "pad": self.pad,
            "size": self.size,
            "crop": self.crop,
            "mode": self.mode,
            "labels": self.labels,
            "split": self.split,
            "layout": self.layout,
            "scale": self.scale,
        }

    def open(self, source: str, limit: int | None = None, like: Images | None = None) -> Images:
        """The samples that a source names; what reading decided is told on stderr.

        Args:
            like: a data set in whose units samples that are no pictures are measured.
        """
        from symbreak.data.samples import opened

        settings = self.options()
        if like is not None and like.units is not None:
            settings["scale"] = like
        data = opened(source, **settings, limit=limit)
        note_of(data)
        return data

    def open_if(self, source: str | None, data: Images) -> Images | None:
        """The held-out samples that a source names, if one is named; a split is that of the data."""
        return None if source is None else replace(self, split=None).open(source, like=data)


@Parameter(name="*")
@dataclass(frozen=True)
class Machine:
    """Where and how a network runs."""

    device: Annotated[str, option(None, "of the network: auto (a GPU if there is one), cpu, cuda, cuda:1")] = "auto"
    precision: Annotated[str, option(None, "of network evaluations: fp32, bf16 or fp16 (autocast)")] = "fp32"
    compiled: Annotated[bool, flag("--compile", "put the network through torch.compile")] = False

    def place(self) -> str:
        """The device; auto stands for this process's GPU where there is one."""
        import torch

        torch.backends.cudnn.allow_tf32 = False  # ten bits of a product are no single precision
        if self.device != "auto":
            return self.device
        return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"

    def load(
        self, model: str, classes: bool = False, prompt: str | None = None, vae: str | None = None
    ) -> Pipeline | LatentPipeline:
        """The pipeline that a model names; one that needs a class or a prompt only where there is one to give.

        One that was told a prompt, or has an autoencoder, brings pictures to latents and back.
        """
        from symbreak.start.loading import LatentPipeline, load_autoencoder, load_pipeline, refuse_conditional

        autoencoder = None if vae is None else load_autoencoder(vae, self.place())
        pipe = load_pipeline(model, device=self.place(), precision=self.precision, compiled=self.compiled)
        if prompt is None:
            refuse_conditional(pipe, model, classes, latents=vae is not None)
        return pipe if (prompt, vae) == (None, None) else LatentPipeline.of(pipe, prompt, autoencoder)

    def load_if(
        self, model: str | None, classes: bool = False, prompt: str | None = None, vae: str | None = None
    ) -> Any:
        """The pipeline that a model names, if one is named.

        Raises:
            InputError: for a precision, a compiler, a prompt or an autoencoder without a network that they belong to.
        """
        if model is None and (self.precision, self.compiled) != ("fp32", False):
            raise InputError("--precision and --compile belong to a network. Add --model, or leave them out.")
        if model is None and (prompt, vae) != (None, None):
            raise InputError("--prompt and --vae belong to a network. Add --model.")
        return None if model is None else self.load(model, classes, prompt, vae)


@Parameter(name="*")
@dataclass(frozen=True)
class Beginning:
    """Where sampling begins, and how it continues."""

    start: Annotated[str | None, option(None, START)] = None
    at: Annotated[
        str | None, option(None, "of moments or a law: speciation (default), a step such as 400, sigma=1.5")
    ] = None
    sampler: Annotated[str | None, option(None, "ddpm, ddim, pndm, dpm++2m, dpm++2m-karras (default), ...")] = None
    steps: Annotated[int | None, option(None, "num_inference_steps (default: 5; evaluate: 10)")] = None

    def scheduler(self, pipe: Pipeline) -> Scheduler:
        """The sampler's scheduler with the settings of a network's own."""
        from symbreak.networks.samplers import scheduler

        return scheduler("dpm++2m-karras" if self.sampler is None else self.sampler, like=pipe.scheduler)

    def check(self, network: bool = True, clusters: int | None = None) -> None:
        """Raise what can be known before anything is loaded."""
        if self.start == "auto" and not network:
            raise InputError("--start auto belongs to a network. Add --model.")
        if clusters is not None and self.start != "auto":
            raise InputError("--clusters belongs to --start auto. Add it.")
        if self.at is not None and self.start in ("none", "auto"):
            raise InputError(
                f"--at {self.at} came with --start {self.start}, which has no level to give. Leave one of them out."
            )
        path = Path(self.start or "")
        if self.start not in (None, "none", "auto") and not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise InputError(f"{path} {what}; expected a file of `symbreak fit`, auto or none.")

    def plan(self, pipe: Pipeline, steps: int) -> LateStart:
        """The start that the options name, for a network whose own start may say what its samples are measured in."""
        default, start = own_start(pipe), self._plan(pipe, steps)
        if default is None or start.units is not None:
            return start
        return replace(start, pictures=default.pictures, units=default.units)

    def _plan(self, pipe: Pipeline, steps: int) -> LateStart:
        from symbreak.laws import Gaussian
        from symbreak.laws.saving import law_from_tensors
        from symbreak.moments.one_pass import Moments
        from symbreak.runtime.files import read_tensors
        from symbreak.start.fit import late_start
        from symbreak.start.late_start import LateStart, LateStartWarning, check_same_network, standard_start

        number = steps if self.steps is None else self.steps
        base, default = self.scheduler(pipe), own_start(pipe)
        if self.start is None and default is not None:
            if (self.at, self.sampler, self.steps) == (None,) * 3:
                return default
            at = default.level if self.at is None else level(self.at)
            with warnings_as_lines(LateStartWarning):
                return late_start(base, cast("Gaussian", default.law), number, at=at, check=self.at is not None)
        if self.start is None or self.start == "none":
            if self.at is not None:
                raise InputError(f"--at {self.at} came for a model without a start of its own. Pass --start FILE.")
            return standard_start(base, number)
        if self.start == "auto":
            raise InputError("--start auto is for sample and evaluate. Fit one with symbreak fit --start, and pass it.")
        tensors, metadata = read_tensors(self.start)
        kind = metadata.get("format", "")
        if kind == "symbreak.start":
            saved = LateStart.load(self.start)
            if (self.at, self.sampler) != (None, None) or self.steps not in (None, saved.steps):
                raise InputError(
                    f"{self.start} is a start, which brings its own sampler, level and {saved.steps} steps. Leave "
                    "--sampler, --steps and --at out, or pass moments or a law."
                )
            check_same_network(saved, pipe.scheduler, self.start)
            return saved
        law = (
            law_from_tensors(tensors, metadata, self.start)
            if kind == "symbreak.law"
            else Gaussian(Moments.from_tensors(self.start, tensors, metadata))
        )
        with warnings_as_lines(LateStartWarning):
            return late_start(base, law, number, at=level("speciation" if self.at is None else self.at))

    def fit(
        self,
        pipe: Pipeline,
        data: Images,
        holdout: Images | None,
        clusters: int | None,
        steps: int,
        grid: str | None = None,
        at: str = "auto",
        learn: int | None = None,
    ) -> LateStart:
        """A start fitted to data and chosen for a network."""
        from symbreak.start.fit import fit_start
        from symbreak.start.late_start import LateStartWarning

        number = steps if self.steps is None else self.steps
        with err.status("fitting laws and choosing"), warnings_as_lines(LateStartWarning):
            own = own_start(pipe)
            if own is not None:
                own.check_units(data)
            encode = getattr(pipe, "encode", None)
            if encode is not None:
                data, holdout = encode(data), encode(holdout)
            choices: Values = {"grid": grid, "at": at, "learn": learn}
            return fit_start(data, pipe.unet, self.scheduler(pipe), number, holdout, clusters, **choices)

    def measured(
        self, pipe: Pipeline, data: Images, holdout: Images | None, clusters: int | None, steps: int
    ) -> LateStart:
        """The start that the options name; auto is chosen without the images that it is measured against."""
        from symbreak.data.held_out import held_out

        if self.start != "auto":
            return self.plan(pipe, steps)
        return self.fit(pipe, held_out(data, holdout, share=0.5).train, None, clusters, steps)

    def names(self, model: str, machine: Machine, pipe: Pipeline) -> Values:
        """What the options say of network and start, for the record of what decides an image."""
        from symbreak.runtime.files import file_hash

        start = self.start or ("none" if own_start(pipe) is None else "own")
        start = start if start in ("none", "auto", "own") else file_hash(start)[:16]
        return {"model": model, "start": start, "precision": machine.precision, "compiled": machine.compiled}


@Parameter(name="*")
@dataclass(frozen=True)
class Conditions:
    """What a network is told: classes, or a prompt; and the autoencoder of its latents."""

    of_class: Annotated[
        str | None,
        option("--class", "classes to sample, in turn over the seeds, such as 0,3,7; or data: in the shares of --data"),
    ] = None
    null_label: NullLabel = None
    guidance: Annotated[float | None, option(None, "scale of classifier-free guidance (default: 1, none)")] = None
    window: Annotated[
        str | None,
        option(
            None,
            "guide at sigma LOW,HIGH only; auto: where the class is decided, by --data, or the prompt, by samples "
            "(default: everywhere)",
        ),
    ] = None
    prompt: Prompt = None
    vae: Vae = None

    @property
    def needs_data(self) -> bool:
        """Whether labelled data decide something."""
        return self.of_class == "data" or (self.window == "auto" and self.prompt is None)

    def check(self, model: str | None) -> None:
        """Raise what can be known before anything is loaded."""
        if model is None and self != Conditions():
            raise InputError(
                "--class, --null-label, --guidance, --window, --prompt and --vae belong to a network. Add --model."
            )
        if self.prompt is not None and (self.of_class, self.null_label) != (None, None):
            raise InputError("--prompt came with --class or --null-label, which are of classes. Leave them out.")
        if self.guidance is None and self.window is not None:
            raise InputError(f"--window {self.window} came without a scale of guidance. Add --guidance, such as 2.")
        if self.window != "auto":
            limits(self.window, "--window", "0.5,5, or auto")
        self._named()

    def _named(self) -> tuple[int, ...]:
        """The classes that are named; none for data."""
        if self.of_class in (None, "data"):
            return ()
        try:
            return tuple(int(v) for v in str(self.of_class).split(","))
        except ValueError:
            raise InputError(f"--class {self.of_class}; expected numbers such as 0,3,7, or data.") from None

    def classes(self, pipe: Pipeline, data: Images | None) -> Classes | None:
        """Which class every seed has; none for a network without classes.

        Raises:
            InputError: for classes that the network does not have, or a network with classes and none to give.
        """
        from symbreak.networks.denoiser import class_count
        from symbreak.start.classes import Classes
        from symbreak.start.loading import classes_for

        count, named = class_count(pipe.unet), self._named()
        if count is None and self != Conditions(vae=self.vae):
            raise InputError(
                "--class, --null-label, --guidance and --window are for class-conditional networks; this one has "
                "no classes. Leave them out."
            )
        if count is not None and self.of_class is None and data is None:
            raise InputError(
                f"the network has {count} classes. Say which to sample: --class 0,3,7, or --class data with --data."
            )
        return classes_for(pipe, "the pipeline", cast("Images", data), Classes(named) if named else None)

    def applied(
        self, pipe: Pipeline, data: Images | None, unseen: Images | None, run: Run
    ) -> tuple[Network | Guided, Classes | None, Values]:
        """The network with its guidance, the class of every seed, and what the record says of both.

        Args:
            data, unseen: see `classes` and `network`.
            run: see `network`.
        """
        classes = None if self.prompt is not None else self.classes(pipe, data)
        unet, about = self.network(pipe, classes, unseen or data, run)
        about |= getattr(pipe, "about", {})
        return unet, classes, about | ({} if classes is None else {"classes": classes.to_dict()})

    def alone(self, pipe: Pipeline, data: Images | None, unseen: Images | None, run: Run) -> Pipeline | Denoiser:
        """The network with one condition, a class or a prompt, guided where a scale came; else with its null class.

        Args:
            data, unseen: see `network`.
            run: see `network`.
        """
        from symbreak.networks.families import denoiser
        from symbreak.networks.guidance import without_condition

        if self.prompt is not None:
            return self._guided(pipe, None, unseen or data, run)[0]
        classes = self._named()
        if len(classes) == 1:
            of = self.classes(pipe, data)
            return self._guided(pipe, of, unseen or data, run)[0].bind(class_labels=cast("Classes", of).different())
        if (self.of_class, self.guidance) != (None, None):
            raise InputError("a network is asked about, and guided to, one class at a time. Say which: --class 3.")
        if self.null_label is None:
            return pipe
        return without_condition(denoiser(pipe.unet, pipe.scheduler), self.null_label)

    def network(
        self, pipe: Pipeline, classes: Classes | None, data: Images | None, run: Run
    ) -> tuple[Network | Guided, Values]:
        """The network, guided where a scale came, and what the record says of it.

        Args:
            classes: those that are sampled, of which the null class is none: it would be guided against itself.
            data: for a window that is found, labelled images, best ones that the network has not seen.
            run: of the information of the classes.
        """
        if self.guidance is None or (self.guidance == 1 and self.window != "auto"):
            return pipe.unet, {}
        return self._guided(pipe, classes, data, run)

    def _guided(self, pipe: Pipeline, classes: Classes | None, data: Images | None, run: Run) -> tuple[Guided, Values]:
        from symbreak.networks.denoiser import fixed_class
        from symbreak.networks.families import denoiser
        from symbreak.networks.guidance import check_classes, guided, without_condition
        from symbreak.phases.class_information import guidance_window

        network, without = getattr(pipe, "prompted", None) or (denoiser(pipe.unet, pipe.scheduler), None)
        if without is None:
            without = without_condition(network, self.null_label)
            if classes is not None:
                check_classes(classes.different(), pipe.unet, fixed_class(without))
        window, by_data = limits(None if self.window == "auto" else self.window, "--window"), {}
        if self.window == "auto":
            information = self._information(pipe, network, without, data, run)
            predicted = guidance_window(information)
            low, high = window = predicted.levels
            what = "class" if self.prompt is None else "prompt"
            note("guidance", f"the {what} is decided between sigma {low:.4g} and {high:.4g}", *information.notes)
            by_data = {"information": information.to_dict(), "predicted": predicted.to_dict()}
        model = guided(network, without, 1.0 if self.guidance is None else self.guidance, window)
        return model, {"guidance": {**model.guidance, "null_label": self.null_label, **by_data}}

    def _information(
        self, pipe: Pipeline, network: Denoiser, without: Denoiser, data: Images | None, run: Run
    ) -> ConditionInformation:
        """Of the classes by labelled images; of a prompt by samples of the network that was told it."""
        import torch

        from symbreak.networks.latents import encode
        from symbreak.phases.class_information import condition_information
        from symbreak.start.late_start import standard_start
        from symbreak.start.sample import generate
        from symbreak.studies.diagnosis import some_images

        if self.prompt is not None:
            start, seeds = standard_start(pipe.scheduler, PROMPTED_STEPS), range(1_000_000, 1_000_000 + PROMPTED)
            samples = generate(network, start, seeds, clamp=False, run=run)
            return condition_information(network, samples, without=without, run=run)
        images, labels = some_images(cast("Images", data), CONDITIONED, seed=0)
        if getattr(pipe, "autoencoder", None) is not None:
            images = torch.cat(list(encode(pipe.autoencoder, images)))
        return condition_information(network, images, labels, null=self.null_label, run=run)


def guided_lines(settings: Values) -> list[str]:
    """What a person reads of guidance: scale, window and cost."""
    guidance = settings.get("guidance")
    if guidance is None:
        return []
    low, high = guidance["window"]
    where = f"at sigma {low:.4g} to " + ("infinity" if high is None else f"{high:.4g}")
    nothing = "" if guidance["steps"] else " No step of the sampler lies there: guidance changes nothing."
    return [
        f"Guidance of scale {guidance['scale']:g} {where}: {settings['calls']} network evaluations a sample.{nothing}"
    ]


def own_start(pipe: Pipeline) -> LateStart | None:
    """The start that a model brings, as one trained below a law does."""
    return getattr(pipe, "start", None)


@contextmanager
def warnings_as_lines(kind: type[Warning]) -> Iterator[None]:
    """Warnings of a kind as lines of our own on stderr."""
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", kind)
        yield
    for warning in caught:
        if issubclass(warning.category, kind):
            err.print(f"warning: {warning.message}", markup=False)
