"""The late start as a diffusers pipeline: the loop of `start.sample` behind the face that diffusers users know.

A folder of `LateStartPipeline.save_pretrained` holds a standard ``unet`` and ``scheduler`` (the cut one) and one
file more, ``start.safetensors``. The start, not the scheduler's folder, decides what is sampled: some cuts, such
as flow matching's, are no part of a scheduler's config. ``DiffusionPipeline.from_pretrained`` does not know the
class; ``LateStartPipeline.from_pretrained`` does.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image

from symbreak.data.images import Units
from symbreak.laws.class_posterior import Labels
from symbreak.laws.law import fresh
from symbreak.laws.saving import law_hash
from symbreak.networks.families import as_unet
from symbreak.networks.foreign import check_pipeline, quiet
from symbreak.networks.residual import LawResidual, Mlp, backbone, residual_of
from symbreak.networks.types import Scheduler
from symbreak.runtime.files import InputError, read_json, write_json
from symbreak.runtime.plain import Values
from symbreak.start.late_start import LateStart
from symbreak.start.sample import Generators, check_labels, check_shape, integrate, precision

__all__ = ["RESIDUAL", "LateStartPipeline", "card", "read_residual"]

START, RESIDUAL = "start.safetensors", "residual.json"
FORMAT, VERSION = "symbreak.residual", "1"
OUTPUTS = ("pil", "pt", "np", "latent")
# Conditions of other kinds than one class a sample: their own pipelines know how to make them.
FOREIGN = ("class_embed_type", "encoder_hid_dim", "addition_embed_type", "cross_attention_dim")


class LateStartPipeline(DiffusionPipeline):
    """A diffusers pipeline that samples from a `LateStart`.

    Args:
        unet: diffusers network of unconditional or class-conditional images.
        scheduler: ``start.scheduler``.
        start: from `late_start` or `standard_start`.

    Raises:
        InputError: where scheduler and start do not belong together, the law's shape is not the network's,
            or the network needs another condition than class labels.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ("latents",)

    # `start` has a default because diffusers takes every parameter without one for a component; it checks components
    # against their annotations, of which it knows classes only.
    def __init__(self, unet: Any, scheduler: Any, start: Any = None) -> None:
        super().__init__()
        if not isinstance(start, LateStart):
            raise InputError(
                f"a start of the kind {type(start).__name__}; expected one of sb.late_start or sb.standard_start "
                "(or use LateStartPipeline.from_pretrained on a saved folder)."
            )
        foreign = [name for name in FOREIGN if getattr(unet.config, name, None)]
        if foreign:
            raise InputError(
                f"the network needs another condition than class labels ({foreign[0]}). Pass start.latents(noise) to "
                "the pipeline it belongs to."
            )
        self.register_modules(unet=unet, scheduler=scheduler)
        self.start = start
        self._belong_together()

    def _belong_together(self) -> None:
        ours, theirs = self.start.scheduler, self.scheduler
        if type(ours) is not type(theirs) or _settings(ours) != _settings(theirs):
            raise InputError(
                f"the pipeline's scheduler ({type(theirs).__name__}) is not the start's ({type(ours).__name__}, cut to "
                f"{self.start.calls} calls). Pass start.scheduler; for another sampler make another start."
            )
        check_shape(self.unet, self.start, 1)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        class_labels: Labels | int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, torch.Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        micro_batch: int = 64,
    ) -> ImagePipelineOutput | tuple[torch.Tensor | np.ndarray | list[Image.Image]]:
        """Draw images; the number of steps is the start's.

        White noise is drawn in float32 whatever the network's dtype, so that a seed keeps its meaning; states
        are float64 for a float64 network and float32 otherwise.

        Args:
            batch_size: number of images.
            generator: a list of one generator an image: image i is generator i's, with the bits of
                ``sb.generate`` at the same ``micro_batch``, whatever the batch size. One generator: one
                stream for the batch, as in diffusers' own pipelines. ``None``: a new random seed; torch's
                global generator is left alone.
            class_labels: class of every image [batch_size], or one for all, for the start and the network.
            output_type: ``"pil"``; ``"np"`` [B, H, W, C] and ``"pt"`` [B, C, H, W] in [0, 1]; ``"latent"``, the
                states [B, *S] as the sampler leaves them. Of samples that are no pictures ``"np"`` and ``"pt"`` are
                [B, *S] in the units of the data (float64), where the start knows them.
            return_dict: an ``ImagePipelineOutput``, or a tuple of the images alone.
            callback_on_step_end: called after every step as ``callback(pipe, index, t, {"latents": states})``,
                with all states of the batch; ``latents`` in the dict it returns replace them.
            callback_on_step_end_tensor_inputs: ``["latents"]``, or empty.
            micro_batch: fixed size of every network call; the last one is padded.

        Returns:
            ``ImagePipelineOutput`` with ``.images``, or ``(images,)``.

        Raises:
            InputError: for a batch without images, a list of another number of generators, class labels that are
                missing, too many or not the network's, and an unknown output type.
        """
        self._belong_together()
        shape = check_shape(self.unet, self.start, micro_batch)
        if int(batch_size) != batch_size or batch_size < 1:
            raise InputError(f"a batch of {batch_size} images; expected a whole number of at least 1.")
        if output_type not in OUTPUTS:
            raise InputError(f"output_type {output_type!r}; expected one of {', '.join(OUTPUTS)}.")
        pictures = self.start.pictures and len(shape) == 3 and shape[0] in (1, 3, 4)
        if output_type == "pil" and not pictures:
            what = f"{shape[0]} channels" if len(shape) == 3 and self.start.pictures else " x ".join(map(str, shape))
            raise InputError(f"states of {what} are no pictures. Pass output_type='latent', 'pt' or 'np'.")
        inputs = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        unknown = [name for name in inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise InputError(f"callback_on_step_end_tensor_inputs holds {unknown[0]!r}; expected latents only.")
        labels = check_labels(self.unet, class_labels, batch_size)
        noise, generator = _noise(shape, batch_size, generator)
        with self.progress_bar(total=self.start.calls) as bar:

            def each(i: int, t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
                bar.update()
                if callback_on_step_end is None:
                    return state
                tensors = dict.fromkeys(inputs, state)
                return (callback_on_step_end(self, i, t, tensors) or {}).get("latents", state)

            state = integrate(
                self.unet,
                self.start,
                noise.to(self._execution_device, precision(self.unet)),
                generator,
                labels=labels,
                micro_batch=micro_batch,
                each=each,
            )
        images: Any = state
        if output_type != "latent":
            units = self.start.units or Units(())
            images = (state / 2 + 0.5).clamp(0, 1) if pictures else units.unscaled(state)
        if output_type in ("np", "pil"):
            images = (images.permute(0, 2, 3, 1) if pictures else images).cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write a diffusers folder: JSON and safetensors, and the start in ``start.safetensors``.

        Args:
            save_directory: folder to write.
            **kwargs: of ``DiffusionPipeline.save_pretrained``.

        Raises:
            InputError: for a network or a start that has no file form, or ``safe_serialization=False``.
        """
        if not kwargs.get("safe_serialization", True):
            raise InputError("safe_serialization=False would write pickles. Leave it out.")
        unet, residual = self.unet, residual_of(self.unet)
        network = backbone(unet)
        if not isinstance(network, diffusers.ModelMixin):
            # diffusers would leave it out and say so in a log line only.
            raise InputError(f"a network of the kind {type(network).__name__} cannot be saved by diffusers.")
        self._belong_together()
        if residual is not None and (self.start.law is None or law_hash(self.start.law) != law_hash(residual.law)):
            raise InputError("the network is the residual of another law than the start's. Start from residual.law.")
        # The start first: the index of the folder, which says that all is there, is written last.
        self.start.save(Path(save_directory) / START)
        if residual is not None:
            write_json(Path(save_directory) / RESIDUAL, {"format": FORMAT, "version": VERSION, **residual.settings()})
        try:
            self.register_modules(unet=network)
            super().save_pretrained(str(save_directory), **kwargs)
        finally:
            self.register_modules(unet=unet)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> "LateStartPipeline":
        """Read what `save_pretrained` wrote; the restored pipeline gives the same bits.

        Args:
            folder: a folder on disk (``huggingface_hub.snapshot_download`` fetches one from the hub).
            **kwargs: of ``DiffusionPipeline.from_pretrained``, e.g. ``torch_dtype``.

        Raises:
            InputError: for a folder that is missing, has no start, or was saved by a newer version.
        """
        if not (Path(folder) / "model_index.json").is_file():
            raise InputError(f"{folder} is no folder of LateStartPipeline.save_pretrained: it has no model_index.json.")
        name = check_pipeline(folder)["_class_name"]
        if name != cls.__name__:
            raise InputError(f"{folder} holds a {name}, no {cls.__name__}. Load it with sb.load_pipeline.")
        start = LateStart.load(Path(folder) / START)
        if (Path(folder) / RESIDUAL).exists():
            return cls(read_residual(folder, start, **kwargs), start.scheduler, start)
        options = {"use_safetensors": True, **kwargs, "local_files_only": True}
        try:
            with quiet():
                pipe = super().from_pretrained(str(folder), start=start, scheduler=start.scheduler, **options)
        except InputError:
            raise
        except Exception as error:
            what = " ".join(str(error).split())[:160]
            raise InputError(f"{folder} cannot be loaded ({type(error).__name__}: {what}).") from None
        pipe.unet.eval()
        return pipe


def read_residual(folder: str | Path, start: LateStart, **kwargs: Any) -> Any:
    """The network of a folder whose network is the residual of its start's law, with the face that samplers know.

    Args:
        folder: of `LateStartPipeline.save_pretrained`, looked at before (`check_pipeline`).
        start: the folder's.
        **kwargs: of the network's ``from_pretrained``, e.g. ``torch_dtype``.

    Raises:
        InputError: for settings or weights that are missing, damaged or of a newer version.
    """
    path = Path(folder) / RESIDUAL
    about = read_json(path)
    if not isinstance(about, dict) or about.get("format") != FORMAT or about.get("version") != VERSION:
        raise InputError(f"{path} holds no residual that this symbreak reads. Save the pipeline again, or update.")
    name = read_json(Path(folder) / "unet" / "config.json").get("_class_name")
    kind: Any = Mlp if name == Mlp.__name__ else getattr(diffusers, str(name), None)
    known = isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)
    if not known:
        raise InputError(f"{folder} has a network of the class {str(name)[:60]!r}, which diffusers does not have.")
    options = {**kwargs, "use_safetensors": True, "local_files_only": True}
    try:
        with quiet():
            network: Any = kind.from_pretrained(str(Path(folder) / "unet"), **options).eval()
        residual = LawResidual(
            start.law,
            network,
            error=torch.tensor(about["error"], dtype=torch.float64),
            top=float(about["top"]),
            fade=float(about.get("fade", 0.0)),
            second_input=bool(about["second_input"]),
        )
    except InputError:
        raise
    except Exception as error:
        what = " ".join(str(error).split())[:160]
        raise InputError(f"{folder} cannot be loaded ({type(error).__name__}: {what}).") from None
    return as_unet(residual, start.full).eval()


def card(data: str, start: LateStart, seconds: float) -> str:
    """The README of a folder that training wrote: what it is, and how it is used."""
    return f"""# A diffusion model that begins late

Trained with symbreak on {data} in {seconds / 60:.1f} minutes. The network learned only what a law of the data does not
know; above the start the law answers alone.

- {start.explain().splitlines()[0]}
- `start.safetensors` holds the law and the start, `residual.json` how network and law are combined, `unet` the network,
  `training.json` what it was trained with, its losses and held-out losses, `training.png` a picture of them.

    symbreak sample --model FOLDER --seeds 0-15 --out samples

    import symbreak as sb

    pipe = sb.LateStartPipeline.from_pretrained("FOLDER")
    images = pipe(batch_size=16).images

The network alone is no diffusion model: load it with symbreak. Nothing is known here of the data's licence.
"""


def _settings(scheduler: Scheduler) -> Values:
    """A scheduler's config without what diffusers notes down beside it."""
    return {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}


def _noise(shape: tuple[int, ...], count: int, generator: Any) -> tuple[torch.Tensor, Generators]:
    """White noise [count, *S], float32, and the generator or generators it came from."""
    if isinstance(generator, list | tuple):
        if len(generator) != count:
            raise InputError(f"{len(generator)} generators for {count} images; expected one each.")
        rows = [torch.randn(shape, generator=g, device=g.device) for g in generator]
        return torch.stack(rows), list(generator)
    generator = fresh(generator)
    return torch.randn((count, *shape), generator=generator, device=generator.device), generator
