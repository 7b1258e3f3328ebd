"""Sampling: seeds -> noise -> starts -> images, over any scheduler.

An image is its seed: its noise comes from ``torch.Generator().manual_seed(seed)``, in the order in which
a diffusers pipeline given a list of generators draws it, and every network evaluation runs on a padded
micro-batch of one fixed size, because a network's rows change by about 1e-6 with the batch they run in.
The same seed therefore gives the same bits whatever its neighbours, on one machine, torch build,
number of threads and micro-batch size.
"""

from __future__ import annotations

import csv
import inspect
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from symbreak.data.images import Images, Units
from symbreak.laws.class_posterior import Labels
from symbreak.laws.saving import law_hash
from symbreak.networks.adapters import sample_shape
from symbreak.networks.denoiser import Denoiser, Denoises, fingerprint, of_network
from symbreak.networks.families import answer, denoises, is_picture, posing
from symbreak.networks.types import Network
from symbreak.noise import generator as seeded
from symbreak.noise import schedule
from symbreak.runtime.files import InputError, digest, read_json, write_json, write_whole
from symbreak.runtime.identity import differences, identity_of, of_scheduler, weights_hash
from symbreak.runtime.lock import locked
from symbreak.runtime.plain import Values, plain
from symbreak.runtime.ranks import agreed, alone, map_over_ranks, rank_of, shares
from symbreak.runtime.rows import Shards
from symbreak.runtime.run import Arrays, Run, renamed
from symbreak.start.classes import Classes
from symbreak.start.cut_schedule import check_unclipped
from symbreak.start.late_start import LateStart, law_in_words

__all__ = [
    "Decode",
    "decisive",
    "decoded_shape",
    "evaluations",
    "generate",
    "generate_shards",
    "most_steps",
    "parse_seeds",
    "run_sampler",
    "write_images",
]

BLOCK = 256  # images of a finished part, about
MARK = "symbreak"  # key of the text in a PNG that says what decided it
SPELLED = ("model", "start")  # names, which decide nothing
Generators = torch.Generator | Sequence[torch.Generator] | None
Decode = Callable[[torch.Tensor], torch.Tensor]  # latents [n, *S] -> pictures [n, C, H, W] in [-1, 1]


def parse_seeds(text: str) -> list[int]:
    """Seeds from ``"0-99"``, ``"7"`` or ``"1,4,10-12"``.

    >>> parse_seeds("1,4,10-12")
    [1, 4, 10, 11, 12]
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        try:
            a = int(first)
            b = int(last) if last else a
        except ValueError:
            raise InputError(f"seeds {text!r}; expected numbers and ranges such as 0-99 or 1,4,10-12.") from None
        if b < a or len(seeds) + b - a >= 10_000_000:
            raise InputError(f"the seed range {part.strip()} is empty, or makes more than ten million seeds.")
        seeds.extend(range(a, b + 1))
    return list(dict.fromkeys(seeds))  # 0-3,2 names 2 once


def check(unet: Network, start: LateStart, seeds: Sequence[int], micro_batch: int) -> tuple[int, ...]:
    """What cannot be sampled raises an error before anything is done; the shape (C, H, W) of an image, or another."""
    if not seeds:
        raise InputError("no seeds; expected at least one.")
    if not 0 <= min(seeds) <= max(seeds) < 2**63:
        raise InputError(f"seeds from {min(seeds)} to {max(seeds)}; expected 0 to 2^63 - 1.")
    return check_shape(unet, start, micro_batch)


def check_shape(unet: Network, start: LateStart, micro_batch: int) -> tuple[int, ...]:
    """The shape (C, H, W) of an image, or another; a start whose law has another one raises an error."""
    if micro_batch < 1:
        raise InputError(f"a micro-batch of {micro_batch}; expected at least 1.")
    shape = sample_shape(unet)
    if start.law is not None and tuple(start.law.shape) != shape:
        raise InputError(
            f"the start's law has the shape {tuple(start.law.shape)}, the network {shape}. Fit it on such data."
        )
    start.check_made_for(unet.parameters())
    if not (start.pictures and is_picture(shape)):
        check_unclipped(start.full, f"samples of {' x '.join(map(str, shape))}")
    return shape


def check_labels(unet: Network, labels: Labels | int | None, count: int) -> torch.Tensor | None:
    """Class labels [count] that the network knows, or ``None`` for a network without classes.

    Raises:
        InputError: for labels the network does not have, one too few or too many, none for a network that
            needs them, or some for a network that has no classes.
    """
    classes = getattr(unet.config, "num_class_embeds", None)
    if labels is None:
        if classes:
            raise InputError(f"the network has {classes} classes, but no labels came. Pass one class a sample.")
        return None
    if not classes:
        raise InputError("class labels came for a network without classes. Leave them out.")
    y = torch.as_tensor(labels).detach().cpu()
    if y.ndim == 0:
        y = y.expand(count)
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise InputError(f"class labels of the type {y.dtype}; expected whole numbers.")
    if tuple(y.shape) != (count,):
        raise InputError(f"class labels of shape {tuple(y.shape)} for {count} samples; expected one each.")
    if count and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise InputError(f"class labels from {int(y.min())} to {int(y.max())}; the network knows 0 to {classes - 1}.")
    return y.long()


def evaluations(unet: Network | Denoises | Denoiser, start: LateStart) -> int:
    """Network evaluations (NFE) of a sample: one a step, two where guidance asks with a condition and without."""
    count = getattr(posing(unet, start.full), "evaluations", None)
    return start.calls if count is None else sum(count(float(t)) for t in start.scheduler.timesteps)


def most_steps(
    make: Callable[[int], LateStart], unet: Network | Denoises | Denoiser, budget: int, name: str = "the sampler"
) -> LateStart:
    """The start of the most steps that cost no more than some network evaluations (NFE), guidance's among them.

    Args:
        make: number of steps -> a start.
        unet: what is sampled; `evaluations` counts.
        budget: what may be spent.
        name: what an error calls the sampler.

    Raises:
        InputError: where one step costs more.
    """
    for steps in range(budget, 0, -1):
        start = make(steps)
        if evaluations(unet, start) <= budget:
            return start
    raise InputError(
        f"{name} cannot take a guided step with {budget} network evaluations: both branches count. Choose more, "
        "or a narrower window."
    )


def decoded_shape(shape: Sequence[int], decode: Decode | None) -> tuple[int, ...]:
    """The shape of a network's samples once they are decoded, where they are latents."""
    return tuple(shape) if decode is None else tuple(decode(torch.zeros(1, *shape)).shape[1:])


def precision(unet: Network) -> torch.dtype:
    """The dtype of states: float64 for a float64 network, else float32."""
    weight = next(iter(unet.parameters()), None)
    return torch.float64 if weight is not None and weight.dtype == torch.float64 else torch.float32


def run_sampler(
    start: LateStart,
    state: torch.Tensor,
    network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    generator: Generators = None,
    each: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """The sampler's loop: the state that the first step expects -> the state after the last step, [n, *S].

    Args:
        start: whose scheduler is stepped, in a copy.
        state: [n, *S].
        network: (scaled states, the network's time) -> its prediction.
        generator: for samplers that draw noise: one generator a row, or one for all.
        each: called after every step with its index, the network's time and the state; returns the state
            to go on with.
    """
    scheduler, shape = start.fresh(), state.shape
    # A list of generators: every image draws its own noise, whoever runs beside it.
    extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    scales = hasattr(scheduler, "scale_model_input")  # flow-matching schedulers do not scale
    learned = str(scheduler.config.get("variance_type", "")).startswith("learned")
    for i, t in enumerate(scheduler.timesteps):
        out = network(scheduler.scale_model_input(state, t) if scales else state, t)
        if out.shape[1] == 2 * shape[1] and not (learned and type(scheduler).__name__ == "DDPMScheduler"):
            out = out[:, : shape[1]]  # only DDPM steps know what to do with a learned variance
        _check_finite(out, "the network's answer", start, i)
        try:
            state = scheduler.step(out, t, state, return_dict=False, **extra)[0]
        except (AssertionError, IndexError, NotImplementedError, ValueError) as error:
            what = " ".join(str(error).split())[:120] or type(error).__name__
            raise StepError(f"{_step(start, i)}: diffusers cannot make it ({what}). Use another sampler.") from error
        if each is not None:
            state = each(i, t, state)
        if state.shape != shape:
            raise InputError(f"a step gave states of {tuple(state.shape)}; expected {tuple(shape)}.")
        _check_finite(state, "the state after it", start, i)
    return state


class StepError(InputError):
    """A step that cannot be made, or leads to NaN."""


def _step(start: LateStart, i: int) -> str:
    """Which step of a start, and its level."""
    t, name = float(start.scheduler.timesteps[i]), type(start.scheduler).__name__
    with suppress(ValueError):
        return f"step {i + 1} of {start.calls} of {name}, sigma {schedule(start.full).level(t).sigma:.4g}"
    return f"step {i + 1} of {start.calls} of {name}, time {t:g}"


def _check_finite(x: torch.Tensor, what: str, start: LateStart, i: int) -> None:
    if not bool(torch.isfinite(x).all()):
        raise StepError(
            f"{_step(start, i)}: {what} holds NaN or infinity. The network has diverged, or this sampler does not fit "
            "it: try ddim."
        )


def padded(
    call: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
    micro_batch: int,
    x: torch.Tensor,
    labels: torch.Tensor | None,
) -> torch.Tensor:
    """``call`` over rows and their labels, always on ``micro_batch`` of them: copies of a row pad the last ones."""
    parts = []
    for first in range(0, len(x), micro_batch):
        index = torch.arange(first, first + micro_batch, device=x.device)
        index[len(x) - first :] = first
        parts.append(call(x[index], None if labels is None else labels[index])[: len(x) - first])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def integrate(
    unet: Network,
    start: LateStart,
    noise: torch.Tensor,
    generator: Generators = None,
    *,
    labels: torch.Tensor | None = None,
    micro_batch: int = 64,
    clean: torch.Tensor | None = None,
    each: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    **condition: object,
) -> torch.Tensor:
    """White noise [n, *S] -> the state after the last step of `run_sampler`.

    The start and the network run on padded micro-batches; the scheduler, which acts on every number by
    itself, steps all rows at once.

    Args:
        unet: the network.
        start: the start.
        noise: [n, *S] on the device and in the dtype of the states.
        generator, each: see `run_sampler`.
        labels: classes [n], for the start and the network.
        micro_batch: fixed size of every network evaluation.
        clean: images [n, *S] to noise to the start level instead of drawing from the law.
        **condition: passed to the network.
    """
    labels = None if labels is None else labels.to(noise.device)
    if clean is None:
        state = padded(start, micro_batch, noise, labels)
    else:
        state = start.state(clean.to(noise) + start.level.sigma * noise)

    def network(seen: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return padded(lambda x, y: evaluated(unet, x, t, y, condition), micro_batch, seen, labels)

    return run_sampler(start, state, network, generator, each)


def evaluated(
    unet: Network, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None, condition: dict[str, object]
) -> torch.Tensor:
    """One evaluation of a diffusers network at time t, in the dtype of its weights, answered in that of x."""
    classes = {} if labels is None else {"class_labels": labels}
    return answer(unet, x, t.to(x.device).expand(len(x)), {**condition, **classes})


class _Images:
    """The images of a call of `generate`: checked, and made a part at a time."""

    def __init__(
        self,
        unet: Network,
        start: LateStart,
        seeds: Sequence[int],
        micro_batch: int,
        labels: Classes | Labels | int | None = None,
        clean: torch.Tensor | None = None,
        device: str | torch.device | None = None,
        clamp: bool | None = None,
        **condition: object,
    ) -> None:
        if not isinstance(seeds, Iterable):
            raise InputError(f"seeds={seeds!r}; expected a list of them, such as range({seeds}).")
        unet = posing(unet, start.full)
        self.unet, self.start, self.seeds, self.micro_batch = unet, start, [int(s) for s in seeds], micro_batch
        self.clean, self.condition = clean, condition
        n, self.shape = len(self.seeds), check(unet, start, self.seeds, micro_batch)
        self.clamp = start.pictures and is_picture(self.shape) if clamp is None else clamp
        # Who hands the network its classes directly keeps them from the start, and answers for them.
        labels = labels.of(self.seeds) if isinstance(labels, Classes) else labels
        self.labels = None if "class_labels" in condition else check_labels(unet, labels, n)
        if clean is not None and len(clean) != n:
            raise InputError(f"{len(clean)} clean images for {n} seeds; expected one each.")
        self.device = torch.device(getattr(unet, "device", "cpu") if device is None else device)

    def batch(self, rows: slice) -> torch.Tensor:
        """The images of some seeds [n, *S] float32."""
        generators = [torch.Generator().manual_seed(s) for s in self.seeds[rows]]
        noise = torch.stack([torch.randn(self.shape, generator=g) for g in generators])
        state = integrate(
            self.unet,
            self.start,
            noise.to(self.device, precision(self.unet)),
            generators,
            labels=None if self.labels is None else self.labels[rows],
            micro_batch=self.micro_batch,
            clean=None if self.clean is None else self.clean[rows],
            each=None,
            **self.condition,
        )
        return state.clamp(-1, 1).float().cpu() if self.clamp else state.float().cpu()

    @torch.inference_mode()
    def part(self, first: int, last: int, between: Callable[[int], None]) -> Arrays:
        """The images of seeds first .. last - 1; ``between`` is called at every micro-batch but the first."""
        batches = []
        for at in range(first, last, self.micro_batch):
            if at > first:
                between(at)
            batches.append(self.batch(slice(at, min(at + self.micro_batch, last))))
        return {"x": torch.cat(batches).numpy()}

    @torch.inference_mode()
    def key(self, run: Run) -> str:
        """Name of the finished parts: a digest of all that decides the images, where there is a folder for them."""
        if run.folder is None:
            return "images"
        start = self.start
        noise = torch.randn(1, *self.shape, generator=seeded(0, 97)).expand(self.micro_batch, *self.shape)
        y = None if self.labels is None else self.labels[:1].expand(self.micro_batch).to(self.device)

        def digested() -> str:
            # What the law and the network make of fixed noise tells them apart, with their condition and precision.
            state = start(noise.to(self.device, precision(self.unet)), y)
            answer = evaluated(self.unet, state, torch.as_tensor(start.scheduler.timesteps[0]), y, self.condition)
            law = None
            with suppress(InputError):  # a law that no file holds is told by its states alone
                law = None if start.law is None else law_hash(start.law)
            inputs = [v for v in (self.labels, self.clean, *self.condition.values()) if isinstance(v, torch.Tensor)]
            settings = {**of_scheduler(start.full), "times": torch.as_tensor(start.scheduler.timesteps)}
            settings |= _learned(start)
            scheduler = weights_hash(self.unet), identity_of("images", **settings), start.steps, start.level
            # Of a denoiser the weights do not say its class or guidance, which may count below the first step only.
            posed = (fingerprint(denoises(self.unet, start.full)),) if hasattr(self.unet, "source") else ()
            return digest(state, answer, law, *inputs, *scheduler, *posed, self.micro_batch, self.clamp, self.seeds)

        return f"images-{agreed(digested)}"


@renamed(keep="run=sb.Run(folder)")
def generate(
    unet: Network | Denoises | Denoiser,
    start: LateStart,
    seeds: Sequence[int],
    labels: Classes | Labels | int | None = None,
    *,
    micro_batch: int = 64,
    clean: torch.Tensor | None = None,
    device: str | torch.device | None = None,
    clamp: bool | None = None,
    run: Run | None = None,
    **condition: object,
) -> torch.Tensor:
    """Images, or samples of any other shape, of the given seeds from a network and a start.

    Args:
        unet: diffusers network, `denoiser`, `guided` or law, evaluated on micro-batches.
        start: from `late_start` or `standard_start`; `evaluations` says what an image costs.
        seeds: one integer an image.
        labels: class [N] of every image (one for all, or a rule that gives every seed one), for class-conditional
            networks; the start and the network both get them.
        micro_batch: fixed size of every network evaluation; the last one is padded.
        clean: images [N, *S] to noise to the start level instead of drawing from the law
            (the best any law could do there).
        clamp: cut the result to [-1, 1], as pixels are; by default where samples have the shape of pictures of 1 or 3
            channels, unless the start was fitted to data that are none.
        run: with a folder, finished blocks of images are kept there; tells how many images are done.
        **condition: passed to the network.

    Several processes share the micro-batches, and all of them get all images (`symbreak.runtime.ranks`).

    Returns:
        Images [N, C, H, W], or samples [N, *S] in the network's units, float32.

    Raises:
        InputError: where the law's shape is not the network's, seeds and images do not match, labels
            are missing, too many, or not the network's, or the scheduler cuts to [-1, 1] what is no picture.
    """
    run = (run or Run()).named("images")
    images = _Images(unet, start, seeds, micro_batch, labels, clean, device, clamp, **condition)
    n, key = len(images.seeds), images.key(run)
    size = micro_batch if run.folder is None else _block(micro_batch)

    def block(first: int) -> Arrays:
        make = partial(images.part, first, min(first + size, n), lambda done: run.tell(done, n))
        return run.part(f"{key}/{first}", make)

    parts = map_over_ranks(range(0, n, size), block, lambda blocks, _: run.tell(min(blocks * size, n), n))
    return torch.from_numpy(np.concatenate([part["x"] for part in parts]))


def generate_shards(
    unet: Network | Denoises | Denoiser,
    start: LateStart,
    seeds: Sequence[int],
    labels: Classes | Labels | int | None = None,
    *,
    micro_batch: int = 64,
    clamp: bool | None = None,
    decode: Decode | None = None,
    run: Run | None = None,
) -> Shards:
    """Images of the given seeds, the same as those of `generate`, of which every process makes and holds a part.

    Args:
        unet, start, seeds, labels, micro_batch, clamp: see `generate`.
        decode: of a latent network: latents [n, *S] -> pictures [n, C, H, W]; finished parts are latents.
        run: see `generate`; images beyond its memory go into a file without a name in its folder.
    """
    run = (run or Run()).named("images")
    clamp = clamp if decode is None else False
    images = _Images(unet, start, seeds, micro_batch, labels, clamp=clamp)
    n, size = len(images.seeds), _block(micro_batch)
    edges = shares(n, size)
    memory = run.bytes()
    if len(edges) == 2:  # too few for every process to have some: they share the micro-batches
        x = generate(unet, start, seeds, labels, micro_batch=micro_batch, clamp=clamp, run=run)
        return Shards([(x if decode is None else decode(x)).numpy()], edges, memory, run.folder)
    first, last = edges[rank_of()[0] :][:2]
    key = images.key(run)

    def done(at: int) -> None:
        run.tell(n * (at - first) // (last - first), n)  # this process's share stands for all

    def blocks() -> Iterator[np.ndarray]:
        for at in range(first, last, size):
            end = min(at + size, last)
            with alone():
                x = run.part(f"{key}/{at}", partial(images.part, at, end, done))["x"]
            done(end)
            yield x if decode is None else decode(torch.from_numpy(x)).numpy()

    return Shards(blocks(), edges, memory, run.folder)


def _block(micro_batch: int) -> int:
    """Images of a finished part: whole micro-batches."""
    return micro_batch * max(1, BLOCK // micro_batch)


def decisive(
    unet: Network | Denoises | Denoiser, start: LateStart, micro_batch: int, more: Values | None = None
) -> Values:
    """Everything that decides an image beside its seed, as plain values for a record.

    Args:
        unet: the network.
        start: the start.
        micro_batch: fixed size of every network evaluation.
        more: what the caller knows of the network and the start: names, precision, whether it is compiled.

    Returns:
        With ``identity``: all of it that decides, of which what the network and the start are called is no part.
    """
    of = of_network(denoises(unet, start.full), start.full)
    law = None if start.law is None else law_hash(start.law)
    decides = identity_of(
        "images",
        **of,
        law=law,
        level=[start.level.sigma, start.level.alpha],
        steps=start.steps,
        times=torch.as_tensor(start.scheduler.timesteps),
        **_learned(start),
        micro_batch=micro_batch,
        **{k: v for k, v in (more or {}).items() if k not in (*SPELLED, *of)},
    )
    calls, guidance = evaluations(unet, start), of.get("guidance")
    if guidance is not None:  # how many of its steps are guided: those inside the window
        more = {
            **(more or {}),
            "guidance": {**guidance, **(more or {}).get("guidance", {}), "steps": calls - start.calls},
        }
    settings: Values = plain(
        {
            **(more or {}),
            "probe": of["answers"],  # to fixed states
            "weights": of["weights"],
            "scheduler": json.loads(start.full.to_json_string()),
            "law": law,
            "law_in_words": law_in_words(start.law),
            "micro_batch": micro_batch,
            "device": of["device"].partition(" ")[0],
            "steps": start.steps,
            **({} if start.learned is None else {"learned": start.learned.to_dict()}),
            "calls": calls,
            "level": start.level.to_dict(),
            "identity": decides,
        }
    )
    return settings


def _learned(start: LateStart) -> Values:
    """The coefficients of learned steps, where a start has some."""
    return {} if start.learned is None else {"learned": start.learned.coefficients}


def write_images(
    unet: Network | Denoises | Denoiser,
    start: LateStart,
    seeds: Sequence[int],
    folder: str | Path,
    settings: Values | None = None,
    labels: Classes | int | None = None,
    *,
    micro_batch: int = 64,
    data: Images | None = None,
    decode: Decode | None = None,
    run: Run | None = None,
) -> int:
    """One PNG a seed, ``00000007.png``, and ``sample.json`` with what decides them; an interrupted call continues.

    Samples that are no pictures of 1 or 3 channels become ``00000007.npy``, in the network's units.

    Args:
        unet, start, seeds, micro_batch: see `generate`.
        folder: where the images go; those that are there are not made again.
        settings: of `decisive`, which is called where none come.
        labels: of a class-conditional network: a rule that gives every seed its class, or one for all.
        data: what the network was trained on, where the start does not know its units. All samples that are no pictures
            are also written together in the source's own units: ``samples.csv`` with the columns' names, or
            ``samples.npy`` of what is no vector.
        decode: of a latent network: latents [n, *S] -> pictures [n, C, H, W] in [-1, 1], which are written.
        run: tells how many images are done.

    Returns:
        How many images were made now.

    Raises:
        InputError: as `generate`; and where the folder holds images made with other settings, which are named.
    """
    run, unet = (run or Run()).named("images"), posing(unet, start.full)
    shape = check(unet, start, seeds, micro_batch)
    classes = Classes((labels,)) if isinstance(labels, int) else labels
    known = None if classes is None else classes.different()
    check_labels(unet, known, 0 if known is None else len(known))
    if settings is None:
        settings = decisive(unet, start, micro_batch, None if classes is None else {"classes": classes.to_dict()})
    folder = Path(folder)
    info = folder / "sample.json"
    fresh, pictures = not info.exists(), start.pictures and is_picture(shape)
    if data is not None:
        start.check_units(data)
    units = start.units if data is None else data.units
    pictures = pictures and units is None
    if decode is not None:
        pictures, units, shape = True, None, decoded_shape(shape, decode)
    suffix = "png" if pictures else "npy"
    with locked(folder):
        missing = agreed(lambda: _missing(folder, seeds, settings, shape, suffix))
        write_json(info, settings)  # before any process writes an image
        run.tell(0, len(missing))
        mark = PngInfo()
        mark.add_text(MARK, _mark(settings))

        def made(first: int) -> Arrays:
            some = missing[first : first + micro_batch]
            x = generate(unet, start, some, classes, micro_batch=micro_batch, clamp=pictures and decode is None)
            x = x if decode is None else decode(x)
            if not pictures:
                for seed, one in zip(some, x.numpy()):
                    write_whole(folder / f"{seed:08d}.npy", partial(_save, one))
                return {}
            pixels = ((x + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
            for seed, image in zip(some, pixels):
                picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
                write_whole(folder / f"{seed:08d}.png", partial(picture.save, format="PNG", pnginfo=mark))
            return {}

        def tell(batches: int, _: int) -> None:
            run.tell(min(batches * micro_batch, len(missing)), len(missing))

        try:
            map_over_ranks(range(0, len(missing), micro_batch), made, tell)
        except StepError:
            if fresh and not list(folder.glob(f"*.{suffix}")):
                info.unlink(missing_ok=True)  # nothing is left of images that cannot be made
            raise
        if units is not None:
            _write_together(folder, seeds, units)
    return len(missing)


def _write_together(folder: Path, seeds: Sequence[int], units: Units) -> None:
    """All samples in the units of the data's source; one process writes."""
    if rank_of()[0]:
        return
    x = torch.from_numpy(np.stack([np.load(folder / f"{seed:08d}.npy", allow_pickle=False) for seed in seeds]))
    rows = units.unscaled(x).numpy()
    if rows.ndim > 2:
        write_whole(folder / "samples.npy", partial(_save, rows))
        return
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(units.columns)
    table.writerows([f"{v:.9g}" for v in row] for row in rows.tolist())
    write_whole(folder / "samples.csv", lambda path: path.write_text(text.getvalue(), encoding="utf-8"))


def _save(array: np.ndarray, path: Path) -> None:
    with path.open("wb") as stream:  # of a name numpy would make another one
        np.save(stream, array, allow_pickle=False)


def _mark(settings: Values) -> str:
    return digest(json.dumps(settings.get("identity"), sort_keys=True))


def _missing(folder: Path, seeds: Sequence[int], settings: Values, shape: tuple[int, ...], suffix: str) -> list[int]:
    """Seeds whose images are still to be made.

    Raises:
        InputError: where the folder holds images of other settings, or a file in an image's place that is none of ours.
    """
    info = folder / "sample.json"
    before = read_json(info) if info.exists() else None
    if before is not None:
        old = before.get("identity", before) if isinstance(before, dict) else {}
        names = differences(old or {"kind": "unknown"}, settings.get("identity", settings))
        # The network's answers to fixed states: their last bits are those of a machine and a number of threads.
        why = " (the network's answers: another machine)" if names == "answers" else ""
        if names:
            raise InputError(f"{folder} holds images made with other settings: {names}{why}. Choose another --out.")
    mark, missing = _mark(settings), []
    for seed in seeds:
        path = folder / f"{seed:08d}.{suffix}"
        fault = _fault(path, mark if before is not None else None, shape)
        if fault is None:
            continue
        if fault:
            raise InputError(f"{path} {fault}. Move it away, or choose another --out.")
        missing.append(int(seed))
    return missing


def _fault(path: Path, mark: str | None, shape: tuple[int, ...]) -> str | None:
    """Why a file is not the image that belongs there; "" where there is none, ``None`` for the image itself."""
    try:
        if not path.stat().st_size:
            return ""  # nothing is lost with it
    except FileNotFoundError:
        return ""
    if path.suffix == ".npy":
        try:
            whole = mark is not None and np.load(path, allow_pickle=False).shape == shape
        except Exception as error:
            return f"is no array that can be read ({type(error).__name__})"
        return None if whole else "was not made here"
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            size, bands = (picture.height, picture.width), len(picture.getbands())
            whose = picture.info.get(MARK)
            picture.load()
    except Exception as error:  # Pillow raises a dozen types for a broken file
        return f"is no image that can be read ({type(error).__name__})"
    if mark is None or whose is None:
        return "was not made here"
    if whose != mark:
        return "was made with other settings"
    return None if (size, bands) == (shape[1:], shape[0]) else f"is {size[0]} x {size[1]}, not {shape[1]} x {shape[2]}"
