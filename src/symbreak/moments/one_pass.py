"""Mean and covariance of anything: one pass, float64, mergeable.

    mean = 1/n sum x        cov = 1/(n - 1) sum (x - mean)(x - mean)^T

Rows are summed around a pilot mean (the first block's), so a mean far larger than the spread
costs no digits. 8-bit data take an exact way in float32: pixels minus 128 are integers, and products
of blocks of up to 1,024 rows stay below 2^24, where float32 is exact.

The rows go at random, but by a fixed rule, into a few disjoint parts. Their sum is the answer
and leaving one out at a time gives its interval (jackknife). The same type serves the spectrum, the
Gaussian start and the Fréchet distance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import scipy.linalg
import torch
from numpy.typing import ArrayLike
from scipy.linalg import blas
from scipy.sparse.linalg import eigsh

from symbreak.intervals import jackknife
from symbreak.moments.covariance import eigendecomposed, symmetric
from symbreak.moments.low_rank import (
    FORMAT,
    LARGEST_DIM,
    Batches,
    LowRankMoments,
    Population,
    Spectrum,
    at_most,
    known_file,
    known_sampled,
    population,
    sketch_moments,
    whole_rank,
)
from symbreak.runtime.files import InputError, damaged, read_tensors, write_tensors
from symbreak.runtime.ranks import from_each, from_first, own_rows, summed
from symbreak.runtime.run import Run, renamed
from symbreak.runtime.shown import Shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LowRankMoments", "Moments", "Spectrum", "grouped", "mode_images"]

EXACT_ROWS = 1024  # 1,024 products of two numbers up to 128 stay below 2^24
BUFFER_BYTES = 2**28
PANEL = 512
SPARE = 5  # matrices beside the parts: their sum, the covariance, eigenvectors and what finds them
PARTS_BYTES = 2**32  # the jackknife parts together stay below this
SAVED_PARTS_BYTES = 64 * 2**20


@dataclass(frozen=True)
class _Part:
    """Count, mean [d] and scatter sum (x - mean)(x - mean)^T [d, d] of some rows."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    def merge(self, other: _Part) -> _Part:
        """Chan, Golub & LeVeque 1983: exact whatever the order, up to rounding."""
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        n = self.count + other.count
        gap = other.mean - self.mean
        mean = self.mean + gap * (other.count / n)
        scatter = self.scatter + other.scatter
        scatter += np.outer(gap, gap * (self.count * other.count / n))
        return _Part(n, mean, scatter)


def _together(parts: list[_Part]) -> _Part:
    """All parts merged at once: one pass over each scatter instead of several."""
    if len(parts) == 1:
        return parts[0]
    n = sum(p.count for p in parts)
    mean = sum((p.mean * (p.count / n) for p in parts), np.zeros_like(parts[0].mean))
    gaps = np.stack([(p.mean - mean) * math.sqrt(p.count) for p in parts])
    scatter = torch.from_numpy(gaps.T @ gaps)
    for p in parts:
        scatter += torch.from_numpy(p.scatter)  # torch adds with all threads
    return _Part(n, mean, scatter.numpy())


class Moments(Shown):
    """Mean and covariance of a data set or a sample.

    Args:
        count: number of rows n.
        mean: array or tensor of the data's shape [*S].
        cov: covariance [d, d], d the number of elements of S, divided by n - 1.
        sampled: whether they were measured on n samples, as those of `fit` are, not given as a law's own.

    Raises:
        InputError: for wrong shapes, NaN, or a covariance that is not symmetric.

    >>> m = Moments.fit([torch.tensor([[0.0, 1.0], [2.0, 1.0]])])
    >>> m.count, m.mean.tolist(), m.cov.tolist()
    (2, [1.0, 1.0], [[2.0, 0.0], [0.0, 0.0]])
    """

    def __init__(self, count: int, mean: ArrayLike, cov: ArrayLike, sampled: bool = False) -> None:
        mu = np.asarray(torch.as_tensor(mean).detach().cpu(), dtype=np.float64)
        c = np.asarray(torch.as_tensor(cov).detach().cpu(), dtype=np.float64)
        if c.shape != (mu.size, mu.size):
            raise InputError(
                f"a covariance of shape {c.shape} for a mean of {mu.shape}; expected ({mu.size}, {mu.size})."
            )
        if count < 2:
            raise InputError(f"moments of {count} sample{'s' * (count != 1)}; at least 2 are needed.")
        if not np.isfinite(mu).all():
            raise InputError("the mean holds NaN or infinity; expected finite numbers.")
        c = symmetric(c, "the covariance")
        self.shape: tuple[int, ...] = mu.shape
        self.sampled = sampled
        self._parts = [_Part(int(count), mu.reshape(-1), c * (count - 1))]

    @classmethod
    def _from_parts(cls, shape: tuple[int, ...], parts: list[_Part], sampled: bool) -> Moments:
        self = cls.__new__(cls)
        self.shape, self.sampled = tuple(shape), sampled
        self._parts = parts
        return self

    @overload
    @classmethod
    def fit(
        cls, batches: Batches, rank: None = None, parts: int | None = None, *, run: Run | None = None
    ) -> Moments: ...

    @overload
    @classmethod
    def fit(
        cls, batches: Batches, rank: int, parts: None = None, passes: int = 2, seed: int = 0, run: Run | None = None
    ) -> LowRankMoments: ...

    @classmethod
    @renamed(memory="run=sb.Run(memory=...)")
    def fit(
        cls,
        batches: Batches,
        rank: int | None = None,
        parts: int | None = None,
        passes: int = 2,
        seed: int = 0,
        run: Run | None = None,
    ) -> Moments | LowRankMoments:
        """Moments of a stream of batches in one pass, or leading eigenpairs in two; memory does not grow with n.

        Args:
            batches: tensors or arrays [B, *S], one of them alone, or `Images` (8-bit ones take the exact way).
            rank: eigenpairs to keep of a covariance that is too large to form (`sketch_moments`): the mean and the
                per-pixel variances stay exact. The batches are then walked ``passes`` times.
            parts: disjoint sub-accumulators for the jackknife; by default 8, 5 above d = 1,024.
            passes: of a fit with ``rank``, at least 2; one more sharpens the last eigenpairs.
            seed: of the random vectors of a fit with ``rank``.
            run: its memory is for a full covariance and all that is made of it: fewer parts where there is room for
                fewer. By default 4 GiB of parts. Not with ``rank``, see `sketch_moments`. Its progress counts rows.

        Ranks share `Images` (`symbreak.runtime.ranks`): bit for bit the same moments of 8-bit ones.

        Raises:
            InputError: for fewer than 2 rows, changing shapes, NaN or infinity, or all rows equal; with ``rank``,
                for batches that can be walked only once; where the memory does not hold a covariance.
        """
        if isinstance(batches, torch.Tensor | np.ndarray) and batches.ndim > 1:
            batches = [batches]  # one batch, not a walk over its rows
        if rank is not None:
            if parts is not None:
                raise InputError("parts= came with rank=; a sketch has no parts to leave out. Drop one of them.")
            if run is not None and run.memory is not None:
                raise InputError(
                    "a memory (--memory) came with rank= (--rank); a sketch takes 8 d (rank + 60) bytes beside 0.25 GB "
                    "of rows whatever is allowed. Leave one of them out."
                )
            return sketch_moments(batches, rank, passes, seed)
        sums: _Sums | None = None
        run, memory, total, done = (run or Run()).named("moments"), None if run is None else run.memory, 0, 0
        if hasattr(batches, "rows"):  # its length is that of its rows, not of its batches
            total = len(batches)  # type: ignore[arg-type]
        batches, first, shared = own_rows(batches)
        stream = _Stream(batches)
        for rows in stream:
            if sums is None:
                sums = _Sums(rows.shape[1:], parts, stream.exact, first, memory)
                sums.begin(rows, shared)
            if done and total:  # no bar before an error that one block shows
                run.tell(total * done // len(batches), total)  # type: ignore[arg-type]
            sums.add(rows)
            done += len(rows)
        if sums is None:
            raise InputError("no batches came; expected at least 2 samples.")
        if shared:
            sums.share()
        moments = sums.finish(cls, stream.scale, stream.offset)
        if total:
            run.tell(total, total)
        return moments

    @cached_property
    def _total(self) -> _Part:
        return _together(self._parts)

    @property
    def count(self) -> int:
        """Number of samples n."""
        return self._total.count

    @property
    def dim(self) -> int:
        """Number of elements d of one sample."""
        return math.prod(self.shape)

    @cached_property
    def mean(self) -> torch.Tensor:
        """Mean [*S], float64."""
        return torch.from_numpy(self._total.mean.reshape(self.shape).copy())

    @cached_property
    def cov(self) -> torch.Tensor:
        """Covariance [d, d], float64, divided by n - 1."""
        return torch.from_numpy(self._total.scatter / (self.count - 1))

    @cached_property
    def trace(self) -> float:
        """Total variance."""
        return float(np.trace(self._total.scatter)) / (self.count - 1)

    @cached_property
    def eigh(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues [d], falling and cut at 0, and eigenvectors [d, d] in columns.

        Raises:
            InputError: where the covariance has an eigenvalue below zero by more than rounding.
        """
        return eigendecomposed(self.cov.numpy(), "the covariance", driver="evd")

    def spectrum(self, k: int | None = None) -> Spectrum:
        """The k largest eigenvalues with jackknife intervals on the log scale.

        Source: the leave-one-part-out jackknife; parts are random disjoint subsets of the rows.
        """
        k = at_most(k, self.dim)
        values = self._values(k)
        low, high = np.full(k, math.nan), np.full(k, math.nan)
        left_out = self._left_out(k)
        for i in range(0 if left_out is None else min(k, left_out.shape[1])):
            column = left_out[:, i]  # type: ignore[index]
            if values[i] > 0 and (column > 0).all():
                a, b = jackknife(math.log(values[i]), np.log(column))
                low[i], high[i] = math.exp(a), math.exp(b)
        return Spectrum(values, low, high)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The `spectrum`, of large covariances the first 32 values, see `Spectrum.plot`."""
        return self.spectrum(self.dim if self.dim <= 256 else 32).plot(ax)

    def population(self, k: int) -> Population:
        """The k largest eigenvalues of the law behind the rows, with jackknife intervals on the log scale.

        Moments without parts to leave out have no such intervals. Those that are not ``sampled`` are taken as they are.
        """
        k = at_most(k, self.dim)
        if not self.sampled:
            return Population(**vars(self.spectrum(k)), hidden=np.zeros(k, bool))
        known = self.dim if self.dim <= 256 else max(k, 32)
        out = population(self._values(known), self.trace, self.dim, self.count, k)
        left_out = self._left_out(known)
        if left_out is None:
            return out
        parts = len(left_out)
        some = max(3, round(self.count * (1 - 1 / parts)))
        share = left_out.sum(1) / max(float(left_out.sum(1).mean()), 1e-300)
        others = [population(v, self.trace * float(f), self.dim, some, k).values for v, f in zip(left_out, share)]
        for i in np.flatnonzero(~out.hidden & (out.values > 0)):
            column = np.array(others)[:, i]
            if (column > 0).all():
                a, b = jackknife(math.log(out.values[i]), np.log(column))
                out.low[i], out.high[i] = math.exp(a), math.exp(b)
        return out

    def _values(self, k: int) -> np.ndarray:
        return self._top(self._total, k) if "eigh" not in self.__dict__ else self.eigh[0].numpy()[:k]

    def _left_out(self, k: int) -> np.ndarray | None:
        """Top k eigenvalues with each part left out, [parts, k]."""
        if len(self._parts) < 2:
            saved: np.ndarray | None = self.__dict__.get("_saved_left_out")
            return saved
        cache: dict[int, np.ndarray] = self.__dict__.setdefault("_left_out_cache", {})
        if k not in cache:
            rows = []
            for leave in range(len(self._parts)):
                rest = _together([p for i, p in enumerate(self._parts) if i != leave])
                if rest.count < 2:
                    return None  # too few rows to leave any out
                rows.append(self._top(rest, k))
            cache[k] = np.stack(rows)
        return cache[k]

    @classmethod
    def joined(cls, groups: Sequence[Moments]) -> Moments:
        """Moments of the rows of all groups, each of which is a part."""
        return cls._from_parts(groups[0].shape, [g._total for g in groups], any(g.sampled for g in groups))

    def without_each(self) -> list[Moments]:
        """Moments without each part in turn, for a jackknife; none where there is one part only."""
        parts = self._parts if len(self._parts) > 1 else []
        rest = [[p for i, p in enumerate(parts) if i != leave] for leave in range(len(parts))]
        rest = [some for some in rest if sum(p.count for p in some) > 1]
        return [self._from_parts(self.shape, [_together(some)], self.sampled) for some in rest]

    def leading_vectors(self, k: int) -> torch.Tensor:
        """Eigenvectors of the k largest eigenvalues in columns [d, k], their signs undefined."""
        if "eigh" in self.__dict__ or self.dim <= 256 or k >= self.dim // 8:
            return self.eigh[1][:, :k]
        start = np.random.default_rng(0).standard_normal(self.dim)
        values, vectors = eigsh(self.cov.numpy(), k=k, which="LA", v0=start, tol=1e-12)
        return torch.from_numpy(vectors[:, np.argsort(-values)].copy())

    @staticmethod
    def _top(part: _Part, k: int) -> np.ndarray:
        c = part.scatter / (part.count - 1)
        d = len(c)
        if d > 256 and k < d // 8:
            # Lanczos with a fixed start: the same bits every time.
            start = np.random.default_rng(0).standard_normal(d)
            values = eigsh(c, k=k, which="LA", v0=start, return_eigenvectors=False, tol=1e-12)
        else:
            values = scipy.linalg.eigvalsh(c)[-k:]
        return np.maximum(np.sort(values)[::-1], 0.0)

    def truncate(self, rank: int) -> LowRankMoments:
        """The leading eigenpairs, and exactly what the others hold."""
        values, vectors = self.eigh
        r = min(whole_rank(rank), self.dim)
        rest = values[r:]
        return LowRankMoments(
            self.count,
            self.mean,
            self.cov.diagonal().reshape(self.shape),
            vectors[:, :r].contiguous(),
            values[:r],
            torch.zeros(r),
            float(rest[0]) if len(rest) else 0.0,
            float((rest**2).sum()),
            0.0,
            self.sampled,
        )

    def merge(self, other: Moments) -> Moments:
        """Moments of both samples together; associative and commutative up to rounding.

        Raises:
            InputError: where the shapes differ.
        """
        if self.shape != other.shape:
            raise InputError(f"moments of shape {self.shape} and {other.shape} cannot be merged.")
        same = len(self._parts) == len(other._parts)
        pairs = zip(self._parts, other._parts) if same else [(self._total, other._total)]
        return self._from_parts(self.shape, [a.merge(b) for a, b in pairs], self.sampled or other.sampled)

    def tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Count, mean, covariance and what the intervals need, and the format: the content of a file."""
        tensors: dict[str, torch.Tensor] = {"count": torch.tensor(self.count), "mean": self.mean, "cov": self.cov}
        if len(self._parts) > 1 and len(self._parts) * 8 * self.dim**2 <= SAVED_PARTS_BYTES:
            tensors["parts.count"] = torch.tensor([p.count for p in self._parts])
            tensors["parts.mean"] = torch.from_numpy(np.stack([p.mean for p in self._parts]))
            tensors["parts.scatter"] = torch.from_numpy(np.stack([p.scatter for p in self._parts]))
        else:
            left_out = self._left_out(min(32, self.dim))
            if left_out is not None:
                tensors["left_out"] = torch.from_numpy(left_out)
        return tensors, {"format": "symbreak.moments", "version": "1", "sampled": str(self.sampled)}

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file."""
        return write_tensors(path, *self.tensors())

    @classmethod
    def load(cls, path: str | Path) -> Moments | LowRankMoments:
        """Read what `Moments.save` or `LowRankMoments.save` wrote."""
        return cls.from_tensors(path, *read_tensors(path))

    @classmethod
    def from_tensors(
        cls, path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]
    ) -> Moments | LowRankMoments:
        """Moments of either kind from what ``tensors`` gave; ``path`` names the file in messages."""
        if metadata.get("format") == FORMAT:
            return LowRankMoments.from_tensors(path, tensors, metadata)
        known_file(path, tensors, metadata, "symbreak.moments", ("count", "mean", "cov"), "moments", "`symbreak fit`")
        with damaged(path, "a set of moments"):
            sampled = known_sampled(metadata, not tensors.keys().isdisjoint({"parts.count", "left_out"}))
            self = cls(int(tensors["count"]), tensors["mean"], tensors["cov"], sampled)
            if "parts.count" in tensors:
                counts, means, scatters = (tensors[f"parts.{k}"].numpy() for k in ("count", "mean", "scatter"))
                d, fit = self.dim, counts.min() >= 1 and counts.sum() == self.count
                if not fit or means.shape != (len(counts), d) or scatters.shape != (len(counts), d, d):
                    raise InputError(f"{path} holds moments whose parts do not fit together. Fit it again.")
                if not (np.isfinite(means).all() and np.isfinite(scatters).all()):
                    raise InputError(f"{path} holds NaN or infinity in the parts of its moments. Fit it again.")
                self._parts = [
                    _Part(int(n), m, s) for n, m, s in zip(counts, means.astype(float), scatters.astype(float))
                ]
            elif "left_out" in tensors:
                left_out = tensors["left_out"].double().numpy()
                if left_out.ndim != 2 or len(left_out) < 2:
                    raise InputError(f"{path} holds moments whose parts do not fit together. Fit it again.")
                self.__dict__["_saved_left_out"] = left_out
        return self

    def __repr__(self) -> str:
        return f"Moments(count={self.count}, shape={self.shape})"


class _Stream:
    """Arrays [B, *S] of a data set; 8-bit images as they are stored, x = (raw + offset) / scale."""

    def __init__(self, batches: Any) -> None:
        self.exact = bool(hasattr(batches, "blocks") and getattr(batches, "integer", False))
        self.batches = batches
        self.scale: float = batches.scale if self.exact else 1.0
        self.offset: float = batches.offset if self.exact else 0.0

    def __iter__(self) -> Iterator[np.ndarray]:
        for batch in self.batches.blocks() if self.exact else self.batches:
            rows = batch.detach().cpu().numpy() if isinstance(batch, torch.Tensor) else np.asarray(batch)
            if rows.ndim < 2:
                raise InputError(f"a batch of shape {rows.shape}; expected [B, *S] with at least one dimension in S.")
            yield rows


class _Sums:
    """Running sums of disjoint parts of a stream of rows."""

    def __init__(
        self, shape: tuple[int, ...], parts: int | None, exact: bool, first: int = 0, memory: int | None = None
    ) -> None:
        self.shape, self.exact = shape, exact
        self.d = math.prod(shape)
        if self.d == 0:
            raise InputError(f"samples of shape {shape} are empty.")
        if self.d > LARGEST_DIM:
            raise InputError(
                f"samples of shape {shape} have {self.d:,} elements; a full covariance takes at most {LARGEST_DIM:,}. "
                "Pass rank= for the leading eigenpairs, or resize the images."
            )
        # Every part costs d^2 of memory and of finishing touches: fewer for large d.
        matrix, room = 8 * self.d**2, PARTS_BYTES
        if memory is not None:
            room = memory - SPARE * matrix - memory // 8
            if room < matrix:
                raise InputError(
                    f"{memory / 1e9:.3g} GB of memory for samples of {self.d:,} elements, whose covariance takes "
                    f"{(1 + SPARE) * matrix * 8 / 7 / 1e9:.3g} GB to find. Allow more, or pass rank= (symbreak fit "
                    "--rank) for the leading eigenpairs."
                )
        self.groups = parts or max(1, min(8 if self.d <= 1024 else 5, room // matrix))
        self.rows = self.first = first  # the stream's rows before these belong to others
        self.counts = [0] * self.groups
        self.sums = [np.zeros(self.d) for _ in range(self.groups)]
        # Fortran order: BLAS syrk adds into one triangle of these in place, at half the work of a product.
        self.products = [np.zeros((self.d, self.d), order="F") for _ in range(self.groups)]
        self.waiting: list[np.ndarray] = []
        self.places: list[np.ndarray] = []  # index in the stream of every waiting row
        self.waiting_rows = [0] * self.groups
        self.shift = np.empty(0)
        # Enough rows a product that adding into the sum (d^2) costs little beside it (rows d^2).
        buffer = BUFFER_BYTES if memory is None else min(BUFFER_BYTES, memory // 8)
        self.capacity = EXACT_ROWS if exact else max(64, min(1024, buffer // (8 * self.d * self.groups)))

    def begin(self, rows: np.ndarray, shared: bool) -> None:
        """Choose what is taken off every row; ranks that share a stream take the first one's."""
        flat = rows.reshape(len(rows), self.d)
        self.shift = np.full(self.d, 128.0) if self.exact else flat.mean(axis=0, dtype=np.float64)
        if shared and not self.exact:
            from_first(torch.from_numpy(self.shift))

    def share(self) -> None:
        """Add the rows of all ranks together: exact for 8-bit images, whose sums are integers."""
        for g in range(self.groups):
            self._flush(g)
            counts = torch.tensor([self.counts[g]])
            summed(counts, torch.from_numpy(self.sums[g]), torch.from_numpy(self.products[g].T))
            self.counts[g] = int(counts)
        self.first, self.rows = 0, sum(self.counts)

    def add(self, rows: np.ndarray) -> None:
        if rows.shape[1:] != self.shape:
            raise InputError(f"a batch of shape {rows.shape}; the first batches had samples of shape {self.shape}.")
        flat = rows.reshape(len(rows), self.d)
        if not self.shift.size:
            self.begin(rows, False)
        if not self.waiting:
            kind = np.uint8 if self.exact else np.float64
            self.waiting = [np.empty((self.capacity, self.d), kind) for _ in range(self.groups)]
            self.places = [np.zeros(self.capacity, np.int64) for _ in range(self.groups)]
        part = self._deal(self.rows, len(flat))
        for g in range(self.groups):
            chosen = np.flatnonzero(part == g)
            while len(chosen):
                have = self.waiting_rows[g]
                now, chosen = chosen[: self.capacity - have], chosen[self.capacity - have :]
                target = self.waiting[g][have : have + len(now)]
                if flat.dtype == target.dtype:
                    np.take(flat, now, axis=0, out=target, mode="clip")  # "clip" writes without a buffer
                else:
                    target[...] = flat[now]
                self.places[g][have : have + len(now)] = self.rows + now
                self.waiting_rows[g] += len(now)
                if self.waiting_rows[g] == self.capacity:
                    self._flush(g)
        self.rows += len(flat)

    def _deal(self, start: int, n: int) -> np.ndarray:
        """The part of each row, by a hash of its index: independent of batches and of the data's order."""
        z = np.arange(start, start + n, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((z ^ (z >> np.uint64(31))) % np.uint64(self.groups)).astype(np.int64)

    def _flush(self, g: int) -> None:
        n = self.waiting_rows[g]
        if n == 0:
            return
        rows = self.waiting[g][:n]
        self.waiting_rows[g] = 0
        self.counts[g] += n
        if self.exact:
            small = rows.astype(np.float32)
            small -= np.float32(128.0)
            self.sums[g] += small.sum(axis=0, dtype=np.float64)
            products, total = torch.from_numpy(blas.ssyrk(1.0, small.T).T), torch.from_numpy(self.products[g].T)
            # Only one triangle is filled: add it panel by panel, with all threads (torch is row-major, hence .T).
            for a in range(0, self.d, PANEL):
                total[a : a + PANEL, : a + PANEL] += products[a : a + PANEL, : a + PANEL]
            return
        # All products here go through one BLAS: the idle threads of a second pool would spin beside it.
        rows -= self.shift
        column_sums = blas.dgemv(1.0, rows.T, np.ones(n))
        if not np.isfinite(column_sums).all():
            bad = self.places[g][:n][~np.isfinite(rows).all(axis=1)]
            if len(bad):
                raise InputError(f"sample {bad.min()} holds NaN or infinity; expected finite numbers.")
        self.sums[g] += column_sums
        self.products[g] = blas.dsyrk(1.0, rows.T, beta=1.0, c=self.products[g], overwrite_c=1)

    def finish(self, cls: type[Moments], scale: float, offset: float, equal: bool = False) -> Moments:
        """The moments of x = (raw + offset) / scale; ``equal`` takes rows that are all equal, too."""
        if self.rows < 2:
            raise InputError(f"{self.rows} sample{'s' * (self.rows != 1)} came; at least 2 are needed.")
        parts = []
        for g in range(self.groups):
            self._flush(g)
            n = self.counts[g]
            if n == 0:
                continue
            mean = self.sums[g] / n
            upper = blas.dsyr(-1.0 / n, self.sums[g], a=self.products[g], overwrite_a=1)
            self.products[g] = np.empty((0, 0))
            half = torch.from_numpy(upper.T)
            scatter = half + half.T
            scatter.diagonal().mul_(0.5)
            if scale != 1.0:
                scatter /= scale**2  # raw -> x = (raw + offset) / scale
            parts.append(_Part(n, (mean + self.shift + offset) / scale, scatter.numpy()))
        result = cls._from_parts(self.shape, parts, sampled=True)
        constant = not any(p.scatter.diagonal().any() for p in parts)
        if not equal and constant and all(np.array_equal(p.mean, parts[0].mean) for p in parts):
            raise InputError(f"all {self.rows:,} samples are equal; their law has no spread to learn from.")
        return result


def grouped(batches: Batches, group: np.ndarray, shared: bool = False) -> list[Moments]:
    """Moments of several disjoint groups of the rows of one stream, in one pass.

    Args:
        batches: as of `Moments.fit`, rows in the order of ``group``.
        group: [n] the group 0 .. G - 1 of every row; rows of a negative group belong to none.
        shared: whether every rank brings its own rows; the moments are of all of them.

    Returns:
        G moments, each without parts to leave out; memory is G times d^2. Rows may all be equal: samples collapse.

    Raises:
        InputError: where a group has fewer than 2 rows, or the stream another number of rows.
    """
    sums: list[_Sums] = []
    most, start = torch.tensor([int(group.max(initial=-1)) + 1]), 0
    if shared:
        most = torch.tensor([max(int(each["groups"][0]) for each in from_each({"groups": most.numpy()}))])
    stream = _Stream(batches)
    for rows in stream:
        here = group[start : start + len(rows)]
        start += len(rows)
        if start > len(group):
            break
        if not sums:
            sums = [_Sums(rows.shape[1:], 1, stream.exact) for _ in range(int(most))]
            for one in sums:
                one.begin(rows, shared)
        for g, one in enumerate(sums):
            if (here == g).any():
                one.add(rows[here == g])
    if start != len(group):
        came = f"{start:,} or more" if start > len(group) else f"{start:,}"
        raise InputError(f"{len(group):,} labels for {came} samples; expected one label a sample.")
    for one in sums if shared else ():
        one.share()
    return [one.finish(Moments, stream.scale, stream.offset, equal=True) for one in sums]


def mode_images(moments: Moments | LowRankMoments, modes: int = 8) -> torch.Tensor:
    """The leading eigenvectors of the covariance as images.

        C v_i = lambda_i v_i, |v_i| = 1, the entry of largest size positive

    Args:
        moments: `Moments` or `LowRankMoments`.
        modes: how many; fewer come where the dimension or the rank is smaller.

    Returns:
        [modes, *S] float64, by falling eigenvalue.

    Raises:
        InputError: for fewer than one mode.

    >>> mode_images(Moments(2, [0.0, 0.0], [[1.0, 0.0], [0.0, 4.0]]), 1).tolist()
    [[0.0, 1.0]]
    """
    if int(modes) != modes or modes < 1:
        raise InputError(f"{modes} modes requested; expected a whole number of at least 1.")
    if isinstance(moments, LowRankMoments):
        columns = moments.vectors[:, :modes].double()
    else:
        columns = moments.leading_vectors(min(int(modes), moments.dim))
    rows = columns.T.contiguous()
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return (rows * largest.sign()).reshape(-1, *moments.shape)
