"""Loading: a diffusers pipeline from a name, a folder or the hub, on a device and in a precision."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path

import diffusers
import torch

from symbreak.networks.types import Network, Pipeline
from symbreak.noise import schedule
from symbreak.runtime.files import InputError

__all__ = ["load_pipeline", "refuse_conditional", "usable", "weights_hash"]

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_pipeline(
    source: str | Path, *, device: str | torch.device | None = None, precision: str = "fp32", compiled: bool = False
) -> Pipeline:
    """A diffusers pipeline with ``.unet`` and ``.scheduler``.

    Args:
        source: ``"digits"`` (the bundled network), a diffusers folder or a hub id. Only
            safetensors weights are read; nothing is unpickled and no remote code runs.
        device: where the network runs, such as ``"cuda"``; by default where it was loaded, the CPU.
        precision: ``"fp32"``, or ``"bf16"`` / ``"fp16"``: the network's calls under autocast. States, schedulers and
            laws keep their own precision.
        compiled: whether the network goes through ``torch.compile``.

    Raises:
        InputError: where there is no such pipeline, device or precision.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r}; expected {', '.join(PRECISIONS)}.")
    pipe = _loaded(source)
    if device is not None:
        pipe.to(usable(device))
    if PRECISIONS[precision] is not None:
        kind = next(iter(pipe.unet.parameters())).device.type
        pipe.unet.forward = torch.autocast(kind, PRECISIONS[precision])(pipe.unet.forward)
    if compiled:
        pipe.unet.compile()
    return pipe


def usable(device: str | torch.device) -> torch.device:
    """A device of this machine.

    Raises:
        InputError: for one that is not there.
    """
    try:
        there = torch.device(device)
        torch.zeros(1, device=there)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"no device {device} here ({str(error).splitlines()[0][:80]}). Pass cpu.") from None
    return there


def _loaded(source: str | Path) -> diffusers.DiffusionPipeline:
    if str(source) == "digits":
        source = str(resources.files("symbreak") / "weights" / "digits")
    path = Path(source).expanduser()
    if path.exists():
        index = path / "model_index.json"
        if not index.is_file():
            raise InputError(
                f"{source} is no diffusers pipeline: it has no model_index.json. Save one with save_pretrained."
            )
        try:
            parts = json.loads(index.read_text(encoding="utf-8"))
        except ValueError:
            raise InputError(f"{index} is not JSON. Save the pipeline again with save_pretrained.") from None
        if isinstance(parts, dict) and parts.get("_class_name") == "LateStartPipeline":
            raise InputError(f"{source} holds a late start. Load it with sb.LateStartPipeline.from_pretrained.")
        if not isinstance(parts, dict) or not {"unet", "scheduler"} <= set(parts):
            raise InputError(f"{source} has no unet and scheduler; symbreak samples pipelines that have both.")
    elif str(source).count("/") != 1 or path.parent.exists():
        raise InputError(f"{source} does not exist. Pass digits, a diffusers folder or a hub id owner/name.")
    bars = diffusers.utils.logging.is_progress_bar_enabled()
    diffusers.utils.logging.disable_progress_bar()  # two components need no bar between our own lines
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(str(source), use_safetensors=True)
    except Exception as error:
        what = " ".join(str(error).split())[:160]
        raise InputError(
            f"{source} cannot be loaded as a diffusers pipeline ({type(error).__name__}: {what})."
        ) from None
    finally:
        if bars:
            diffusers.utils.logging.enable_progress_bar()
    if not hasattr(pipe, "unet") or not hasattr(pipe, "scheduler"):
        raise InputError(f"{source} has no unet and scheduler; symbreak samples pipelines that have both.")
    try:
        schedule(pipe.scheduler)
    except (TypeError, ValueError) as error:
        raise InputError(f"the scheduler of {source} cannot be used: {error}") from None
    pipe.unet.eval()
    return pipe


def refuse_conditional(pipe: Pipeline, source: str) -> None:
    """The command line and studies have no conditions to give: one clear line instead of a crash inside."""
    config = pipe.unet.config
    if config.get("num_class_embeds") or config.get("class_embed_type") or config.get("cross_attention_dim"):
        raise InputError(
            f"the network of {source} needs a condition (class or text). Use sb.generate(..., labels=...) or "
            "start.latents(noise) with its own pipeline."
        )


def weights_hash(unet: Network | torch.nn.Module) -> str:
    """SHA-256 of all weights, first 16 hex digits."""
    digest = hashlib.sha256()
    for name, value in sorted(unet.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()[:16]
