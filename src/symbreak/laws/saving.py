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
from typing import Any

import torch

from symbreak.laws.cluster_mixture import PrincipalMixture
from symbreak.laws.gaussian import Gaussian
from symbreak.laws.mixture import Mixture
from symbreak.moments.covariance import Parameters
from symbreak.moments.one_pass import Moments
from symbreak.runtime.files import InputError, read_tensors, write_tensors

__all__ = ["law_from_tensors", "law_hash", "law_tensors", "load_law", "save_law"]

FORMAT, VERSION = "symbreak.law", "1"
MOMENTS, OUTER, INNER = "moments.", "gaussian.", "inner."  # prefixes of the tensors of a part
MIXTURE = ("weights", "means", "vectors", "eigenvalues", "floor")

Tensors = dict[str, torch.Tensor]
Law = Gaussian | Mixture | PrincipalMixture


def save_law(law: Any, path: str | Path) -> Path:
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


def load_law(path: str | Path) -> Law:
    """Read what `save_law` wrote: the same float64 parameters, so `transport` gives the same bits.

    Raises:
        InputError: for a file that is missing, of another format or a newer version, or whose tensors do
            not make a law.
    """
    return law_from_tensors(*read_tensors(path), path)


def law_hash(law: Any) -> str:
    """SHA-256 of everything that a file of the law would hold, first 16 hex digits."""
    tensors, metadata = law_tensors(law)
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def law_tensors(law: Any) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata of a law, for a file that holds more than the law."""
    head = {"format": FORMAT, "version": VERSION}
    if isinstance(law, PrincipalMixture):
        (outer, outer_head), (inner, inner_head) = law_tensors(law.gaussian), law_tensors(law.inner)
        tensors = _prefixed(OUTER, outer) | _prefixed(INNER, inner)
        about: dict[str, Any] = {"gaussian": outer_head, "inner": inner_head, "prior": law.prior}
        return tensors, {**head, "kind": "principal", "principal": json.dumps(about, sort_keys=True)}
    if isinstance(law, Gaussian):
        own, metadata = law.moments.tensors()
        tensors = _prefixed(MOMENTS, own)
        # A full covariance is stored as such; what was diagonalised once is kept, a low rank is stored once.
        if not any(_same(t, law.eigenvectors) for t in tensors.values()):
            tensors |= {"eigenvalues": law.eigenvalues, "eigenvectors": law.eigenvectors}
        about = {"moments": metadata, "floor": law.floor}
        return tensors, {**head, "kind": "gaussian", "gaussian": json.dumps(about, sort_keys=True)}
    if isinstance(law, Mixture):
        tensors = {name: getattr(law, name) for name in MIXTURE}
        if law.classes is not None:
            tensors["classes"] = law.classes.long()
        if law._dropped is not None:
            tensors["dropped"] = law._dropped
        about = {"shape": list(law.shape), "count": int(law.count)}
        return tensors, {**head, "kind": "mixture", "mixture": json.dumps(about, sort_keys=True)}
    raise InputError(f"a law of the kind {type(law).__name__} cannot be saved; expected a Gaussian or a mixture.")


def law_from_tensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], path: Any) -> Law:
    """The law of `law_tensors`; ``path`` names the file in messages."""
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} holds no law (format {metadata.get('format')}). Expected a file of sb.save_law.")
    if metadata.get("version") != VERSION:
        raise InputError(
            f"{path} was written by a newer symbreak (law version {metadata.get('version')}, this one reads "
            f"{VERSION}). Update it."
        )
    kind = metadata.get("kind")
    makers: dict[str, Callable[[Tensors, dict[str, Any], Any], Law]] = {
        "gaussian": _gaussian,
        "mixture": _mixture,
        "principal": _principal,
    }
    if kind is None or kind not in makers:
        raise InputError(f"{path} holds a law of the unknown kind {kind!r}; expected {', '.join(makers)}.")
    # Copies of their own: tensors of a mapped file lie at any address, and products may round by it.
    own = {name: tensor.clone() for name, tensor in tensors.items()}
    try:
        return makers[kind](own, json.loads(metadata[kind]), path)
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


def _check(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]], path: Any) -> None:
    """Refuse tensors that are missing, of another shape, or hold NaN or infinity."""
    missing = sorted(set(shapes) - set(tensors))
    if missing:
        raise InputError(f"{path} holds no law: it has no {', '.join(missing)}. Save it again.")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise InputError(
                f"{path} holds {name} of shape {tuple(tensors[name].shape)}; expected {shape}. Save it again."
            )
        if not bool(torch.isfinite(tensors[name]).all()):
            raise InputError(f"{path} holds NaN or infinity in {name}; expected finite numbers. Save it again.")
    for name in ("eigenvalues", "floor"):
        if name in shapes and tensors[name].numel() and float(tensors[name].min()) < 0:
            raise InputError(f"{path} holds a negative variance in {name}; expected numbers >= 0. Save it again.")


def _principal(tensors: Tensors, about: dict[str, Any], path: Any) -> PrincipalMixture:
    outer = law_from_tensors(_under(OUTER, tensors), about["gaussian"], path)
    inner = law_from_tensors(_under(INNER, tensors), about["inner"], path)
    if not (isinstance(outer, Gaussian) and isinstance(inner, Mixture)):
        raise InputError(f"{path} holds a broken principal mixture. Save it again.")
    return PrincipalMixture(outer, inner, about["prior"])


def _gaussian(tensors: Tensors, about: dict[str, Any], path: Any) -> Gaussian:
    own = _under(MOMENTS, tensors)
    if not own:
        raise InputError(f"{path} holds no law: it has no moments. Save it again.")
    moments = Moments.from_tensors(path, own, about["moments"])
    if "eigenvectors" in tensors or "eigenvalues" in tensors:
        d = moments.dim
        rank = tensors["eigenvalues"].numel() if "eigenvalues" in tensors else d
        _check(tensors, {"eigenvalues": (rank,), "eigenvectors": (d, rank)}, path)
        # The diagonalisation that the law was made of, in place of a new one with other last bits.
        moments.__dict__["eigh"] = (tensors["eigenvalues"], tensors["eigenvectors"])
    law = Gaussian(moments)
    return law if law.rank == law.dim else Gaussian(moments, floor=float(about["floor"]))


def _mixture(tensors: Tensors, about: dict[str, Any], path: Any) -> Mixture:
    shape, count = tuple(int(n) for n in about["shape"]), int(about["count"])
    k, d = len(tensors["means"]) if "means" in tensors else 0, math.prod(shape)
    rank = tensors["vectors"].shape[-1] if "vectors" in tensors and tensors["vectors"].ndim == 3 else 0
    shapes: dict[str, tuple[int, ...]] = {
        "weights": (k,),
        "means": (k, d),
        "vectors": (k, d, rank),
        "eigenvalues": (k, rank),
        "floor": (k,),
    }
    _check(tensors, shapes, path)
    means, vectors, values, floor = (tensors[n].double() for n in ("means", "vectors", "eigenvalues", "floor"))
    weights = tensors["weights"].double()
    law = Mixture.__new__(Mixture)
    law._set(shape, means, vectors, values, floor, weights, count)
    # A second division by their sum would change the last bit of weights that were normalised once.
    law.weights = weights
    law._parameters = Parameters(means, weights.log())
    if "classes" in tensors:
        _check(tensors, {"classes": (k,)}, path)
        law.classes = tensors["classes"].long()
    if "dropped" in tensors:
        _check(tensors, {"dropped": (k, d - rank)}, path)
        law._dropped = tensors["dropped"].double()
    return law
