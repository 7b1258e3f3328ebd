"""Train a small network: a diffusers UNet2DModel that predicts noise, or one that learns only what a law does not know.

`symbreak.start.objectives` has the losses. Every step draws from generators keyed by (seed, step), so an interrupted
run continues from its checkpoint and ends with the bits of one that was not interrupted.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, UNet2DModel
from diffusers.training_utils import EMAModel

from symbreak.data.images import Images
from symbreak.data.samples import channels_last
from symbreak.laws.law import Law
from symbreak.laws.saving import law_hash
from symbreak.networks.residual import Mlp, backbone, residual_of
from symbreak.networks.types import Pipeline
from symbreak.noise import generator, schedule
from symbreak.runtime.errors import note
from symbreak.runtime.files import (
    InputError,
    damaged,
    file_hash,
    read_json,
    read_tensors,
    readable,
    write_json,
    write_tensors,
)
from symbreak.runtime.identity import Identity, differences, identity_of, of_data, weights_hash
from symbreak.runtime.lock import locked
from symbreak.runtime.plain import Values
from symbreak.runtime.ranks import agreed, rank_of, summed, usable
from symbreak.runtime.rows import Shards
from symbreak.runtime.run import Run, renamed
from symbreak.start.late_start import LateStart
from symbreak.start.loading import load_pipeline
from symbreak.start.objectives import Batch, Epsilon, Objective, Residual, noising
from symbreak.start.pipeline import LateStartPipeline, card
from symbreak.start.recipe import Recipe
from symbreak.start.training_law import TrainingLaw, training_law
from symbreak.start.training_looks import TIMES, Looks

__all__ = ["recipe_for", "train_network"]

PARTS = (  # of a pipeline: without one of them it cannot be loaded
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
)
MACHINE = ("ranks", "threads", "device")  # of which a network that is finished is independent
WARM, TIMED = 2, 5  # steps by which the time of one is measured
FEWEST = 2 * TIMES  # steps, however few minutes there are
LOOKING = 0.1  # share of the minutes that looks may take
AFTER = 0.15  # share of the minutes for what follows the steps, before a look has been timed
CHOICE = 8  # looks that the choice of a start takes the time of


def _is_picture(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and 1 not in shape[1:]


def _check_sides(recipe: Recipe, data: Images) -> None:
    """Pictures that cannot be halved as often as the network does raise an error before a law is fitted."""
    halvings, shape = len(recipe.channels) - 1, data.shape
    if _is_picture(shape) and (shape[1] != shape[2] or shape[1] % 2**halvings):
        raise InputError(
            f"images of {shape[1]} x {shape[2]} do not fit a network with {halvings + 1} resolutions: expected squares "
            f"whose side {2**halvings} divides. Resize (--size) or pad them (--pad), or change the recipe's channels."
            + "".join(f" {note}" for note in channels_last((len(data), *shape)))
        )


def _network(recipe: Recipe, shape: tuple[int, ...], classes: int | None, inputs: int) -> torch.nn.Module:
    """The backbone: a UNet2DModel of pictures, an `Mlp` of everything else."""
    embeds = None if classes is None else classes + 1
    if not _is_picture(shape):
        return Mlp(shape, recipe.channels[0] * 4, max(2, recipe.layers + 1), inputs, embeds)
    c, h, _ = shape
    halvings = len(recipe.channels) - 1
    plain = ["DownBlock2D"] * halvings
    return UNet2DModel(
        sample_size=h,
        in_channels=inputs * c,
        out_channels=c,
        block_out_channels=recipe.channels,
        layers_per_block=recipe.layers,
        down_block_types=(*plain, "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", *(["UpBlock2D"] * halvings)),
        norm_num_groups=8,
        attention_head_dim=8,
        dropout=recipe.dropout,
        num_class_embeds=embeds,
    )


@renamed(reading="run=sb.Run(progress=...)")
def train_network(
    data: Images,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    law: Law | str | None = None,
    init: str | Path | Pipeline | None = None,
    checkpoint_seconds: float = 60.0,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    compiled: bool = False,
    run: Run | None = None,
) -> Values:
    """Train a network on ``data`` and save it as a diffusers folder.

    Without a law it predicts noise, and the folder holds a `diffusers.DDPMPipeline`. With one it learns only what the
    law does not know (`symbreak.networks.residual`), and the folder holds network, law and a start that is chosen for
    it at the end, as `load_pipeline` and `LateStartPipeline.from_pretrained` read them; up to 256 of the images are
    then kept back, to measure held-out losses with and to choose the start.

    Called again with the same arguments after an interruption it continues from the checkpoint in
    ``out``; called after the end it returns the result at once. Several processes read and hold a part of the images
    each, share every batch and add their gradients; dropout draws from a generator a process, so that a run is the
    same bits on the same number of processes.

    Args:
        data: images in [-1, 1]; with a law also data of other shapes, for which a small `Mlp` is trained.
        out: folder for the pipeline, ``training.json``, pictures of how it went and, while it runs, the checkpoint.
        recipe: settings; by default those of `recipe_for`.
        law: ``"auto"`` fits one: clusters, within the classes for a conditional network; or a law of the data's shape;
            ``None`` for a network that knows none.
        init: a finished network of the same architecture and kind to go on from: a folder, ``"digits"``, a hub id, or a
            loaded pipeline.
        checkpoint_seconds: time between checkpoints.
        device: where the network is trained; batches and noise are drawn on the CPU, the same everywhere.
        precision: ``"fp32"``, or ``"bf16"``: forward passes under autocast; weights and averages stay float32.
        compiled: whether the network goes through ``torch.compile``.
        run: images beyond its memory go into a file without a name in ``out``; tells how many images are read
            ("images"), then how many steps are done ("steps").

    Returns:
        The content of ``training.json``: recipe, data, parameters, losses, seconds; with a law also the law, held-out
        losses of network and law, and the start.

    Raises:
        InputError: where the images do not fit the recipe or the law, ``out`` holds another run or files that training
            did not write, or a loss or a weight is no number any more; the last good checkpoint is then left.

    Warns:
        LateStartWarning: where draws of the law are copies of training images, or the recipe's ``top`` lies below
            the level where these can be told apart.
    """
    run = run or Run()
    before = load_pipeline(init) if isinstance(init, str | Path) else init
    recipe = recipe_for(data.shape, recipe, before, law is not None)
    recipe.check()
    if before is not None:
        _same_kind(before, init, law is not None)
    if precision not in ("fp32", "bf16"):
        raise InputError(f"precision {precision!r} for training; expected fp32 or bf16, which needs no scaled loss.")
    if recipe.conditional and data.labels is None:
        raise InputError(
            f"a conditional network needs classes, but {data.name} has no labels. "
            "Put each class into a sub-folder of its own, name the label column (--labels), or leave out --conditional."
        )
    if law is None and len(data.shape) != 3:
        raise InputError(f"data of shape {data.shape} are trained with a law. Pass law='auto' (--residual).")
    _check_sides(recipe, data)
    out, ranks = Path(out), rank_of()[1]
    place = usable(device)
    with locked(out):
        of = of_data(data)
        about: Values = {"recipe": recipe.settings(), "data": data.name, "fingerprint": of["content"]}
        about |= {} if precision == "fp32" else {"precision": precision}  # runs of before it was a choice were fp32
        settings = recipe.settings()
        if recipe.minutes is not None:
            del settings["steps"]
        more: Values = {} if law is None else {"law": law if isinstance(law, str) else law_hash(law)}
        if before is not None:
            more["init"] = weights_hash(before.unet)
        decides = identity_of(
            "training",
            recipe=settings,
            data=of,
            precision=precision,
            compiled=compiled,
            device=place.type,
            ranks=ranks,
            **more,
        )
        if agreed((out / "training.json").exists):
            return _finished(out, about, decides)
        job = _Job(data, out, recipe, law, before, place, decides)
        return _trained(job, about, checkpoint_seconds, run)


def recipe_for(
    shape: tuple[int, ...], recipe: Recipe | None = None, init: Pipeline | None = None, law: bool = False
) -> Recipe:
    """The recipe, or one for data of a shape: with the architecture of the network that training goes on from.

    Below a law a few hundred steps are a network, so they begin at once (warmup) and at a higher rate.
    """
    if recipe is not None:
        return recipe
    small = len(shape) == 3 and max(shape[1:]) > 16
    default = Recipe(channels=(16, 32, 64), batch=64) if small else Recipe()
    if law:
        default = replace(default, steps=2000, warmup=50, lr=1.5e-3 if small else 2e-3, dropout=0.0)
    if init is None:
        return default
    config = backbone(init.unet).config
    channels, layers = config.get("block_out_channels"), config.get("layers_per_block")
    return default if channels is None else replace(default, channels=tuple(channels), layers=int(layers))


@dataclass(frozen=True)
class _Job:
    """What is to be trained, on what, and where."""

    data: Images
    out: Path
    recipe: Recipe
    law: Law | str | None
    before: Pipeline | None
    place: torch.device
    decides: Identity
    began: float = field(default_factory=time.monotonic)

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.safetensors"


def _finished(out: Path, about: Values, decides: Identity) -> Values:
    """What a training that has ended wrote, checked.

    Raises:
        InputError: where it had other settings, or files of the network are missing or changed.
    """
    result = read_json(out / "training.json")
    result = result if isinstance(result, dict) else {}
    before = result.get("identity")
    if before is None:  # of an older symbreak: what it wrote decides
        before = {**about, "precision": "fp32", **result}
        same = {k: before.get(k) for k in (*about, "precision") if k != "data"}
        now = {"precision": "fp32", **{k: v for k, v in about.items() if k != "data"}}
        by, other = differences(same, now), ""
    else:
        here = {k for k in {*before, *decides} if k in MACHINE or k.startswith("versions.")}
        by = differences(before, decides, sorted(here))
        other = differences({k: before.get(k) for k in here}, {k: decides.get(k) for k in here})
    if by:
        why = f"{out} holds a network trained with other settings: {by}."
        raise InputError(f"{why} Choose another --out; --init {out} goes on from this network.")
    for name, sha in (result.get("files") or dict.fromkeys(PARTS)).items():
        path = out / name
        if not path.is_file() or (sha is not None and agreed(partial(file_hash, path)) != sha):
            what = "was changed" if path.is_file() else "is missing"
            raise InputError(
                f"{out} holds a finished training, but {path} {what}. Remove the folder, or choose another --out."
            )
    if other:
        note(f"{out} was trained with other {other} than are here; it is used as it is.")
    if rank_of()[0] == 0:
        (out / "checkpoint.safetensors").unlink(missing_ok=True)  # a run that was killed at its very end leaves it
    return result


def _trained(job: _Job, about: Values, checkpoint_seconds: float, run: Run) -> Values:
    """Train, from the checkpoint where there is one, and save the network."""
    rank, ranks = rank_of()
    out, recipe, checkpoint = job.out, job.recipe, job.checkpoint
    _check_free(out, checkpoint)
    if recipe.batch < ranks:
        raise InputError(f"a batch of {recipe.batch} images for {ranks} processes; expected at least one image each.")
    known = None if job.law is None else training_law(job.data, recipe, job.law)
    data = job.data if known is None else known.parts.train
    images = data.shards(Run(out, run.memory, run.progress).named("images"))
    training = _Training(job, data, known)
    if job.decides["compiled"]:
        training.network.compile()
    training.resume()
    training.go_on(images, checkpoint_seconds, run.named("steps"))
    training.save()  # by which what is put beside it now is known as ours, if this is interrupted
    with training.averaged():
        start = None if known is None else known.start(training.objective.unet())
        training.network.to("cpu")
        parts = []
        if rank == 0:
            with _staging(out) as stage:
                _save(stage, training, start, about)
                for path in stage.rglob("*.safetensors"):
                    readable(path)
                parts = sorted(str(p.relative_to(stage)) for p in stage.rglob("*") if p.is_file())
    parts = agreed(lambda: parts)
    losses = training.losses
    stride = max(1, len(losses) // 100)
    about["recipe"]["steps"] = training.steps
    result = {
        **about,
        "images": len(images),
        "parameters": sum(p.numel() for p in training.parameters),
        "loss": [sum(losses[i : i + stride]) / len(losses[i : i + stride]) for i in range(0, len(losses), stride)],
        "seconds": round(training.seconds, 1),
        "torch": torch.__version__,
        **({} if known is None or start is None else {**known.to_dict(), "start": {**start.to_dict(), "choice": None}}),
        "looks": training.looks.to_dict(),
        "identity": job.decides,
        "files": agreed(lambda: {name: file_hash(out / name) for name in parts}),
    }
    if rank == 0:
        training.looks.draw(result)
    write_json(out / "training.json", result)
    if rank == 0:
        checkpoint.unlink(missing_ok=True)
    return result


def _save(stage: Path, training: _Training, start: LateStart | None, about: Values) -> None:
    """The pipeline, and with a law a card that says how to use it."""
    if start is None:
        DDPMPipeline(unet=training.network, scheduler=noising()).save_pretrained(stage, safe_serialization=True)
        return
    LateStartPipeline(training.objective.unet(), start.scheduler, start).save_pretrained(stage)
    (stage / "README.md").write_text(card(about["data"], start, training.seconds))


class _Training:
    """A network in training: its weights, optimizer and average, the losses of its steps and the seconds spent."""

    def __init__(self, job: _Job, data: Images, known: TrainingLaw | None) -> None:
        recipe = self.recipe = job.recipe
        self.job, self.device, self.labels = job, job.place, data.labels
        classes = None
        if recipe.conditional and data.labels is not None:
            classes = max(len(data.classes), int(data.labels.max()) + 1)
        # Weights are drawn under a forked, seeded global generator: torch's layers offer no other way.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(recipe.seed)
            network: Any = _network(recipe, data.shape, classes, 1 if known is None else 2)
        if classes is not None:
            network.register_to_config(null_label=classes)  # by which a folder says which class is none
        self.network: torch.nn.Module = network
        if job.before is not None:
            _continue(self.network, job.before)
        self.network.to(self.device).train()
        low = schedule(noising()).sigma_range[0]
        self.objective: Objective = (
            Epsilon(self.network) if known is None else Residual(known.residual(self.network), known.folds, low)
        )
        self.looks = Looks(job.out, data.shape, known, data.labels if recipe.conditional else None)
        self.parameters = list(self.network.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
        self.average = EMAModel(self.parameters, decay=recipe.ema, use_ema_warmup=True, power=0.75)
        self.losses: list[float] = []
        self.steps = recipe.steps  # where minutes are to be spent, known after the first steps or from the checkpoint
        self._began, self._before = time.monotonic(), 0.0

    @property
    def spent(self) -> float:
        """Seconds since reading began, and those of the steps before an interruption."""
        return self._before + time.monotonic() - self.job.began

    @property
    def seconds(self) -> float:
        """Seconds spent, with those before an interruption."""
        return self._before + time.monotonic() - self._began

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The network with its average weights, evaluating."""
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)
        self.network.eval()
        try:
            yield
        finally:
            self.network.to(self.device)
            self.average.restore(self.parameters)
            self.network.train()

    def budgeted(self, images: Shards) -> None:
        """As many steps as this machine makes in the recipe's minutes, by the time of a few that are thrown away."""
        minutes = self.recipe.minutes
        if minutes is None or self.losses:
            return
        index, times = torch.arange(len(images))[: self.recipe.batch], []
        for step in range(WARM + TIMED):
            began = time.perf_counter()
            self._gradients(images.at(index), index, step)
            times.append(time.perf_counter() - began)
        self.optimizer.zero_grad(set_to_none=True)
        each = sorted(times[WARM:])[TIMED // 2]
        if (left := self._left()) < FEWEST * each:
            note(
                f"{self.spent:.0f} s of {minutes:g} minutes are spent before the first step: {FEWEST} steps are made. "
                "Give more minutes, or go on from this network (--init)."
            )
        self.steps = agreed(lambda: max(FEWEST, int(left / each)))

    def _left(self) -> float:
        """Seconds of the recipe's minutes for further steps, less those for looks and the choice of a start."""
        whole, looks = 60 * (self.recipe.minutes or 0), self.looks.seconds
        after = (1 + CHOICE * (self.looks.known is not None)) * looks[-1] if looks else AFTER * whole
        return whole - self.spent - after - max(0.0, LOOKING * whole - sum(looks))

    def affordable(self) -> bool:
        """Whether one more look leaves the share of the minutes to looks that it may have."""
        looks, minutes = self.looks.seconds, self.recipe.minutes
        return minutes is None or agreed(lambda: sum(looks) + (looks[-1] if looks else 0.0) <= LOOKING * 60 * minutes)

    def paced(self, seconds: float, steps: int) -> None:
        """Fewer steps than were planned where a busy machine has made so many of them in so many seconds, and looks."""
        if self.recipe.minutes is not None:
            each, done = (seconds - sum(self.looks.seconds)) / steps, len(self.losses)
            more = max(1, int(self._left() / max(each, 1e-9)))
            self.steps = agreed(lambda: min(self.steps, max(FEWEST, done + more)))

    def go_on(self, images: Shards, every: float, run: Run) -> None:
        """Steps up to the last one, with a checkpoint every so many seconds and where the run is interrupted."""
        recipe, saved = self.recipe, time.monotonic()
        self.budgeted(images)
        began, before = time.monotonic(), len(self.losses)
        per_epoch = max(1, len(images) // recipe.batch)
        whole = True  # weights, average and step count belong together
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        try:
            while (step := len(self.losses)) < self.steps:
                if step // per_epoch != epoch:
                    epoch = step // per_epoch
                    order = torch.randperm(len(images), generator=generator(recipe.seed, 1, epoch))
                first = step % per_epoch * recipe.batch
                index = order[first : first + recipe.batch]
                loss = self._gradients(images.at(index), index, step)
                value = loss.item()
                if not math.isfinite(value):
                    raise self._diverged(f"the loss of step {step + 1} is {value}")
                whole = False
                self.optimizer.step()
                self.average.step(self.parameters)
                self.losses.append(value)
                last = step + 1 == self.steps
                if self.looks.due(step + 1, self.steps) and self.finite():
                    if last or self.affordable():
                        with self.averaged():
                            self.looks.look(self.objective.unet(), step + 1, self.device)
                    if not last:
                        self.paced(time.monotonic() - began, step + 1 - before)
                whole = True
                if (step + 1) % 10 == 0 or step + 1 == self.steps:
                    run.tell(step + 1, self.steps)
                if time.monotonic() - saved > every and self.finite():
                    self.save()
                    saved = time.monotonic()
        except (KeyboardInterrupt, SystemExit):  # Ctrl-C and SIGTERM
            if whole and self.finite():  # in the middle of an update only the last checkpoint is consistent
                self.save()
            raise
        if not self.finite():
            raise self._diverged("the network has weights that are no numbers")

    def finite(self) -> bool:
        """Whether all weights and their averages are numbers."""
        weights = (*self.parameters, *self.average.shadow_params)
        return all(bool(torch.isfinite(p).all()) for p in weights)

    def _diverged(self, what: str) -> InputError:
        checkpoint = self.job.checkpoint
        left = f"the last good state is in {checkpoint}" if checkpoint.exists() else "nothing was written"
        return InputError(f"training diverged: {what} at lr {self.recipe.lr:g}; {left}. Lower the recipe's lr.")

    def _gradients(self, clean: torch.Tensor, index: torch.Tensor, step: int) -> torch.Tensor:
        """The loss of a step, its gradients in the parameters and its learning rate in the optimizer."""
        recipe, (rank, ranks) = self.recipe, rank_of()
        g = generator(recipe.seed, 2, step)
        mine = slice(len(clean) * rank // ranks, len(clean) * (rank + 1) // ranks)
        batch = Batch(clean, index, None if self.labels is None else self.labels[index], mine)
        mean = self.objective.loss(batch, g, self.device)
        warmup = recipe.warmup if recipe.minutes is None else min(recipe.warmup, self.steps // 10)
        rate = min(1.0, (step + 1) / max(1, warmup)) * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * rate
        gpus = [self.device] if self.device.type == "cuda" else []  # whose global generator dropout draws from
        with torch.random.fork_rng(devices=gpus):  # dropout knows only the global generator
            drawn = int(torch.randint(2**62, (ranks,), generator=g)[rank])
            torch.default_generator.manual_seed(drawn)
            for gpu in gpus:
                with torch.cuda.device(gpu):
                    torch.cuda.manual_seed(drawn)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                loss = mean()
            loss = loss * (len(clean[mine]) / len(clean))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if ranks > 1:
            loss = _shared(loss, self.parameters)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        return loss

    @property
    def precision(self) -> str:
        """Of forward passes."""
        return str(self.job.decides["precision"])

    def save(self) -> None:
        """Write a checkpoint."""
        tensors = {f"model.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"ema.{i}": v for i, v in enumerate(self.average.shadow_params)}
        for i, slot in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in slot.items()}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        tensors["looks"] = torch.tensor(self.looks.rows, dtype=torch.float64)
        tensors["seconds"] = torch.tensor([self.seconds, self.steps], dtype=torch.float64)
        write_tensors(self.job.checkpoint, tensors, {"identity": json.dumps(self.job.decides, sort_keys=True)})

    def resume(self) -> None:
        """Put everything back as a checkpoint says, where there is one."""
        path = self.job.checkpoint
        if not path.exists():
            return
        tensors, metadata = read_tensors(path)
        with damaged(path, "a checkpoint"):
            by = differences(json.loads(metadata["identity"]), self.job.decides)
        if by:
            raise InputError(f"{path} belongs to a run with other settings: {by}. Choose another --out or delete it.")
        with damaged(path, "a checkpoint"):
            self.network.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
            for i, shadow in enumerate(self.average.shadow_params):
                shadow.copy_(tensors[f"ema.{i}"])
            state = self.optimizer.state_dict()
            state["state"] = {}
            for key, value in tensors.items():
                if key.startswith("optimizer."):
                    _, slot, name = key.split(".")
                    state["state"].setdefault(int(slot), {})[name] = value
            self.optimizer.load_state_dict(state)
            self.losses = tensors["losses"].tolist()
            self.looks.rows = tensors["looks"].tolist()
            self.average.optimization_step = len(self.losses)
            seconds, steps = tensors["seconds"].tolist()
            self._before, self.steps = float(seconds), int(steps)


def _same_kind(before: Pipeline, init: object, law: bool) -> None:
    """A network that predicts noise does not go on as the residual of a law, nor the other way round."""
    name = str(init) if isinstance(init, str | Path) else "the network to go on from"
    residual = residual_of(before.unet) is not None
    if residual and not law:
        raise InputError(
            f"{name} is the residual of a law, and would go on as a plain network. Pass law='auto' (--residual)."
        )
    if law and not residual:
        raise InputError(
            f"{name} is a plain network, and would go on as the residual of a law. Leave law= (--residual) out, or go "
            "on from a network that was trained with it."
        )


def _continue(network: torch.nn.Module, before: Pipeline) -> None:
    """Take over the weights of a finished network."""
    weights = backbone(before.unet).state_dict()
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        what = " ".join(str(error).split())[:160]
        raise InputError(
            f"the network to go on from is of another architecture than the recipe's ({what}). Leave the recipe out, "
            "or choose another network."
        ) from None


def _shared(loss: torch.Tensor, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """The loss of all processes' rows, and its gradient in place of each one's own: one sum for all of them."""
    trained = [p for p in parameters if p.grad is not None]
    parts = [loss.detach().reshape(1), *(p.grad.reshape(-1) for p in trained if p.grad is not None)]
    whole = torch.cat(parts)
    summed(whole)
    total, *gradients = whole.split([len(part) for part in parts])
    for p, gradient in zip(trained, gradients):
        p.grad = gradient.reshape(p.shape)
    return total[0]


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A neighbour folder whose parts go into ``out`` when everything is written; what is there is never replaced."""
    stage = out / ".stage"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        yield stage
        parts = [(part, out / part.name) for part in stage.iterdir()]
        for part, target in parts:
            if target.exists() and _content(part) != _content(target):
                raise InputError(f"{target} is not of this training, and is not replaced. Move it, or delete it.")
        for part, target in parts:
            if not target.exists():
                part.rename(target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _content(path: Path) -> dict[str, str]:
    """Digests of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return {str(p.relative_to(path)): file_hash(p) for p in files}


def _check_free(out: Path, checkpoint: Path) -> None:
    """A folder with parts of a pipeline and without a checkpoint of ours is somebody else's, and stays as it is."""
    names = ("model_index.json", "unet", "scheduler", "start.safetensors", "residual.json", ".stage")
    there = agreed(lambda: [] if checkpoint.exists() else [name for name in names if (out / name).exists()])
    if there:
        raise InputError(f"{out} holds {', '.join(there)} of another pipeline, which stay. Choose another --out.")
