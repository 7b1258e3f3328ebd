"""Laws in files: safetensors, float64, the same bits after a round trip.

A file holds one law: its tensors, and as metadata the format, the version and the kind. A Gaussian keeps
its moments and, since no two machines diagonalise to the same bits, its eigenvectors beside them; a mixture
keeps its parameters; a mixture in principal components keeps both. A law that is the data set itself is
not written.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from symbreak.laws.cluster_mixture import PrincipalMixture
from symbreak.laws.gaussian import Gaussian
from symbreak.laws.law import Law, Transports
from symbreak.laws.mixture import Mixture
from symbreak.moments.covariance import Covariance
from symbreak.moments.one_pass import Moments
from symbreak.runtime.files import InputError, read_tensors, write_tensors
from symbreak.runtime.plain import Values

__all__ = ["law_from_tensors", "law_hash", "law_tensors", "load_law", "save_law"]

FORMAT, VERSION = "symbreak.law", "1"
MOMENTS, OUTER, INNER = "moments.", "gaussian.", "inner."  # prefixes of the tensors of a part
# Tensors of a mixture and their shapes: K components, d elements, r vectors, m directions without one.
MIXTURE = {"weights": "K", "means": "Kd", "vectors": "Kdr", "eigenvalues": "Kr", "floor": "K"}
OPTIONAL = {"classes": "K", "dropped": "Km"}

Tensors = dict[str, torch.Tensor]


def save_law(law: Law, path: str | Path) -> Path:
    """Write a `Gaussian`, a `Mixture` or a `PrincipalMixture` as one safetensors file.

    Args:
        law: the law.
        path: where to write; the file appears whole or not at all.

    Returns:
        The path.

    Raises:
        InputError: for a law of another kind.
    """
    return write_tensors(path, *law_tensors(law))


def load_law(path: str | Path) -> Gaussian | Mixture | PrincipalMixture:
    """Read what `save_law` wrote: the same float64 parameters, so `transport` gives the same bits.

    Raises:
        InputError: for a file that is missing, of another format or a newer version, or whose tensors do
            not make a law.
    """
    return law_from_tensors(*read_tensors(path), path)


def law_hash(law: Transports) -> str:
    """SHA-256 of everything that a file of the law would hold, first 16 hex digits."""
    tensors, metadata = law_tensors(law)
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def law_tensors(law: Transports) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata of a law, for a file that holds more than the law."""
    for name, kind in KINDS.items():
        if isinstance(law, kind.law):
            tensors, about = kind.write(law)
            head = {"format": FORMAT, "version": VERSION, "kind": name}
            return tensors, {**head, name: json.dumps(about, sort_keys=True)}
    raise InputError(f"a law of the kind {type(law).__name__} cannot be saved; expected a Gaussian or a mixture.")


def law_from_tensors(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], path: str | Path
) -> Gaussian | Mixture | PrincipalMixture:
    """The law of `law_tensors`; ``path`` names the file in messages."""
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} holds no law (format {metadata.get('format')}). Expected a file of sb.save_law.")
    if metadata.get("version") != VERSION:
        raise InputError(
            f"{path} was written by a newer symbreak (law version {metadata.get('version')}, this one reads "
            f"{VERSION}). Update it."
        )
    kind = metadata.get("kind")
    if kind is None or kind not in KINDS:
        raise InputError(f"{path} holds a law of the unknown kind {kind!r}; expected {', '.join(KINDS)}.")
    # Copies: tensors of a mapped file lie at any address, and products may round by it.
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    try:
        return KINDS[kind].read(copies, json.loads(metadata[kind]), path)
    except InputError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise InputError(f"{path} holds a broken {kind} ({str(error)[:80]}). Save it again.") from None


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b))


def _prefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _check(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]], path: str | Path) -> None:
    """Raise an error for tensors that are missing, of another shape, or hold NaN or infinity."""
    missing = sorted(set(shapes) - set(tensors))
    if missing:
        raise InputError(f"{path} holds no law: it has no {', '.join(missing)}. Save it again.")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise InputError(f"{path} holds {name} of shape {tuple(tensor.shape)}; expected {shape}. Save it again.")
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{path} holds NaN or infinity in {name}; expected finite numbers. Save it again.")
        if name in ("eigenvalues", "floor") and tensor.numel() and float(tensor.min()) < 0:
            raise InputError(f"{path} holds a negative variance in {name}; expected numbers >= 0. Save it again.")


def _write_principal(law: PrincipalMixture) -> tuple[Tensors, Values]:
    (outer, outer_head), (inner, inner_head) = law_tensors(law.gaussian), law_tensors(law.inner)
    about = {"gaussian": outer_head, "inner": inner_head, "prior": law.prior}
    return _prefixed(OUTER, outer) | _prefixed(INNER, inner), about


def _read_principal(tensors: Tensors, about: Values, path: str | Path) -> PrincipalMixture:
    outer = law_from_tensors(_under(OUTER, tensors), about["gaussian"], path)
    inner = law_from_tensors(_under(INNER, tensors), about["inner"], path)
    if not (isinstance(outer, Gaussian) and isinstance(inner, Mixture)):
        raise InputError(f"{path} holds a broken principal mixture. Save it again.")
    return PrincipalMixture(outer, inner, about["prior"])


def _write_gaussian(law: Gaussian) -> tuple[Tensors, Values]:
    moments, metadata = law.moments.tensors()
    tensors = _prefixed(MOMENTS, moments)
    # A full covariance is stored as such; what was diagonalised once is kept, a low rank is stored once.
    if not any(_same(t, law.eigenvectors) for t in tensors.values()):
        tensors |= {"eigenvalues": law.eigenvalues, "eigenvectors": law.eigenvectors}
    return tensors, {"moments": metadata, "floor": law.floor}


def _read_gaussian(tensors: Tensors, about: Values, path: str | Path) -> Gaussian:
    stored = _under(MOMENTS, tensors)
    if not stored:
        raise InputError(f"{path} holds no law: it has no moments. Save it again.")
    moments = Moments.from_tensors(path, stored, about["moments"])
    if "eigenvectors" in tensors or "eigenvalues" in tensors:
        d = moments.dim
        rank = tensors["eigenvalues"].numel() if "eigenvalues" in tensors else d
        _check(tensors, {"eigenvalues": (rank,), "eigenvectors": (d, rank)}, path)
        # The diagonalisation that the law was made of, in place of a new one with other last bits.
        moments.__dict__["eigh"] = (tensors["eigenvalues"], tensors["eigenvectors"])
    law = Gaussian(moments)
    return law if law.rank == law.dim else Gaussian(moments, floor=float(about["floor"]))


def _write_mixture(law: Mixture) -> tuple[Tensors, Values]:
    tensors = {name: getattr(law, name) for name in MIXTURE}
    optional = {"classes": None if law.classes is None else law.classes.long(), "dropped": law._dropped}
    tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    return tensors, {"shape": list(law.shape), "count": int(law.count)}


def _read_mixture(tensors: Tensors, about: Values, path: str | Path) -> Mixture:
    shape, count = tuple(int(n) for n in about["shape"]), int(about["count"])
    d, vectors = math.prod(shape), tensors.get("vectors")
    rank = vectors.shape[-1] if vectors is not None and vectors.ndim == 3 else 0
    sizes = {"K": len(tensors["means"]) if "means" in tensors else 0, "d": d, "r": rank, "m": d - rank}
    names = MIXTURE | {name: letters for name, letters in OPTIONAL.items() if name in tensors}
    _check(tensors, {name: tuple(sizes[c] for c in letters) for name, letters in names.items()}, path)
    weights, means, *parts = (tensors[name].double() for name in MIXTURE)
    law = Mixture.__new__(Mixture)
    law._set(shape, means, Covariance(*parts), weights, count)
    # A second division by their sum would change the last bit of weights that were normalised once.
    law._weigh(weights)
    law.classes = tensors["classes"].long() if "classes" in tensors else None
    law._dropped = tensors["dropped"].double() if "dropped" in tensors else None
    return law


class Kind(NamedTuple):
    """A class of laws, what writes it and what reads it."""

    law: type
    write: Callable[..., tuple[Tensors, Values]]
    read: Callable[[Tensors, Values, str | Path], Gaussian | Mixture | PrincipalMixture]


KINDS = {
    "gaussian": Kind(Gaussian, _write_gaussian, _read_gaussian),
    "mixture": Kind(Mixture, _write_mixture, _read_mixture),
    "principal": Kind(PrincipalMixture, _write_principal, _read_principal),
}
