"""Train a small diffusers UNet2DModel by epsilon prediction; we own no network.

    loss = E | eps_theta(alpha_t x_0 + sigma_t eps, t) - eps |^2,  t uniform over the DDPM steps

(Ho, Jain, Abbeel 2020, arXiv:2006.11239). Every step draws from generators keyed by (seed, step),
so an interrupted run continues from its checkpoint and ends with the bits of one that was not interrupted.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel

from symbreak.data.images import Images
from symbreak.noise import generator
from symbreak.runtime.errors import note
from symbreak.runtime.files import InputError, damaged, file_hash, read_json, read_tensors, write_json, write_tensors
from symbreak.runtime.identity import Identity, differences, identity_of, of_data
from symbreak.runtime.lock import locked
from symbreak.runtime.plain import Values
from symbreak.runtime.ranks import agreed, rank_of, summed, usable
from symbreak.runtime.rows import Shards
from symbreak.runtime.run import Run, renamed

__all__ = ["Recipe", "train_network"]

PARTS = (  # of a pipeline: without one of them it cannot be loaded
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
)
MACHINE = ("ranks", "threads", "device")  # of which a network that is finished is independent
LARGEST = 8192  # channels, layers: beyond what any machine trains


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run; as JSON under ``recipes/``.

    Attributes:
        channels: UNet channels a resolution, each a multiple of 8.
        layers: ResNet blocks a resolution.
        dropout: dropout inside the ResNet blocks.
        steps: optimizer steps.
        batch: images a step.
        lr: peak AdamW learning rate, after ``warmup`` steps, then a cosine down to 0.
        ema: decay of the weight average that is saved.
        seed: of initial weights, data order, noise and dropout.
    """

    channels: tuple[int, ...] = (24, 48)
    layers: int = 1
    dropout: float = 0.1
    steps: int = 8000
    batch: int = 128
    lr: float = 1e-3
    warmup: int = 200
    ema: float = 0.999
    weight_decay: float = 0.01
    seed: int = 0

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe; unknown or impossible settings are named."""
        raw = read_json(path)
        known = {f.name for f in fields(cls)}
        if not isinstance(raw, dict) or set(raw) - known:
            extra = sorted(set(raw) - known) if isinstance(raw, dict) else "no settings"
            raise InputError(f"{path} holds {extra}; a recipe has the settings {', '.join(sorted(known))}.")
        try:
            recipe = cls(**{**raw, "channels": tuple(raw.get("channels", cls.channels))})
            recipe.check()
        except (TypeError, OverflowError) as error:
            raise InputError(f"{path} is no recipe ({error}).") from None
        return recipe

    def check(self) -> None:
        """Settings that cannot be trained raise an error that names them."""
        whole = (*self.channels, self.layers, self.steps, self.batch, self.warmup, self.seed)
        if any(isinstance(n, bool) or not isinstance(n, int) for n in whole):
            raise InputError("recipe channels, layers, steps, batch, warmup and seed are whole numbers.")
        if not self.channels or any(c < 8 or c % 8 for c in self.channels):
            raise InputError(f"recipe channels {self.channels}; expected positive multiples of 8.")
        if min(self.layers, self.steps, self.batch) < 1 or not self.lr > 0 or not 0 <= self.ema < 1:
            raise InputError("a recipe needs layers, steps and batch >= 1, lr > 0 and 0 <= ema < 1.")
        if max(self.channels) > LARGEST or self.layers > LARGEST or len(self.channels) > LARGEST:
            raise InputError(f"a recipe has at most {LARGEST:,} channels and layers.")
        if min(self.warmup, self.seed, self.weight_decay) < 0 or self.seed >= 2**63:
            raise InputError("a recipe needs warmup, seed and weight_decay >= 0, and a seed below 2^63.")
        if not (math.isfinite(self.lr) and math.isfinite(self.weight_decay)):
            raise InputError("a recipe needs finite numbers for lr and weight_decay.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"recipe dropout {self.dropout}; expected 0 <= dropout < 1.")


def _network(recipe: Recipe, shape: tuple[int, ...]) -> UNet2DModel:
    c, h, w = shape
    halvings = len(recipe.channels) - 1
    if h != w or h % 2**halvings:
        raise InputError(
            f"images of {h} x {w} do not fit a network with {len(recipe.channels)} resolutions: expected squares whose "
            f"side {2**halvings} divides. Pad them (--pad) or change the recipe's channels."
        )
    plain = ["DownBlock2D"] * halvings
    return UNet2DModel(
        sample_size=h,
        in_channels=c,
        out_channels=c,
        block_out_channels=recipe.channels,
        layers_per_block=recipe.layers,
        down_block_types=(*plain, "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", *(["UpBlock2D"] * halvings)),
        norm_num_groups=8,
        attention_head_dim=8,
        dropout=recipe.dropout,
    )


@renamed(reading="run=sb.Run(progress=...)")
def train_network(
    data: Images,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    checkpoint_seconds: float = 60.0,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    compiled: bool = False,
    run: Run | None = None,
) -> Values:
    """Train a network on ``data`` and save a `diffusers.DDPMPipeline` folder.

    Called again with the same arguments after an interruption it continues from the checkpoint in
    ``out``; called after the end it returns the result at once. Several processes read and hold a part of the images
    each, share every batch and add their gradients; dropout draws from a generator a process, so that a run is the
    same bits on the same number of processes.

    Args:
        data: images in [-1, 1].
        out: folder for the pipeline, ``training.json`` and, while it runs, the checkpoint.
        recipe: settings; the default is the one of the bundled digits network.
        checkpoint_seconds: time between checkpoints.
        device: where the network is trained; batches and noise are drawn on the CPU, the same everywhere.
        precision: ``"fp32"``, or ``"bf16"``: forward passes under autocast; weights and averages stay float32.
        compiled: whether the network goes through ``torch.compile``.
        run: images beyond its memory go into a file without a name in ``out``; tells how many images are read
            ("images"), then how many steps are done ("steps").

    Returns:
        The content of ``training.json``: recipe, data, parameters, losses, seconds.

    Raises:
        InputError: where the images do not fit the recipe, ``out`` holds another run or files that training did not
            write, or a loss or a weight is no number any more; the last good checkpoint is then left.
    """
    run = run or Run()
    recipe = recipe or Recipe()
    recipe.check()
    if precision not in ("fp32", "bf16"):
        raise InputError(f"precision {precision!r} for training; expected fp32 or bf16, which needs no scaled loss.")
    out, ranks = Path(out), rank_of()[1]
    place = usable(device)
    with locked(out):
        of = of_data(data)
        about: Values = {"recipe": asdict(recipe), "data": data.name, "fingerprint": of["content"]}
        about["recipe"]["channels"] = list(recipe.channels)
        about |= {} if precision == "fp32" else {"precision": precision}  # runs of before it was a choice were fp32
        decides = identity_of(
            "training",
            recipe=asdict(recipe),
            data=of,
            precision=precision,
            compiled=compiled,
            device=place.type,
            ranks=ranks,
        )
        if agreed((out / "training.json").exists):
            return _finished(out, about, decides)
        return _trained(data, out, recipe, about, decides, checkpoint_seconds, place, run)


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
        raise InputError(f"{out} holds a network trained with other settings: {by}. Choose another --out.")
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


def _trained(
    data: Images,
    out: Path,
    recipe: Recipe,
    about: Values,
    decides: Identity,
    checkpoint_seconds: float,
    place: torch.device,
    run: Run,
) -> Values:
    """Train, from the checkpoint where there is one, and save the network."""
    rank, ranks = rank_of()
    checkpoint = out / "checkpoint.safetensors"
    _check_free(out, checkpoint)
    if recipe.batch < ranks:
        raise InputError(f"a batch of {recipe.batch} images for {ranks} processes; expected at least one image each.")
    images = data.shards(Run(out, run.memory, run.progress).named("images"))
    training = _Training(recipe, data.shape, place, decides["precision"])
    if decides["compiled"]:
        training.unet.compile()
    training.resume(checkpoint, decides)
    training.go_on(images, checkpoint, decides, checkpoint_seconds, run.named("steps"))
    training.save(checkpoint, decides)  # by which what is put beside it now is known as ours, if this is interrupted
    if rank == 0:
        with _staging(out) as stage:
            DDPMPipeline(unet=training.averaged(), scheduler=_noising()).save_pretrained(stage, safe_serialization=True)
    losses = training.losses
    stride = max(1, len(losses) // 100)
    result = {
        **about,
        "images": len(images),
        "parameters": sum(p.numel() for p in training.parameters),
        "loss": [sum(losses[i : i + stride]) / len(losses[i : i + stride]) for i in range(0, len(losses), stride)],
        "seconds": round(training.seconds, 1),
        "torch": torch.__version__,
        "identity": decides,
        "files": agreed(lambda: {name: file_hash(out / name) for name in PARTS}),
    }
    write_json(out / "training.json", result)
    if rank == 0:
        checkpoint.unlink(missing_ok=True)
    return result


def _noising() -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")


class _Training:
    """A network in training: its weights, optimizer and average, the losses of its steps and the seconds spent."""

    def __init__(self, recipe: Recipe, shape: tuple[int, ...], device: torch.device, precision: str) -> None:
        self.recipe, self.device, self.precision = recipe, device, precision
        # Weights are drawn under a forked, seeded global generator: torch's layers offer no other way.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(recipe.seed)
            self.unet = _network(recipe, shape)
        self.unet.to(device).train()
        self.parameters = list(self.unet.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
        self.average = EMAModel(self.parameters, decay=recipe.ema, use_ema_warmup=True, power=0.75)
        self.noising = _noising()
        self.losses: list[float] = []
        self._began, self._before = time.monotonic(), 0.0

    @property
    def seconds(self) -> float:
        """Seconds spent, with those before an interruption."""
        return self._before + time.monotonic() - self._began

    def averaged(self) -> UNet2DModel:
        """The network with its average weights, on the CPU."""
        self.average.copy_to(self.parameters)
        return self.unet.eval().to("cpu")

    def go_on(self, images: Shards, checkpoint: Path, identity: Identity, every: float, run: Run) -> None:
        """Steps up to the last one, with a checkpoint every so many seconds and where the run is interrupted."""
        recipe, saved = self.recipe, time.monotonic()
        per_epoch = max(1, len(images) // recipe.batch)
        whole = True  # weights, average and step count belong together
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        try:
            while (step := len(self.losses)) < recipe.steps:
                if step // per_epoch != epoch:
                    epoch = step // per_epoch
                    order = torch.randperm(len(images), generator=generator(recipe.seed, 1, epoch))
                first = step % per_epoch * recipe.batch
                loss = self._gradients(images.at(order[first : first + recipe.batch]), step)
                value = loss.item()
                if not math.isfinite(value):
                    raise self._diverged(f"the loss of step {step + 1} is {value}", checkpoint)
                whole = False
                self.optimizer.step()
                self.average.step(self.parameters)
                self.losses.append(value)
                whole = True
                if (step + 1) % 10 == 0 or step + 1 == recipe.steps:
                    run.tell(step + 1, recipe.steps)
                if time.monotonic() - saved > every and self.finite():
                    self.save(checkpoint, identity)
                    saved = time.monotonic()
        except (KeyboardInterrupt, SystemExit):  # Ctrl-C and SIGTERM
            if whole and self.finite():  # in the middle of an update only the last checkpoint is consistent
                self.save(checkpoint, identity)
            raise
        if not self.finite():
            raise self._diverged("the network has weights that are no numbers", checkpoint)

    def finite(self) -> bool:
        """Whether all weights and their averages are numbers."""
        weights = (*self.parameters, *self.average.shadow_params)
        return all(bool(torch.isfinite(p).all()) for p in weights)

    def _diverged(self, what: str, checkpoint: Path) -> InputError:
        left = f"the last good state is in {checkpoint}" if checkpoint.exists() else "nothing was written"
        return InputError(f"training diverged: {what} at lr {self.recipe.lr:g}; {left}. Lower the recipe's lr.")

    def _gradients(self, clean: torch.Tensor, step: int) -> torch.Tensor:
        """The loss of a step, its gradients in the parameters and its learning rate in the optimizer."""
        recipe, (rank, ranks) = self.recipe, rank_of()
        g = generator(recipe.seed, 2, step)
        t = torch.randint(0, 1000, (len(clean),), generator=g)
        noise = torch.randn(clean.shape, generator=g)
        noisy = self.noising.add_noise(clean, noise, t)
        rate = min(1.0, (step + 1) / max(1, recipe.warmup)) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * rate
        mine = slice(len(t) * rank // ranks, len(t) * (rank + 1) // ranks)
        gpus = [self.device] if self.device.type == "cuda" else []  # whose global generator dropout draws from
        with torch.random.fork_rng(devices=gpus):  # dropout knows only the global generator
            drawn = int(torch.randint(2**62, (ranks,), generator=g)[rank])
            torch.default_generator.manual_seed(drawn)
            for gpu in gpus:
                with torch.cuda.device(gpu):
                    torch.cuda.manual_seed(drawn)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                answer = self.unet(noisy[mine].to(self.device), t[mine].to(self.device)).sample
            loss = torch.nn.functional.mse_loss(answer.float(), noise[mine].to(self.device))
            loss = loss * (len(t[mine]) / len(t))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if ranks > 1:
            loss = _shared(loss, self.parameters)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        return loss

    def save(self, path: Path, identity: Identity) -> None:
        """Write a checkpoint."""
        tensors = {f"model.{k}": v for k, v in self.unet.state_dict().items()}
        tensors |= {f"ema.{i}": v for i, v in enumerate(self.average.shadow_params)}
        for i, slot in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in slot.items()}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        tensors["seconds"] = torch.tensor(self.seconds, dtype=torch.float64)
        write_tensors(path, tensors, {"identity": json.dumps(identity, sort_keys=True)})

    def resume(self, path: Path, identity: Identity) -> None:
        """Put everything back as a checkpoint says, where there is one."""
        if not path.exists():
            return
        tensors, metadata = read_tensors(path)
        with damaged(path, "a checkpoint"):
            by = differences(json.loads(metadata["identity"]), identity)
        if by:
            raise InputError(f"{path} belongs to a run with other settings: {by}. Choose another --out or delete it.")
        with damaged(path, "a checkpoint"):
            self.unet.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
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
            self.average.optimization_step = len(self.losses)
            self._before = float(tensors["seconds"])


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
    names = ("model_index.json", "unet", "scheduler", ".stage")
    there = agreed(lambda: [] if checkpoint.exists() else [name for name in names if (out / name).exists()])
    if there:
        raise InputError(f"{out} holds {', '.join(there)} of another pipeline, which stay. Choose another --out.")
