"""Loading: a diffusers pipeline from a name, a folder or the hub, on a device and in a precision; its autoencoder."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import diffusers
import torch

from symbreak.data.images import Images
from symbreak.networks.adapters import adapted, family_of
from symbreak.networks.denoiser import Denoiser, class_count
from symbreak.networks.families import as_unet, denoiser, posing
from symbreak.networks.foreign import check_network, check_pipeline, from_hub, quiet, stored_numbers, variant_of
from symbreak.networks.guidance import check_classes
from symbreak.networks.latents import decode, encode
from symbreak.networks.own_call import network_in
from symbreak.networks.residual import backbone
from symbreak.networks.samplers import scheduler as named_scheduler
from symbreak.networks.types import Network, Pipeline, Scheduler
from symbreak.noise import schedule
from symbreak.runtime.files import InputError
from symbreak.runtime.identity import weights_hash
from symbreak.runtime.plain import Values
from symbreak.runtime.ranks import usable
from symbreak.start.classes import Classes
from symbreak.start.late_start import LateStart
from symbreak.start.pipeline import RESIDUAL, read_residual

__all__ = ["LatentPipeline", "classes_for", "latents_of", "load_autoencoder", "load_pipeline", "refuse_conditional"]

NETWORKS = ("unet", "transformer")
BUNDLED = ("digits", "digits-conditional")  # networks that ship with the package
PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_pipeline(
    source: str | Path,
    *,
    device: str | torch.device | None = None,
    precision: str = "fp32",
    compiled: bool = False,
    variant: str | None = None,
    scheduler: Scheduler | None = None,
) -> Pipeline:
    """A diffusers pipeline with ``.unet`` and ``.scheduler``; of a transformer ``.unet`` is its common face.

    Args:
        source: ``"digits"`` or ``"digits-conditional"`` (the bundled networks), a diffusers folder, the folder of a
            network alone, or a hub id. Only safetensors weights are read; nothing is unpickled and no remote code runs.
        device: where the network runs, such as ``"cuda"``; by default where it was loaded, the CPU.
        precision: ``"fp32"``, or ``"bf16"`` / ``"fp16"``: the network's calls under autocast. States, schedulers and
            laws keep their own precision.
        compiled: whether the network goes through ``torch.compile``.
        variant: of the weights, such as ``"fp16"``; by default plain ones, or the only variant that is there.
        scheduler: that a network alone was trained with; by default that of the folder ``scheduler`` beside it.

    Raises:
        InputError: where there is no such pipeline, device, precision or variant.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r}; expected {', '.join(PRECISIONS)}.")
    pipe = _loaded(source, variant, scheduler)
    if device is not None:
        pipe.to(usable(device))
    if PRECISIONS[precision] is not None:
        kind = next(iter(pipe.unet.parameters())).device.type
        pipe.unet.forward = torch.autocast(kind, PRECISIONS[precision])(pipe.unet.forward)
    if compiled:
        pipe.unet.compile()
    return pipe


def _loaded(source: str | Path, variant: str | None, scheduler: Scheduler | None) -> diffusers.DiffusionPipeline:
    if str(source) in BUNDLED:
        source = str(resources.files("symbreak") / "weights" / str(source))
    folder = Path(source).expanduser()
    if folder.exists():
        if (folder / "config.json").is_file() and not (folder / "model_index.json").is_file():
            return _alone(folder, variant, scheduler)
        if not (folder / "model_index.json").is_file():
            raise InputError(
                f"{source} is no diffusers pipeline: it has no model_index.json. Save one with save_pretrained."
            )
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)) or folder.parent.exists():
        raise InputError(f"{source} does not exist. Pass digits, a diffusers folder or a hub id owner/name.")
    else:
        folder = from_hub(str(source), lambda line: sys.stderr.write(line + "\n"))
    parts = check_pipeline(folder)
    if (folder / RESIDUAL).exists():
        return _residual(folder)
    if parts["_class_name"] == "LateStartPipeline":
        raise InputError(f"{source} holds a late start. Load it with sb.LateStartPipeline.from_pretrained.")
    if scheduler is not None:
        raise InputError(f"a scheduler came for {source}, which has its own. Leave it out.")
    part = next((name for name in NETWORKS if isinstance(parts.get(name), list)), None)
    if part is None or "scheduler" not in parts:
        raise InputError(
            f"{source} has no unet and scheduler, nor a transformer; symbreak samples pipelines with both."
        )
    variant, numbers = _weights(folder / part, variant)
    try:
        with quiet():  # two components need no bar between our own lines; what it says of the weights is an error below
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                str(folder), use_safetensors=True, local_files_only=True, variant=variant
            )
    except Exception as error:
        what = " ".join(str(error).split())[:160]
        raise InputError(
            f"{source} cannot be loaded as a diffusers pipeline ({type(error).__name__}: {what})."
        ) from None
    try:
        schedule(pipe.scheduler)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise InputError(f"the scheduler of {source} cannot be used: {error}") from None
    network = network_in(pipe)
    _check_weights(network, numbers, source)
    network.eval()
    if part != "unet":
        pipe.unet = _faced(network, pipe)
    return pipe


def _faced(network: Network, pipe: Pipeline) -> Network:
    """A transformer with the common face, where it or its pipeline says the shape of its samples; else as it is."""
    side, channels = getattr(pipe, "default_sample_size", None), getattr(network.config, "in_channels", 0)
    said = (channels // 4, side, side) if family_of(network) == "packed" and side else None
    with suppress(InputError):
        return adapted(network, None, said)
    return network


def _weights(folder: Path, variant: str | None) -> tuple[str | None, int]:
    """The variant of a network's weights, and how many numbers its files hold."""
    there = variant_of(folder) if variant is None else variant
    numbers = stored_numbers(folder, there)
    if variant is not None and not numbers:
        raise InputError(f"{folder} has no weights of the variant {variant!r}. Leave variant out, or pass one it has.")
    return there, numbers


def _alone(folder: Path, variant: str | None, scheduler: Scheduler | None) -> diffusers.DiffusionPipeline:
    """A network's own folder, with the scheduler beside it or a given one."""
    check_network(folder)
    if (folder.resolve().parent / RESIDUAL).exists():
        raise InputError(f"{folder} is the part of a network that its law needs. Pass the folder above, with its law.")
    beside = folder.resolve().parent / "scheduler" / "scheduler_config.json"
    if scheduler is None and not beside.is_file():
        raise InputError(
            f"{folder} holds a network alone, without its scheduler. Pass its pipeline, or load_pipeline(..., "
            "scheduler=sb.scheduler('ddpm'))."
        )
    try:
        with quiet():
            if scheduler is None:
                settings = check_network(beside, kind="SchedulerMixin")
                scheduler = getattr(diffusers, str(settings["_class_name"])).from_config(settings)
    except InputError:
        raise
    except Exception as error:
        what = " ".join(str(error).split())[:160]
        raise InputError(f"{beside} cannot be loaded as a scheduler ({type(error).__name__}: {what}).") from None
    network = _component(folder, variant)
    pipe = diffusers.DDPMPipeline(unet=network, scheduler=scheduler)
    pipe.unet = _faced(network, pipe)
    return pipe


def _component(folder: Path, variant: str | None = None) -> Network:
    """A network, or an autoencoder, of its own folder."""
    config, (variant, numbers) = check_network(folder), _weights(folder, variant)
    try:
        with quiet():
            kind = getattr(diffusers, str(config["_class_name"]))
            options = {"use_safetensors": True, "local_files_only": True, "variant": variant}
            network = kind.from_pretrained(str(folder), **options).eval()
    except Exception as error:
        what = " ".join(str(error).split())[:160]
        raise InputError(f"{folder} cannot be loaded as a network ({type(error).__name__}: {what}).") from None
    _check_weights(network, numbers, folder)
    return network


def load_autoencoder(source: str | Path, device: str | torch.device | None = None) -> Network:
    """The autoencoder of latent networks, for `encode` and `decode`.

    Args:
        source: its own folder, or that of a diffusers pipeline that has one.
        device: where it runs.

    Raises:
        InputError: for a folder without an autoencoder, or one whose files are broken.
    """
    folder = Path(source).expanduser()
    if (folder / "model_index.json").is_file():
        parts = check_pipeline(folder)
        folder = folder / next((k for k in ("vae", "vqvae") if isinstance(parts.get(k), list)), "vae")
    if not (folder / "config.json").is_file():
        raise InputError(f"{source} holds no autoencoder; expected its folder, or that of a pipeline that has one.")
    name = str(check_network(folder)["_class_name"])
    if not ("Autoencoder" in name or name == "VQModel"):
        raise InputError(f"{source} holds a {name}, which is no autoencoder.")
    vae = _component(folder)
    return vae if device is None else vae.to(usable(device))


def latents_of(autoencoder: Network, data: Images) -> Images:
    """The latents of pictures, under their name.

    Raises:
        InputError: for samples that are no pictures.
    """
    if data.units is not None:
        raise InputError(f"{data.name} holds no pictures, which an autoencoder takes. Leave --vae out.")
    return replace(encode(autoencoder, data).images(), name=data.name)


@dataclass(frozen=True)
class LatentPipeline:
    """A network on latents, with what leads from pictures to latents and back; a pipeline like any other.

    Attributes:
        unet, scheduler: the network, told its prompt, and the scheduler that it was trained with.
        autoencoder: of its latents; ``None`` for a text network of pictures.
        prompted: of a text network its denoiser with the prompt, and the one with none; else ``None``.
        prompt: what it was told.
    """

    unet: Network
    scheduler: Scheduler
    autoencoder: Network | None
    prompted: tuple[Denoiser, Denoiser] | None = None
    prompt: str | None = None

    @classmethod
    def of(cls, pipe: Pipeline, prompt: str | None = None, autoencoder: Network | None = None) -> LatentPipeline:
        """A pipeline with its own autoencoder, or another one.

        Raises:
            InputError: for a prompt for a network without text, or latents of other channels than the network's.
        """
        vae = next(
            (v for v in (autoencoder, *(getattr(pipe, k, None) for k in ("vae", "vqvae"))) if v is not None), None
        )
        unet, scheduler, both = pipe.unet, pipe.scheduler, None
        if prompt is not None:
            both = denoiser(pipe, prompt=prompt), denoiser(pipe, prompt=None)
            scheduler = getattr(both[0], "scheduler", scheduler)  # whose shift is that of the prompt's size
            unet = as_unet(both[0], scheduler)
        channels, there = unet.config.in_channels, getattr(getattr(vae, "config", None), "latent_channels", None)
        if there not in (None, channels):
            raise InputError(
                f"the autoencoder has latents of {there} channels, the network takes {channels}. Pass the one that the "
                "network was trained with."
            )
        return cls(unet, scheduler, vae, both, prompt)

    def of_network(self, network: Network | Denoiser) -> LatentPipeline:
        """The same of another network on these latents, such as one that is guided."""
        return replace(self, unet=posing(network, self.scheduler))

    def encode(self, data: Images | None) -> Images | None:
        """The latents of pictures, under their name; pictures where there is no autoencoder."""
        return data if data is None or self.autoencoder is None else latents_of(self.autoencoder, data)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures [N, C, H, W] in [-1, 1] of latents."""
        return latents if self.autoencoder is None else decode(self.autoencoder, latents)

    @property
    def about(self) -> Values:
        """What decides a picture beside the network, for records."""
        vae = {} if self.autoencoder is None else {"autoencoder": weights_hash(self.autoencoder)}
        return vae if self.prompt is None else {"prompt": self.prompt, **vae}


def _residual(folder: Path) -> diffusers.DiffusionPipeline:
    """A network that knows only what its law does not, with the scheduler of its training and its own ``start``."""
    start = LateStart.load(folder / "start.safetensors")
    unet = read_residual(folder, start)
    _check_weights(backbone(unet), stored_numbers(folder / "unet", None), folder)
    pipe = diffusers.DDPMPipeline(unet=unet, scheduler=named_scheduler("ddpm", like=start.full))
    pipe.start = start
    return pipe


def _check_weights(unet: Network, stored: int, source: str | Path) -> None:
    """A network with weights that no file holds, which diffusers makes up, or that are no numbers raises an error."""
    weights = unet.state_dict()
    needed = sum(v.numel() for v in weights.values())
    if stored < needed or any(v.is_meta for v in weights.values()):
        raise InputError(f"the network of {source} has {needed:,} weights, its files hold {stored:,}. Save it again.")
    bad = next((k for k, v in weights.items() if not bool(torch.isfinite(v).all())), None)
    if bad is not None:
        raise InputError(f"the weights {bad} of {source} hold NaN or infinity: a diverged or damaged network.")


def refuse_conditional(pipe: Pipeline, source: str, classes: bool = False, latents: bool = False) -> None:
    """Conditions that nobody has to give raise an error of one clear line instead of a crash inside.

    Args:
        pipe: the network's pipeline.
        source: its name.
        classes: whether there are classes to give.
        latents: whether an autoencoder is there to decode them.
    """
    config = pipe.unet.config
    if latents:
        pass
    elif getattr(pipe, "vae", None) is not None or getattr(pipe, "vqvae", None) is not None:
        raise InputError(
            f"the network of {source} works on latents, which are no images. Name its autoencoder (--vae {source}), "
            "or use start.latents(noise) with its own pipeline."
        )
    if config.get("num_class_embeds") and not (classes or config.get("class_embed_type")):
        raise InputError(
            f"the network of {source} has classes, which are not given here. Use sb.generate(..., labels=...), or a "
            "denoiser of one class or of none: sb.denoiser(unet, scheduler, class_labels=...)."
        )
    if config.get("class_embed_type") or config.get("cross_attention_dim"):
        raise InputError(
            f"the network of {source} needs a condition (text, or another than a class's number). Say it (--prompt), "
            "or use start.latents(noise) with its own pipeline."
        )


def classes_for(pipe: Pipeline, source: str, data: Images, classes: Classes | None = None) -> Classes | None:
    """Which class every seed has for a class-conditional network: what was named, or the data's; else ``None``.

    Raises:
        InputError: for data without labels, classes that the network does not have, or another condition.
    """
    refuse_conditional(pipe, source, classes=True)
    if class_count(pipe.unet) is None:
        if classes is not None:
            raise InputError(f"the network of {source} has no classes, but some were named. Leave them out.")
        return None
    chosen = Classes.of_data(data) if classes is None else classes
    check_classes(chosen.different(), pipe.unet)
    return chosen
