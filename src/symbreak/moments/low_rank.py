"""Moments too large for a covariance: leading eigenpairs of a stream, and what leaving out the rest costs.

The empirical covariance C (rank at most n - 1) is never formed. Walks over the data give C Omega for a few Gaussian
vectors Omega, an orthonormal basis Q of its range, then the products C Q: the Ritz pairs (L_i, q_i) of C in Q
(Halko, Martinsson & Tropp, arXiv:0909.4061). The rest, M = P C P with P = I - Q Q^T for the r kept vectors, is known
by three numbers: R = tr M exactly, and from k fresh Gaussian vectors w, except with a small probability p each,

    l = lambda_max(M) <= theta max |M w|     theta = 1 / z, P(|N(0, 1)| < z) = p^(1/k)
    S = tr M^2        <= mean |M w|^2 / c    (c e^(1 - c))^(k/2) = p, c < 1

The first is Dixon 1983: |M w| >= l |u.w| for the top eigenvector u, and u.w is standard normal. The second is
Chernoff's bound: with weights a_i = lambda_i^2 / S, E exp(-t mean |M w|^2 / S) = prod (1 + 2 a_i t / k)^(-k/2) is
largest where one mode has all the weight. `truncation_bound` turns R, l and S into nats.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg
import scipy.special
import torch

from symbreak.moments.covariance import Covariance
from symbreak.noise import generator
from symbreak.runtime.files import InputError, damaged, read_tensors, write_tensors
from symbreak.runtime.ranks import from_first, own_rows, summed
from symbreak.runtime.shown import Shown, axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "Batches",
    "Certificate",
    "LowRankMoments",
    "Population",
    "Spectrum",
    "population",
    "project_moments",
    "sketch_moments",
    "truncation_bound",
]

Batches = Iterable[torch.Tensor | np.ndarray]  # of shape [B, *S]; `Images`, a list, a generator

FORMAT = "symbreak.low-rank-moments"
STORED = ("count", "mean", "variances", "vectors", "eigenvalues", "residuals", "dropped")  # in a file
OVERSAMPLING = 10
PROBES = 50  # fewer make S cheap to find and expensive to certify: 1 / c is 42 at 10, 3.5 at 50, 2.3 at 100
FAILURE = 1e-6
BLOCK = 2**26  # float32 numbers of one block of rows
COLUMNS = 2**16  # columns of a block multiplied at a time
PANEL = 2**12  # rows [., r] of a basis handled at a time
CACHED = 2**17  # float64 numbers that stay in a processor's cache
LARGEST_DIM = 20_000  # a full covariance of 3.2 GB
FEW = 8  # dimensions below which eigenvalues have no edge to speak of
FAINT = 1e-12  # directions below 1e-6 of the longest are rounding in float32


@dataclass(frozen=True)
class Spectrum(Shown):
    """Leading eigenvalues of a covariance, falling, with jackknife intervals (NaN where unknown)."""

    values: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Eigenvalues against their rank, with their intervals; the axes, new ones where none came."""
        ax, rank = axes(ax), np.arange(1, len(self) + 1)
        (line,) = ax.loglog(rank, np.where(self.values > 0, self.values, math.nan), ".-")
        ax.fill_between(rank, self.low, self.high, color=line.get_color(), alpha=0.2, linewidth=0)
        top = float(self.values.max())  # the interval of a value near zero may reach far beyond all others
        ax.set(xlabel="mode", ylabel="variance", ylim=(max(self.values.min(), 1e-6 * top) / 2, 3 * top))
        return ax


@dataclass(frozen=True)
class Population(Spectrum):
    """Leading eigenvalues of the law that samples were drawn from.

    Attributes:
        hidden: [k] whether a sample eigenvalue cannot be told from the edge of the others' noise. ``values`` then
            holds the mean of all eigenvalues from it on, and ``low`` and ``high`` are bounds: that mean, and what a
            mode could have without standing out.
    """

    hidden: np.ndarray


def population(values: np.ndarray, trace: float, dim: int, count: int, k: int) -> Population:
    """Eigenvalues of the law behind n samples in d dimensions, which those of the samples spread out.

        lambda / (1 + 1/(n - 1) sum_j lambda_j / (lambda - lambda_j))        the other eigenvalues lambda_j

    An eigenvalue is told from noise where it lies above the edge (sqrt(n) + sqrt(d))^2 / n of the Marchenko-Pastur
    law of all that are not larger, in units of their mean, and 2.02 widths (99 %) of the Tracy-Widom law above it.

    Args:
        values: leading eigenvalues [K] of the sample covariance, falling; the others are taken for equal.
        trace, dim, count: of the covariance, and of the samples.
        k: how many of them are judged, at most K.

    Source: Bai & Ding 2012, arXiv:1203.1123 (eigenvalues); Johnstone 2001, doi:10.1214/aos/1009210544 (edge).
    """
    n, others = count - 1, min(dim, count - 1) - len(values)
    mean = max(0.0, trace - float(values.sum())) / others if others > 0 else 0.0
    out, low, high, hidden = (np.full(k, math.nan), np.full(k, math.nan), np.full(k, math.nan), np.zeros(k, bool))
    for i, value in enumerate(values[:k]):
        rest = np.append(np.delete(values, i), np.full(max(others, 0), mean))
        rest = rest[rest > 0]
        gaps = value - rest
        out[i] = value / (1 + float((rest / gaps).sum()) / n) if value > 0 and (gaps != 0).all() else value
        if not 0 < out[i] <= 1.5 * value:  # two that all but coincide
            out[i] = value
        left, p = n - i, dim - i
        level = (trace - float(values[:i].sum())) / p  # of noise, were all from this one on noise
        if p < FEW or left < 2 or not level > 0:
            continue  # of few dimensions noise makes no edge that an interval would not hold
        a, b = math.sqrt(left - 1), math.sqrt(p)
        edge = ((a + b) ** 2 + 2.02 * (a + b) * (1 / a + 1 / b) ** (1 / 3)) / left
        if value <= edge * level:
            # A mode up to the first factor stays inside the noise; the others are two errors, of it and of the mean.
            unseen = level * (1 + math.sqrt(p / left)) * (1 + 2 * math.sqrt(2 / left))
            least = level * (1 - 2 * math.sqrt(2 / left / p))
            out[i], low[i], high[i], hidden[i] = level, least, unseen, True
    return Population(out, low, high, hidden)


@dataclass(frozen=True)
class Certificate(Shown):
    """What a law of low rank loses at a level against the empirical covariance it was fitted to.

    Attributes:
        nats: bound of KL(N(mu, C + sigma^2) || law), C the empirical covariance.
        sigma: the level.
        rank: eigenpairs kept (the fewest of a mixture's components).
        modes: directions left at one variance, d - rank; 0 for a full law.
        remainder: variance R in those directions.
        largest: bound of the largest eigenvalue l there.
        count: samples n; C has rank n - 1 at most.
        failure: probability, over the random vectors of the fit, that the bound is wrong.
    """

    nats: float
    sigma: float
    rank: int
    modes: int
    remainder: float
    largest: float
    count: int
    failure: float

    def sentence(self) -> str:
        """The certificate in words."""
        if not self.modes:
            return f"The law has full rank: nothing of the covariance of {self.count:,} samples is truncated."
        chance = f", except with probability {self.failure:.0e}" if self.failure else ""
        return (
            f"Rank {self.rank} of {self.rank + self.modes:,}: truncation costs at most {self.nats:.3g} nats at sigma "
            f"{self.sigma:.4g}{chance} (variance left out {self.remainder:.4g}, its largest eigenvalue at most "
            f"{self.largest:.3g}), against the empirical covariance of {self.count:,} samples, whose rank is at most "
            f"{self.count - 1:,}."
        )


def truncation_bound(
    remainder: float, largest: float, sigma: float, floor: float = 0.0, modes: int = 0, coupling: float = 0.0
) -> float:
    """Nats lost at a level by a Gaussian that keeps some directions of C and gives the others one variance.

        KL(N(C + sigma^2) || law) <= 1/2 [ m log(1 + f / sigma^2) + (R - m f) / (f + sigma^2)
                                           - (R - b) / l log(1 + l / sigma^2) ]

    which is (R / l) 1/2 (l / sigma^2 - log(1 + l / sigma^2)) for f = b = 0. In the kept directions and the others
    C = [[L, B], [B^T, M]], so KL = 1/2 [tr D^-1 A - d + log det D - log det A] with D = diag(L, f) + sigma^2,
    A = C + sigma^2 and det A = det(L + sigma^2) det(N + sigma^2), N = M - B^T (L + sigma^2)^-1 B. C >= 0 makes
    0 <= N <= M, and tr N = R - b. As log(1 + x) / x is convex, Jensen's inequality with weights mu_i over the
    eigenvalues of N gives sum log(1 + mu_i / sigma^2) >= tr N log(1 + a / sigma^2) / a for a = tr N^2 / tr N, and
    for any larger a. Both l = lambda_max(M) and tr M^2 / tr N are.

    Args:
        remainder: R, the trace of C in the left-out directions.
        largest: upper bound of their largest eigenvalue, or of tr M^2 / (R - b).
        sigma: level > 0.
        floor: variance f that the law gives each of them.
        modes: their number m (needed with a floor).
        coupling: b = sum_i |B_i|^2 / (L_i + sigma^2); |B_i| is the residual of a Ritz vector, 0 for an eigenvector.

    Returns:
        Nats >= 0.

    Source: derived.

    >>> round(truncation_bound(0.5, 0.5, sigma=1.0), 6)  # one dropped mode: 1/2 (x - log(1 + x)), x = 1/2
    0.047267
    """
    if not sigma > 0:
        raise InputError(f"sigma is {sigma:g}; expected a noise level > 0.")
    if floor and modes < 1:
        raise InputError(f"a floor of {floor:g} for {modes} directions; pass modes=, how many are left out.")
    if remainder <= 0 and floor == 0:
        return 0.0
    s2 = sigma * sigma
    left = max(0.0, remainder - coupling)
    log_det = left / largest * math.log1p(largest / s2) if largest > 0 else left / s2
    law = modes * math.log1p(floor / s2) + (remainder - modes * floor) / (floor + s2)
    return max(0.0, 0.5 * (law - log_det))


@dataclass(eq=False, repr=False)
class LowRankMoments(Shown):
    """Mean, per-pixel variances and leading eigenpairs of an empirical covariance C, with what was left out.

    Made by ``Moments.fit(batches, rank=)`` and ``Moments.truncate``. C is the covariance of the samples that came,
    of rank at most n - 1: bounds are against it, not against the law the samples were drawn from.

    Attributes:
        count: number of samples n.
        mean: [*S] float64.
        variances: [*S] float64, exact whatever the rank.
        vectors: [d, r] orthonormal in columns, float32 from a sketch.
        eigenvalues: [r] float64, falling: Ritz values q^T C q, each at most the eigenvalue of its place.
        residuals: [r] float64, |C q - L q|.
        largest_dropped: upper bound of the top eigenvalue of C in the complement of the vectors.
        squares_dropped: upper bound of the sum of squared eigenvalues there.
        failure: probability that one of the two bounds is wrong; 0 where they were computed.
        sampled: whether they were measured on n samples, not given as a law's own.
        shape: S.
    """

    count: int
    mean: torch.Tensor
    variances: torch.Tensor
    vectors: torch.Tensor
    eigenvalues: torch.Tensor
    residuals: torch.Tensor
    largest_dropped: float
    squares_dropped: float
    failure: float
    sampled: bool = False

    def __post_init__(self) -> None:
        for name in ("mean", "variances", "vectors", "eigenvalues", "residuals"):
            tensor = torch.as_tensor(getattr(self, name)).detach().cpu()
            setattr(self, name, tensor if name == "vectors" else tensor.double())
        self.count, self.shape, r = int(self.count), tuple(self.mean.shape), len(self.eigenvalues)
        if self.variances.shape != self.mean.shape or self.vectors.shape != (self.dim, r) or len(self.residuals) != r:
            raise InputError(
                f"low-rank moments with a mean of {self.shape}, variances of {tuple(self.variances.shape)}, vectors of "
                f"{tuple(self.vectors.shape)} and {r} eigenvalues do not fit together; expected [*S], [*S], [d, r], r."
            )
        if self.count < 2:
            raise InputError(f"moments of {self.count} sample{'s' * (self.count != 1)}; at least 2 are needed.")

    @property
    def dim(self) -> int:
        """Number of elements d of one sample."""
        return math.prod(self.shape)

    @property
    def rank(self) -> int:
        """Number of eigenpairs r."""
        return len(self.eigenvalues)

    @cached_property
    def trace(self) -> float:
        """Trace of C, from the exact variances."""
        return float(self.variances.sum())

    @cached_property
    def remainder(self) -> float:
        """Variance R outside the vectors; exactly 0 where nothing was dropped."""
        if self.largest_dropped == 0:
            return 0.0
        return max(0.0, self.trace - float(self.eigenvalues.sum()))

    @property
    def floor(self) -> float:
        """Mean variance R / (d - r) of a direction outside the vectors."""
        return self.remainder / (self.dim - self.rank) if self.dim > self.rank else 0.0

    @cached_property
    def cov(self) -> torch.Tensor:
        """Covariance Q L Q^T + floor (I - Q Q^T), [d, d] float64.

        Raises:
            InputError: above d = 20,000.
        """
        if self.dim > LARGEST_DIM:
            raise InputError(
                f"a covariance of {self.dim:,} x {self.dim:,}; at most {LARGEST_DIM:,} are formed. Use .vectors, "
                ".eigenvalues and .floor."
            )
        floor = torch.tensor(self.floor, dtype=torch.float64)
        return Covariance(self.vectors, self.eigenvalues, floor).dense()

    def spectrum(self, k: int | None = None) -> Spectrum:
        """The k largest Ritz values, at most the rank; a sketch has no parts, so the intervals are NaN."""
        k = at_most(k, self.rank)
        return Spectrum(self.eigenvalues[:k].numpy().copy(), np.full(k, math.nan), np.full(k, math.nan))

    def plot(self, ax: Axes | None = None) -> Axes:
        """The `spectrum`, see `Spectrum.plot`."""
        return self.spectrum().plot(ax)

    def population(self, k: int) -> Population:
        """The k largest eigenvalues of the law behind samples, without intervals; as they are where not ``sampled``."""
        k = at_most(k, self.rank)
        if not self.sampled:
            return Population(**vars(self.spectrum(k)), hidden=np.zeros(k, bool))
        return population(self.eigenvalues.numpy(), self.trace, self.dim, self.count, k)

    def truncate(self, rank: int) -> LowRankMoments:
        """The same with fewer eigenpairs.

        The complement grows by the dropped pairs: with D their Ritz values and E their cross block with the rest,
        it is [[D, E], [E^T, M]], so sum squares = |D|^2 + 2 |E|^2 + |M|^2, and its largest eigenvalue is at most
        that of [[max D, |E|], [|E|, l]]. |E|^2 is the sum of squared residuals.
        """
        rank = whole_rank(rank)
        if rank >= self.rank:
            return self
        dropped, cross = self.eigenvalues[rank:], float((self.residuals[rank:] ** 2).sum())
        top, rest = float(dropped[0]), self.largest_dropped
        return replace(
            self,
            vectors=self.vectors[:, :rank].contiguous(),
            eigenvalues=self.eigenvalues[:rank],
            residuals=self.residuals[:rank],
            largest_dropped=0.5 * (top + rest) + math.hypot(0.5 * (top - rest), math.sqrt(cross)),
            squares_dropped=float((dropped**2).sum()) + 2 * cross + self.squares_dropped,
        )

    def certificate(self, sigma: float, floor: float | None = None) -> Certificate:
        """What the Gaussian with these eigenpairs and ``floor`` (default `floor`) elsewhere loses at a level.

        `truncation_bound` with the smaller of the bounds of l and of S / (R - b).
        """
        f = self.floor if floor is None else float(floor)
        r = self.remainder
        coupling = float((self.residuals**2 / (self.eigenvalues + sigma**2)).sum()) if r else 0.0
        left = max(0.0, r - coupling)
        largest = min(self.largest_dropped, self.squares_dropped / left if left else math.inf)
        largest = max(largest, self.floor)  # no bound lies below the mean but by rounding
        nats = truncation_bound(r, largest, sigma, f, self.dim - self.rank, coupling)
        modes = self.dim - self.rank
        return Certificate(nats, float(sigma), self.rank, modes, r, self.largest_dropped, self.count, self.failure)

    def merge(self, other: object) -> LowRankMoments:
        """Raises an error: what the sketches left out cannot be put together."""
        raise InputError("low-rank moments cannot be merged. Fit all batches together, or merge full Moments.")

    def tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Everything, and the format: the content of a file."""
        dropped = torch.tensor([self.largest_dropped, self.squares_dropped, self.failure], dtype=torch.float64)
        tensors = {name: torch.as_tensor(getattr(self, name)) for name in STORED[:-1]}
        return tensors | {"dropped": dropped}, {"format": FORMAT, "version": "1", "sampled": str(self.sampled)}

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file; `Moments.load` reads it."""
        return write_tensors(path, *self.tensors())

    @classmethod
    def load(cls, path: str | Path) -> LowRankMoments:
        """Read what `save` wrote."""
        return cls.from_tensors(path, *read_tensors(path))

    @classmethod
    def from_tensors(
        cls, path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]
    ) -> LowRankMoments:
        """Low-rank moments from the content of a file at ``path``."""
        known_file(path, tensors, metadata, FORMAT, STORED, "low-rank moments", "LowRankMoments.save")
        with damaged(path, "a set of low-rank moments"):
            for name in STORED:
                if not bool(torch.isfinite(tensors[name]).all()):
                    raise InputError(f"{path} holds NaN or infinity in {name}; expected finite numbers. Fit it again.")
            if bool((tensors["eigenvalues"] < 0).any()):
                raise InputError(f"{path} holds a negative variance; expected eigenvalues >= 0. Fit it again.")
            count, mean, variances, vectors, eigenvalues, residuals, dropped = (tensors[name] for name in STORED)
            largest, squares, failure = dropped.tolist()
            sampled = known_sampled(metadata, failure > 0)
            return cls(int(count), mean, variances, vectors, eigenvalues, residuals, largest, squares, failure, sampled)

    def __repr__(self) -> str:
        return f"LowRankMoments(count={self.count}, shape={self.shape}, rank={self.rank})"


def at_most(k: int | None, most: int) -> int:
    """How many eigenvalues: k, all by default, no more than there are."""
    k = most if k is None else min(int(k), most)
    if k < 1:
        raise InputError(f"{k} eigenvalues requested; expected at least 1.")
    return k


def whole_rank(rank: int) -> int:
    """The rank, if it is a whole number of at least 1."""
    if int(rank) != rank or rank < 1:
        raise InputError(f"rank is {rank}; expected a whole number of at least 1.")
    return int(rank)


def known_file(
    path: str | Path,
    tensors: Collection[str],
    metadata: dict[str, str],
    format: str,
    names: Collection[str],
    what: str,
    writer: str,
) -> None:
    """Raises an error where a file is of another format or a newer version, or lacks one of the tensors."""
    if metadata.get("format") != format or not set(names) <= set(tensors):
        raise InputError(f"{path} holds no {what}. Expected a file that {writer} wrote.")
    if metadata.get("version") != "1":
        raise InputError(f"{path} was written by a newer symbreak (format {metadata.get('version')}). Update it.")


def known_sampled(metadata: dict[str, str], trace: bool) -> bool:
    """Whether moments of a file were measured on samples; older files do not say it and may hold a trace of it."""
    return metadata.get("sampled", str(trace)) == "True"


# Walking over the data


@dataclass
class _Walk:
    """What one walk gives, around a shift s: with x - s in rows X and bases B, X^T X B and X B."""

    count: int
    energy: float  # sum of |x - s|^2
    total: torch.Tensor  # [d] float64, sum of x - s
    squares: torch.Tensor  # [d] float64, sum of (x - s)^2
    products: list[torch.Tensor]  # [d, m] float32 each
    coordinates: list[torch.Tensor]  # [n, m] float64 each, of this rank's rows
    shared: bool = False

    def mean(self, basis: int) -> torch.Tensor:
        """Mean coordinates [m] of all ranks' rows."""
        total = self.coordinates[basis].sum(0)
        if self.shared:
            summed(total)
        return total / self.count

    def gram(self, basis: int) -> torch.Tensor:
        """Products [m, m] of the coordinates around their mean, over all ranks' rows."""
        y = self.coordinates[basis] - self.mean(basis)
        out = y.T @ y
        if self.shared:
            summed(out)
        return out

    def covariance_products(self) -> list[torch.Tensor]:
        """C B of every basis, in place of the products."""
        for basis, product in enumerate(self.products):
            product.addr_(self.total.float(), self.mean(basis).float(), alpha=-1.0)
            product /= self.count - 1
        return self.products


class _Rows:
    """A stream of samples, walked in blocks of rows around a shift."""

    def __init__(self, batches: Batches, again: bool) -> None:
        batches, self.first, self.shared = own_rows(batches)
        self.batches = batches
        stream = iter(batches)
        if stream is batches and again:
            raise InputError(
                "the batches can be walked only once, but a low rank takes several passes. Pass a list, Images, or an "
                "object whose __iter__ starts afresh."
            )
        first = next(stream, None)
        if first is None:
            raise InputError("no batches came; expected at least 2 samples.")
        if stream is batches:
            self.batches = itertools.chain([first], stream)
        rows = _tensor(first)
        self.shape = tuple(rows.shape[1:])
        self.dim = math.prod(self.shape)
        if self.dim == 0 or len(rows) == 0:
            raise InputError(f"a batch of shape {tuple(rows.shape)}; expected samples that are not empty.")
        # Around a pilot mean a mean far larger than the spread costs no digits.
        pilot = rows.reshape(len(rows), -1)[: max(1, 2**24 // self.dim)].mean(0, dtype=torch.float64)
        self.shift = torch.nan_to_num(pilot, 0.0, 0.0, 0.0)  # the walk says which sample it is
        if self.shared:
            from_first(self.shift)

    def blocks(self, total: torch.Tensor | None = None, squares: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        """Rows x - shift [b, d] float32, in one buffer that is filled again; sums are added in float64."""
        size = min(1024, max(1, BLOCK // self.dim))
        buffer = torch.empty(size, self.dim)
        have = 0
        for batch in self.batches:
            rows = _tensor(batch)
            if tuple(rows.shape[1:]) != self.shape:
                raise InputError(
                    f"a batch of shape {tuple(rows.shape)}; the first batches had samples of shape {self.shape}."
                )
            flat = rows.reshape(len(rows), -1)
            while len(flat):
                now, flat = flat[: size - have], flat[size - have :]
                step = max(1, CACHED // len(now))
                for a in range(0, self.dim, step):
                    part = now[:, a : a + step].double() - self.shift[a : a + step]
                    buffer[have : have + len(now), a : a + step] = part
                    if total is not None and squares is not None:
                        total[a : a + step] += part.sum(0)
                        squares[a : a + step] += part.square_().sum(0)
                have += len(now)
                if have == size:
                    yield buffer
                    have = 0
        if have:
            yield buffer[:have]

    def walk(self, bases: Sequence[torch.Tensor], sums: bool = True) -> _Walk:
        total, squares = (torch.zeros(self.dim, dtype=torch.float64) for _ in range(2))
        products = [torch.zeros(b.shape) for b in bases]
        coordinates: list[list[torch.Tensor]] = [[] for _ in bases]
        count, energy = 0, 0.0
        for block in self.blocks(total, squares) if sums else self.blocks():
            lengths = torch.zeros(len(block), dtype=torch.float64)
            for a in range(0, self.dim, COLUMNS):
                lengths += torch.linalg.vector_norm(block[:, a : a + COLUMNS], dim=1).double().square_()
            bad = (~torch.isfinite(lengths)).nonzero()
            if len(bad):
                raise InputError(
                    f"sample {self.first + count + int(bad[0])} holds NaN or infinity; expected finite numbers."
                )
            count, energy = count + len(block), energy + float(lengths.sum())
            for basis, product, rows in zip(bases, products, coordinates):
                y = torch.zeros(len(block), basis.shape[1], dtype=torch.float64)
                # A float32 product over millions of columns rounds; panels of it are added in float64.
                for a in range(0, self.dim, COLUMNS):
                    y += block[:, a : a + COLUMNS] @ basis[a : a + COLUMNS]
                product.addmm_(block.T, y.float())
                rows.append(y)
        if self.shared:
            numbers = torch.tensor([float(count), energy], dtype=torch.float64)
            summed(numbers, total, squares, *products)
            count, energy = int(numbers[0]), float(numbers[1])
        if count < 2:
            raise InputError(f"{count} sample{'s' * (count != 1)} came; at least 2 are needed.")
        whole = [torch.cat(rows) for rows in coordinates]
        return _Walk(count, energy, total, squares, products, whole, self.shared)


def _tensor(batch: torch.Tensor | np.ndarray) -> torch.Tensor:
    rows = batch.detach().cpu() if isinstance(batch, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(batch))
    if rows.ndim < 2:
        raise InputError(f"a batch of shape {tuple(rows.shape)}; expected [B, *S] with at least one dimension in S.")
    return rows


# Linear algebra of tall matrices, a panel of rows at a time


def _panels(matrix: torch.Tensor) -> Iterator[slice]:
    for a in range(0, len(matrix), PANEL):
        yield slice(a, a + PANEL)


def _inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a^T b in float64."""
    out = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64)
    for rows in _panels(a):
        left = a[rows].double()
        out += left.T @ (left if a is b else b[rows].double())
    return out


def _well_conditioned(y: torch.Tensor, most: int) -> torch.Tensor:
    """A basis of the range of y [d, m], in the memory of y; at most ``most`` columns, none faint.

    CholeskyQR with the eigenvectors of the Gram matrix in place of its Cholesky factor, which a range of fewer
    dimensions than columns would break. Rounding in float32 leaves the faintest columns orthonormal to a few per
    cent only, which is enough here: the Ritz problem takes the Gram matrix of the basis into account.
    """
    values, vectors = torch.linalg.eigh(_inner(y, y))
    keep = min(most, int((values > FAINT * float(values[-1])).sum()))
    turn = (vectors[:, -keep:] / values[-keep:].sqrt()).to(y.dtype)
    for rows in _panels(y):
        y[rows, :keep] = y[rows] @ turn
    return y[:, :keep]


def _factors(probes: int, failure: float) -> tuple[float, float]:
    """theta and 1 / c of the module's bounds."""
    theta = 1.0 / (math.sqrt(2.0) * float(scipy.special.erfinv(failure ** (1.0 / probes))))
    c = -float(scipy.special.lambertw(-(failure ** (2.0 / probes)) / math.e).real)
    return theta, 1.0 / c


@dataclass
class _Basis:
    """A basis of the range of C, its Gram matrix, and Gaussian vectors without their part in it."""

    q: torch.Tensor  # [d, m]
    gram: torch.Tensor  # [m, m]
    probes: list[torch.Tensor]  # P w [d, k], or nothing where q spans everything
    inside: torch.Tensor | None = None  # Q^T w [m, k]

    @classmethod
    def of(cls, q: torch.Tensor, whole: bool, seed: int) -> _Basis:
        gram = _inner(q, q)
        if whole:
            return cls(q, gram, [])
        w = torch.randn(len(q), PROBES, generator=generator(seed, 1))
        inside = _inner(q, w)
        part = torch.linalg.solve(gram, inside).float()
        for rows in _panels(q):
            w[rows] -= q[rows] @ part
        return cls(q, gram, [w], inside)


def _rayleigh_ritz(
    rows: _Rows, walk: _Walk, variances: torch.Tensor, mean: torch.Tensor, basis: _Basis, rank: int
) -> LowRankMoments:
    """Ritz pairs of C from the walk over a basis and its probes; the vectors take the basis's place."""
    q, inside = basis.q, basis.inside
    # With the true Gram matrix of Q the Ritz values are q^T C q for |q| = 1, whatever Q lacks in orthonormality.
    ritz_values, turn = scipy.linalg.eigh((walk.gram(0) / (walk.count - 1)).numpy(), basis.gram.numpy())
    values, u = torch.from_numpy(ritz_values[::-1].copy()).clamp_(min=0.0), torch.from_numpy(turn[:, ::-1].copy())
    rank = min(rank, len(values))
    leading, dropped = u[:, :rank], u[:, rank:]
    products = walk.covariance_products()
    residuals = torch.zeros(rank, dtype=torch.float64)
    if inside is not None:
        # M w = P C P w for the leading vectors: the dropped Ritz vectors belong to the complement as well.
        back = (dropped @ (dropped.T @ inside)).float()
        norms = torch.zeros(inside.shape[1], dtype=torch.float64)
        along = torch.zeros(rank, inside.shape[1], dtype=torch.float64)
    turn32, values32 = leading.float(), values[:rank].float()
    for part in _panels(q):
        ritz = q[part] @ turn32
        residuals += (products[0][part] @ turn32 - ritz * values32).double().square_().sum(0)
        if inside is not None:
            image = products[1][part] + products[0][part] @ back
            norms += image.double().square_().sum(0)
            along += ritz.T @ image
        q[part, :rank] = ritz
    products.clear()  # before the copy, which is one only where pairs are dropped
    vectors = q[:, :rank].contiguous()
    rest = values[rank:]
    if inside is None:
        largest, squares, failure = float(rest[0]) if len(rest) else 0.0, float((rest**2).sum()), 0.0
    else:
        squared = (norms - along.square().sum(0)).clamp_(min=0.0)
        theta, inflate = _factors(PROBES, 0.5 * FAILURE)
        squares, failure = inflate * float(squared.mean()), FAILURE
        largest = min(theta * math.sqrt(float(squared.max())), math.sqrt(squares))
        largest = min(largest, max(0.0, float(variances.sum() - values[:rank].sum())))
    mean, variances = mean.reshape(rows.shape), variances.reshape(rows.shape)
    residuals.sqrt_()
    values = values[:rank]
    return LowRankMoments(walk.count, mean, variances, vectors, values, residuals, largest, squares, failure, True)


def _mean_and_variances(rows: _Rows, walk: _Walk) -> tuple[torch.Tensor, torch.Tensor]:
    gap = walk.total / walk.count
    variances = (walk.squares - walk.count * gap * gap).clamp_(min=0.0) / (walk.count - 1)
    if not bool(variances.any()):
        raise InputError(f"all {walk.count:,} samples are equal; their law has no spread to learn from.")
    return rows.shift + gap, variances


def sketch_moments(batches: Batches, rank: int, passes: int = 2, seed: int = 0) -> LowRankMoments:
    """Leading eigenpairs of the empirical covariance of a stream; no matrix [d, d] and no two blocks at a time.

        Y = C Omega, Q = orth(Y), then Ritz pairs of C in Q        (passes - 2 power iterations Q <- orth(C Q) between)

    4 n d (r + 10) operations a pass (the last has 50 vectors more) in float32, sums in float64; memory about
    8 d (r + 60) bytes beside one block of 0.25 GB and the caller's batch.

    Args:
        batches: tensors or arrays [B, *S], walked ``passes`` times; the same samples each time, in any order.
        rank: eigenpairs r to keep; 10 more are sketched. At n - 1 or d and above everything is kept (one more pass).
        passes: at least 2.
        seed: of the random vectors.

    Raises:
        InputError: for batches that can be walked only once or change between walks, and as `Moments.fit`.

    Source: Halko, Martinsson & Tropp 2011, arXiv:0909.4061; Dixon 1983.
    """
    rank = whole_rank(rank)
    if int(passes) != passes or passes < 2:
        raise InputError(f"{passes} passes; a sketch takes a whole number of at least 2.")
    rows = _Rows(batches, again=True)
    wide = min(rank + OVERSAMPLING, rows.dim)
    walk = rows.walk([torch.randn(rows.dim, wide, generator=generator(seed, 0))])
    mean, variances = _mean_and_variances(rows, walk)
    count, span = walk.count, min(walk.count - 1, rows.dim)
    whole = wide >= span
    if whole:
        # C has no more directions than this: take them all, from the samples, where none is squared away.
        rows.shift = mean
        products = torch.eye(rows.dim) if span == rows.dim else _gathered(rows, count)
    else:
        products = walk.covariance_products()[0]
        rows.shift = mean
    del walk
    q = _well_conditioned(products, span)
    for _ in range(0 if whole else passes - 2):
        step = _same(rows.walk([q], sums=False), count, variances)
        q = _well_conditioned(step.covariance_products()[0], span)
        del step
    basis = _Basis.of(q, whole, seed)
    last = _same(rows.walk([q, *basis.probes], sums=False), count, variances)
    basis.probes.clear()
    return _rayleigh_ritz(rows, last, variances, mean, basis, rank)


def project_moments(
    batches: Batches, vectors: Callable[[tuple[int, ...]], torch.Tensor], seed: int = 0
) -> LowRankMoments:
    """Ritz pairs of the empirical covariance in a given basis: one pass, also over a stream that comes once.

    Args:
        batches: tensors or arrays [B, *S].
        vectors: function of S that gives the basis [d, r] float32, in columns.
        seed: of the random vectors that bound what lies outside.
    """
    rows = _Rows(batches, again=False)
    q = vectors(rows.shape)
    basis = _Basis.of(q, q.shape[1] == rows.dim, seed)
    walk = rows.walk([q, *basis.probes])
    basis.probes.clear()
    mean, variances = _mean_and_variances(rows, walk)
    return _rayleigh_ritz(rows, walk, variances, mean, basis, q.shape[1])


def _gathered(rows: _Rows, count: int) -> torch.Tensor:
    """All samples around the mean, [d, n]."""
    out, seen = torch.zeros(rows.dim, count), rows.first
    for block in rows.blocks():
        if seen + len(block) > count:
            break
        out[:, seen : seen + len(block)] = block.T
        seen += len(block)
    if rows.shared:
        summed(out)
    elif seen < count:
        raise _changed(f"{count:,} samples came in the first pass and not in a later one")
    return out


def _same(walk: _Walk, count: int, variances: torch.Tensor) -> _Walk:
    """The walk, if it saw what the first one saw."""
    if walk.count != count:
        raise _changed(f"{count:,} samples came in the first pass and {walk.count:,} in a later one")
    spread, first = walk.energy / (count - 1), float(variances.sum())
    if abs(spread - first) > 1e-5 * first:
        raise _changed(f"the total variance was {first:.6g} in the first pass and {spread:.6g} in a later one")
    return walk


def _changed(what: str) -> InputError:
    return InputError(f"{what}. Every pass has to see the same samples: leave out random augmentation.")
