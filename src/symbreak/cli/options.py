"""What a command line asks for: data sets, networks, starts and sizes, from the words of its options.

Errors name the options. The commands themselves are in `symbreak.cli.commands`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from symbreak.runtime.files import InputError

err = Console(stderr=True)

SAMPLER, STEPS = "dpm++2m-karras", 5
Placed = tuple[str, str, bool]  # device, precision, compiled


def given(source: str | None, name: str) -> str:
    if source is None:
        raise InputError(f"{name} is missing.")
    return source


def limits(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = (float(v) for v in text.split(","))
    except ValueError:
        raise InputError(f"--range {text}; expected LOW,HIGH such as 0,255.") from None
    return low, high


def memory_size(text: str | None) -> int | None:
    """A size such as 4GB, 512MiB or a number of bytes."""
    if text is None:
        return None
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
    units |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    try:
        size = float(number) * units[text.strip()[len(number) :].lower()]
    except (ValueError, KeyError):
        size = 0.0
    if not 2**20 <= size < 2**60:
        raise InputError(f"--memory {text}; expected at least 1 MiB, such as 512MB or 4GB.")
    return int(size)


def level(text: str) -> Any:
    from symbreak.noise import NoiseLevel

    if text == "speciation":
        return text
    name, _, value = text.rpartition("=")
    makers: dict[str, Callable[[float], Any]] = {
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


def start_hash(path: Path) -> str:
    from symbreak.runtime.files import file_hash

    if path.is_dir():
        raise InputError(f"{path} is a folder; expected a file of `symbreak fit`, auto or none.")
    if not path.is_file():
        raise InputError(f"{path} does not exist. Expected a file of `symbreak fit`, auto or none.")
    return file_hash(path)[:16]


def data_set(
    source: str,
    value_range: str | None = None,
    skip_bad: bool = False,
    classes: str | None = None,
    pad: int | None = None,
    limit: int | None = None,
) -> Any:
    from symbreak.data.readers import images

    found = images(
        source,
        value_range=limits(value_range),
        skip_bad=skip_bad,
        classes=None if classes is None else classes.split(","),
        pad=pad,
        limit=limit,
    )
    if found.skipped:
        err.print(f"left out {len(found.skipped)} unusable images (first: {found.skipped[0]})", markup=False)
    return found


def device_of(name: str) -> str:
    """The device that ``auto`` stands for: this process's GPU where there is one."""
    import torch

    torch.backends.cudnn.allow_tf32 = False  # ten bits of a product are no single precision
    if name != "auto":
        return name
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def refuse_without_network(model: str | None, placed: Placed) -> None:
    """A precision and a compiler belong to a network."""
    if model is None and placed[1:] != ("fp32", False):
        raise InputError("--precision and --compile belong to a network. Add --model, or leave them out.")


def loaded(source: str, placed: Placed) -> Any:
    """A network where and how it is to run."""
    from symbreak.networks.loading import load_pipeline, refuse_conditional

    device, precision, compiled = placed
    pipe = load_pipeline(source, device=device_of(device), precision=precision, compiled=compiled)
    refuse_conditional(pipe, source)
    return pipe


@contextmanager
def _warnings(kind: type[Warning]) -> Iterator[None]:
    """Warnings of a kind as lines of our own on stderr."""
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", kind)
        yield
    for warning in caught:
        if issubclass(warning.category, kind):
            err.print(f"warning: {warning.message}", markup=False)


def fitted(
    data: str,
    holdout: str | None,
    clusters: int | None,
    options: tuple[Any, ...],
    pipe: Any,
    sampler: str | None,
    steps: int | None,
) -> tuple[Any, Any]:
    """A start fitted and chosen for a network, and the network."""
    from symbreak.networks.samplers import scheduler
    from symbreak.start.fit import fit_start
    from symbreak.start.late_start import LateStartWarning

    base = scheduler(SAMPLER if sampler is None else sampler, like=pipe.scheduler)
    train = data_set(data, *options)
    kept = None if holdout is None else data_set(holdout, *options)
    with err.status("fitting laws and choosing"), _warnings(LateStartWarning):
        begin = fit_start(train, pipe.unet, base, STEPS if steps is None else steps, kept, clusters)
    return begin, pipe.unet


def planned(
    model: str,
    start: str,
    at: str | None,
    sampler: str | None,
    steps: int | None,
    placed: Placed,
    fitting: tuple[Any, ...] | None = None,
    default_steps: int = STEPS,
) -> tuple[Any, Any]:
    """The start and the network that a command line asks for."""
    from symbreak.laws import Gaussian
    from symbreak.laws.saving import law_from_tensors
    from symbreak.moments.one_pass import Moments
    from symbreak.networks.samplers import scheduler
    from symbreak.runtime.files import read_tensors
    from symbreak.start.fit import late_start
    from symbreak.start.late_start import LateStart, LateStartWarning, check_same_network, standard_start

    if at is not None and start in ("none", "auto"):
        raise InputError(f"--at {at} came with --start {start}, which has no level to give. Leave one of them out.")
    steps_asked = default_steps if steps is None else steps
    if fitting is not None:
        data, holdout, clusters, options = fitting
        return fitted(data, holdout, clusters, options, loaded(model, placed), sampler, steps_asked)
    pipe = loaded(model, placed)
    base = scheduler(SAMPLER if sampler is None else sampler, like=pipe.scheduler)
    if start == "none":
        return standard_start(base, steps_asked), pipe.unet
    if start == "auto":
        raise InputError("--start auto is for sample. Fit one with symbreak fit --start, and pass the file.")
    start_hash(Path(start))  # a missing file is named before anything is read
    tensors, metadata = read_tensors(start)
    kind = metadata.get("format", "")
    if kind == "symbreak.start":
        if (at, sampler, steps) != (None,) * 3:
            raise InputError(
                f"{start} is a start, which brings its own sampler, steps and level. Leave --sampler, --steps and --at "
                "out, or pass moments or a law."
            )
        saved = LateStart.load(start)
        check_same_network(saved, pipe.scheduler, start)
        return saved, pipe.unet
    law: Any
    if kind == "symbreak.law":
        law = law_from_tensors(tensors, metadata, start)
    else:
        law = Gaussian(Moments.from_tensors(start, tensors, metadata))
    with _warnings(LateStartWarning):
        begin = late_start(base, law, steps_asked, at=level("speciation" if at is None else at))
    return begin, pipe.unet


def decisive(model: str, start: str, unet: Any, begin: Any, placed: Placed, micro_batch: int) -> dict[str, Any]:
    """Everything that decides an image beside its seed; the first rank's answers to fixed states are everybody's."""
    from symbreak.start.sample import decisive as settings

    named = start if start in ("none", "auto") else start_hash(Path(start))
    more = {"model": model, "start": named, "precision": placed[1], "compiled": placed[2]}
    return settings(unet, begin, micro_batch, more)


def start_dict(begin: Any) -> dict[str, Any]:
    return {
        "scheduler": type(begin.scheduler).__name__,
        "steps": begin.steps,
        "calls": begin.calls,
        "level": begin.level.to_dict(),
        "law": None if begin.law is None else repr(begin.law),
        "notes": list(begin.notes),
        "choice": None if begin.choice is None else begin.choice.to_dict(),
    }
