"""Train a small diffusers UNet2DModel by epsilon prediction; we own no network.

    loss = E | eps_theta(alpha_t x_0 + sigma_t eps, t) - eps |^2,  t uniform over the DDPM steps

(Ho, Jain, Abbeel 2020, arXiv:2006.11239). Every step draws from generators keyed by (seed, step),
so a run that was interrupted goes on from its checkpoint and ends with the bits of one that was not.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel

from symbreak.data.images import Images
from symbreak.networks.loading import usable
from symbreak.noise import generator
from symbreak.runtime.files import (
    InputError,
    damaged,
    output_folder,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from symbreak.runtime.ranks import agreed, rank_of, summed
from symbreak.runtime.rows import HELD
from symbreak.runtime.run import Run

__all__ = ["Recipe", "train_network"]

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
        """Refuse settings that cannot be trained."""
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


def _network(recipe: Recipe, shape: tuple[int, int, int]) -> UNet2DModel:
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


def train_network(
    data: Images,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    checkpoint_seconds: float = 60.0,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    compiled: bool = False,
    memory: int = HELD,
    reading: Callable[[int, int], None] | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Train a network on ``data`` and save a `diffusers.DDPMPipeline` folder.

    Called again with the same arguments after an interruption it goes on from the checkpoint in
    ``out``; called after the end it returns the result at once. Ranks read and hold a part of the images each, share
    every batch and add their gradients; dropout draws from a generator a rank, so that a run is the same bits on the
    same number of processes.

    Args:
        data: images in [-1, 1].
        out: folder for the pipeline, ``training.json`` and, while it runs, the checkpoint.
        recipe: settings; the default is the one of the bundled digits network.
        checkpoint_seconds: time between checkpoints.
        device: where the network is trained; batches and noise are drawn on the CPU, the same everywhere.
        precision: ``"fp32"``, or ``"bf16"``: forward passes under autocast; weights and averages stay float32.
        compiled: whether the network goes through ``torch.compile``.
        memory: bytes of the images that this process holds; more go into a file without a name in ``out``.
        reading: called with (about how many images are read, of how many) before the first step.
        progress: called with (step, steps, {"loss": running mean}).

    Returns:
        The content of ``training.json``: recipe, data, parameters, losses, seconds.

    Raises:
        InputError: where the images do not fit the recipe or ``out`` holds another run.
    """
    recipe = recipe or Recipe()
    recipe.check()
    if precision not in ("fp32", "bf16"):
        raise InputError(f"precision {precision!r} for training; expected fp32 or bf16, which needs no scaled loss.")
    out = output_folder(out)
    identity: dict[str, Any] = {"recipe": asdict(recipe), "data": data.name, "fingerprint": data.fingerprint()}
    identity["recipe"]["channels"] = list(recipe.channels)
    identity |= {} if precision == "fp32" else {"precision": precision}  # runs of before it was asked for were fp32
    done, checkpoint = out / "training.json", out / "checkpoint.safetensors"
    if agreed(done.exists):
        result = read_json(done)
        same = isinstance(result, dict) and {k: result.get(k) for k in identity} == identity
        if not same or result.get("precision", "fp32") != precision:
            raise InputError(f"{out} holds a network trained with other settings. Choose another --out.")
        if rank_of()[0] == 0:
            checkpoint.unlink(missing_ok=True)  # a run that was killed at its very end leaves it
        return result
    rank, ranks = rank_of()
    if recipe.batch < ranks:
        raise InputError(f"a batch of {recipe.batch} images for {ranks} processes; expected at least one image each.")
    there = usable(device)
    images = data.shards(Run(out, memory, lambda _, done, total: reading and reading(done, total)))
    # Weights are drawn under a forked, seeded global generator: torch's layers offer no other way.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        unet = _network(recipe, data.shape)
    unet.to(there)
    if compiled:
        unet.compile()
    rolled = [there] if there.type == "cuda" else []  # whose global generator dropout draws from
    parameters = list(unet.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    average = EMAModel(unet.parameters(), decay=recipe.ema, use_ema_warmup=True, power=0.75)
    noising = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    step, losses, seconds = _resume(checkpoint, identity, unet, optimizer, average)
    started = saved = time.monotonic()
    unet.train()

    def save() -> None:
        _checkpoint(checkpoint, identity, unet, optimizer, average, losses, seconds + time.monotonic() - started)

    per_epoch = max(1, len(images) // recipe.batch)
    whole = True  # weights, average and step count belong together
    epoch, order = -1, torch.empty(0, dtype=torch.long)
    try:
        while step < recipe.steps:
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = torch.randperm(len(images), generator=generator(recipe.seed, 1, epoch))
            at = step % per_epoch * recipe.batch
            clean = images.at(order[at : at + recipe.batch])
            g = generator(recipe.seed, 2, step)
            t = torch.randint(0, 1000, (len(clean),), generator=g)
            noise = torch.randn(clean.shape, generator=g)
            noisy = noising.add_noise(clean, noise, t)
            rate = min(1.0, (step + 1) / max(1, recipe.warmup)) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * rate
            mine = slice(len(t) * rank // ranks, len(t) * (rank + 1) // ranks)
            with torch.random.fork_rng(devices=rolled):  # dropout knows only the global generator
                drawn = int(torch.randint(2**62, (ranks,), generator=g)[rank])
                torch.default_generator.manual_seed(drawn)
                for one in rolled:
                    with torch.cuda.device(one):
                        torch.cuda.manual_seed(drawn)
                with torch.autocast(there.type, torch.bfloat16, enabled=precision == "bf16"):
                    answer = unet(noisy[mine].to(there), t[mine].to(there)).sample
                loss = torch.nn.functional.mse_loss(answer.float(), noise[mine].to(there))
                loss = loss * (len(t[mine]) / len(t))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if ranks > 1:
                loss = _shared(loss, parameters)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            whole = False
            optimizer.step()
            average.step(unet.parameters())
            losses.append(loss.item())
            step += 1
            whole = True
            if progress is not None and (step % 10 == 0 or step == recipe.steps):
                progress(step, recipe.steps, {"loss": sum(losses[-200:]) / len(losses[-200:])})
            if time.monotonic() - saved > checkpoint_seconds:
                save()
                saved = time.monotonic()
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C and SIGTERM
        if whole:  # in the middle of an update only the last checkpoint is consistent
            save()
        raise
    average.copy_to(unet.parameters())
    unet.eval().to("cpu")
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    if rank == 0:
        with _staging(out) as stage:
            DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(stage, safe_serialization=True)
    stride = max(1, len(losses) // 100)
    result = {
        **identity,
        "images": len(images),
        "parameters": sum(p.numel() for p in parameters),
        "loss": [sum(losses[i : i + stride]) / len(losses[i : i + stride]) for i in range(0, len(losses), stride)],
        "seconds": round(seconds + time.monotonic() - started, 1),
        "torch": torch.__version__,
    }
    write_json(done, result)
    if rank == 0:
        checkpoint.unlink(missing_ok=True)
    return result


def _shared(loss: torch.Tensor, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """The loss of all ranks' rows, and its gradient in place of each rank's own: one sum for all of them."""
    parts = [loss.detach().reshape(1), *(p.grad.reshape(-1) for p in parameters if p.grad is not None)]
    whole = torch.cat(parts)
    summed(whole)
    found = whole.split([len(part) for part in parts])
    for p, grad in zip((p for p in parameters if p.grad is not None), found[1:]):
        p.grad = grad.reshape(p.shape)
    return found[0][0]


class _staging:
    """A neighbour folder that replaces its parts in ``out`` only when everything is written."""

    def __init__(self, out: Path) -> None:
        self.out, self.stage = out, out / ".stage"

    def __enter__(self) -> Path:
        shutil.rmtree(self.stage, ignore_errors=True)
        self.stage.mkdir(parents=True)
        return self.stage

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            for part in self.stage.iterdir():
                target = self.out / part.name
                if target.is_dir():
                    shutil.rmtree(target)
                part.rename(target)
        shutil.rmtree(self.stage, ignore_errors=True)


def _checkpoint(
    path: Path,
    identity: dict[str, Any],
    unet: UNet2DModel,
    optimizer: torch.optim.Optimizer,
    average: EMAModel,
    losses: list[float],
    seconds: float,
) -> None:
    tensors = {f"model.{k}": v for k, v in unet.state_dict().items()}
    tensors |= {f"ema.{i}": v for i, v in enumerate(average.shadow_params)}
    for i, slot in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in slot.items()}
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    tensors["seconds"] = torch.tensor(seconds, dtype=torch.float64)
    write_tensors(path, tensors, {"identity": _canonical(identity)})


def _canonical(identity: dict[str, Any]) -> str:
    import json

    return json.dumps(identity, sort_keys=True)


def _resume(
    path: Path, identity: dict[str, Any], unet: UNet2DModel, optimizer: torch.optim.Optimizer, average: EMAModel
) -> tuple[int, list[float], float]:
    """Put everything back as it was; (steps done, losses, seconds spent)."""
    if not path.exists():
        return 0, [], 0.0
    tensors, metadata = read_tensors(path)
    if metadata.get("identity") != _canonical(identity):
        raise InputError(f"{path} belongs to a run with other settings. Choose another --out or delete it.")
    with damaged(path, "a checkpoint"):
        unet.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        for i, shadow in enumerate(average.shadow_params):
            shadow.copy_(tensors[f"ema.{i}"])
        state = optimizer.state_dict()
        state["state"] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, slot, name = key.split(".")
                state["state"].setdefault(int(slot), {})[name] = value
        optimizer.load_state_dict(state)
        losses = tensors["losses"].tolist()
        average.optimization_step = len(losses)
        return len(losses), losses, float(tensors["seconds"])
