"""What decides a result, in one place: a flat dictionary of named digests and plain values, stored beside it as JSON.

A cached or unfinished result is used again where every name has the same value; else the names that differ are said.
Content counts, not its spelling: equal data, weights or settings under another path are equal.
"""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import CodeType, FunctionType
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from symbreak.runtime.errors import note
from symbreak.runtime.files import digest
from symbreak.runtime.plain import plain, versions

__all__ = ["Identity", "answers", "differences", "fixed_images", "identity_of", "module_of", "of_callable", "of_data"]
__all__ += ["of_device", "of_scheduler", "unrepeatable", "weights_hash"]

Identity = dict[str, Any]  # plain values by dotted name
Answer = Callable[[torch.Tensor], object]
LEVELS = (0.0, 0.3, 1.0, 3.0)  # of the noise on fixed images
NAMED = 8  # differences in a message


class Data(Protocol):
    """A data set, as `symbreak.data.images.Images` is one."""

    @property
    def labels(self) -> torch.Tensor | None:
        """Classes [N]."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""

    @property
    def scale(self) -> float:
        """x = (raw + offset) / scale."""

    @property
    def offset(self) -> float:
        """x = (raw + offset) / scale."""

    def fingerprint(self) -> str:
        """Digest of content and selection."""


def identity_of(kind: str, **parts: object) -> Identity:
    """A flat identity of what is named, with this machine's part: package versions and threads.

    Args:
        kind: of result; only identities of one kind are compared.
        **parts: plain values, tensors and arrays (their digests count), and dictionaries of such by name.

    >>> {k: v for k, v in identity_of("x", a={"b": (1, 2)}, c=None).items() if k in ("kind", "a.b", "c")}
    {'kind': 'x', 'a.b': [1, 2], 'c': None}
    """
    packages = versions(torch.get_num_threads())
    threads = int(packages.pop("threads"))
    return {"kind": kind, **dict(_flat("", parts)), "threads": threads, **dict(_flat("versions.", packages))}


def _flat(prefix: str, parts: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for name, value in parts.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}.", value)
        elif isinstance(value, torch.Tensor | np.ndarray):
            yield f"{prefix}{name}", digest(torch.as_tensor(value))
        else:
            yield f"{prefix}{name}", _simple(plain(value))


def _simple(value: object) -> object:
    """A value that JSON gives back as it was."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, list):
        return [_simple(v) for v in value]
    if isinstance(value, dict):
        return {k: _simple(v) for k, v in value.items()}
    return value if value is None or isinstance(value, str | int | float) else str(value)


def differences(before: object, now: Identity, without: Sequence[str] = ()) -> str:
    """The names whose values differ between a stored identity and this one, "" where none does.

    >>> differences({"weights": "a", "scheduler.clip_sample": True}, {"weights": "b", "scheduler.clip_sample": False})
    'scheduler.clip_sample, weights'
    """
    old: Mapping[str, object] = before if isinstance(before, dict) else {}
    if old and {"kind", "versions.symbreak"} <= set(now) and "versions.symbreak" not in old:
        return "an older symbreak wrote it, and not all that decides it"
    names = sorted(k for k in old.keys() | now.keys() if old.get(k) != now.get(k) and k not in without)
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


class Weighted(Protocol):
    """What has weights, as a torch module."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its weights."""

    def __getattr__(self, name: str, /) -> Any:
        """What else a module has."""


def weights_hash(unet: Weighted | nn.Module) -> str:
    """SHA-256 of all weights, first 16 hex digits."""
    sha = hashlib.sha256()
    for name, value in sorted(unet.state_dict().items()):
        sha.update(name.encode() + value.detach().cpu().contiguous().float().numpy().tobytes())
    return sha.hexdigest()[:16]


def of_data(data: Data | None) -> Identity:
    """Content, selection and range of a data set, its labels and the names of its classes; not what it is called."""
    if data is None:
        return {}
    labels = None if data.labels is None else digest(data.labels, data.classes)
    return {"content": data.fingerprint(), "scale": data.scale, "offset": data.offset, "labels": labels}


def of_scheduler(scheduler: Any) -> Identity:
    """Class, every setting that it knows, and the realised noise levels of a scheduler.

    Of a config that came from another class what this one does not take counts for nothing.
    """
    takes = inspect.signature(type(scheduler).__init__).parameters
    settings = {k: v for k, v in sorted(dict(scheduler.config).items()) if k in takes}
    levels = next((v for k in ("alphas_cumprod", "sigmas") if (v := getattr(scheduler, k, None)) is not None), None)
    return {
        "class": type(scheduler).__name__,
        **settings,
        "levels": None if levels is None else torch.as_tensor(levels),
    }


def of_device(module: nn.Module) -> str:
    """The kind of device that a network runs on, by its name."""
    weight = next(module.parameters(), None)
    if weight is None or weight.device.type != "cuda":
        return "cpu" if weight is None else weight.device.type
    return f"cuda {torch.cuda.get_device_name(weight.device)}"


def fixed_images(shape: Sequence[int], count: int = 3) -> torch.Tensor:
    """The same images [count, C, H, W] in [-1, 1] for everybody: smooth ones, and pixels on their own; or samples."""
    g = torch.Generator().manual_seed(97)
    if len(shape) != 3:
        return torch.randn(count, *shape, generator=g)
    c, h, w = shape
    smooth = nn.functional.interpolate(torch.randn(count, c, 4, 4, generator=g), (h, w), mode="bilinear")
    return (smooth + 0.3 * torch.randn(count, c, h, w, generator=g)).clamp(-1, 1)


def answers(function: Answer, images: torch.Tensor, device: torch.device | None = None) -> str | None:
    """Digest of the raw answers to images, clean and noised; ``None`` where two calls do not answer the same.

    Args:
        function: images [B, C, H, W] -> tensors, or dictionaries and sequences of such.
        images: [B, C, H, W]; noise is added at `LEVELS`.
        device: where the function wants its images.
    """
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(98))
    with torch.inference_mode():
        once, again = (
            digest(*(v for s in LEVELS for v in _tensors(function((images + s * noise).to(device or "cpu")))))
            for _ in range(2)
        )
    return once if once == again else None


def _tensors(answer: object) -> Iterator[object]:
    if isinstance(answer, Mapping):
        for name in sorted(answer):
            yield name
            yield from _tensors(answer[name])
    elif isinstance(answer, list | tuple):
        for one in answer:
            yield from _tensors(one)
    else:
        yield torch.as_tensor(answer) if isinstance(answer, np.ndarray) else answer


def of_callable(function: Any, images: torch.Tensor, device: torch.device | None = None) -> Identity | None:
    """What tells a function of images from another: its code, its weights where it has some, and its answers.

    Answers alone would not tell functions apart that differ on other images. ``None``: nothing that it made may be
    used again, for it does not answer the same twice.
    """
    said = answers(function, images, device)
    if said is None:
        return None
    network, inner = module_of(function), getattr(function, "function", function)
    weights = None if network is None else weights_hash(network)
    return {"answers": said, "code": digest(*_codes(inner)), "weights": weights}


def module_of(function: object) -> nn.Module | None:
    """What has weights in a function of images: itself, the object whose method it is, or the ``network`` of either."""
    function = getattr(function, "function", function)
    owner = getattr(function, "__self__", function)
    network = owner if isinstance(owner, nn.Module) else getattr(owner, "network", None)
    return network if isinstance(network, nn.Module) else None


def unrepeatable(name: str) -> Identity:
    """In the place of a callable's identity where it has none: nothing is used again, and a note says so."""
    note(f"{name} does not answer the same images twice in the same way: nothing of this run is used again.")
    return {"answers": f"none {time.time_ns()}"}


def _codes(function: Any) -> Iterator[object]:
    """Bytecode of a function, or of what a module or an object does where it is called; not where it was written."""
    if isinstance(function, partial):
        yield from _codes(function.func)
    elif isinstance(function, nn.Module):
        for kind in {type(m): None for m in function.modules()}:
            if not kind.__module__.startswith("torch."):
                yield from _codes(kind.forward)
    elif hasattr(function, "__code__"):
        yield from _code(function.__code__)
    elif isinstance(call := getattr(type(function), "__call__", None), FunctionType):  # noqa: B004
        yield from _code(call.__code__)


def _code(code: CodeType) -> Iterator[object]:
    yield from (code.co_code, code.co_names)
    for value in code.co_consts:
        if isinstance(value, CodeType):
            yield from _code(value)
        else:  # a set of names has another order in every process
            yield sorted(map(repr, value)) if isinstance(value, frozenset) else value
