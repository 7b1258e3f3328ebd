"""The data set itself as a law: N equal point masses y_j, under noise a mixture of N(y_j, sigma^2).

    D(x) = sum_j w_j y_j        w = softmax_j((x.y_j - |y_j|^2 / 2) / sigma^2)

This is attention with the data as keys and values: blocks of points against blocks of queries with a
running maximum, so memory does not grow with N (Milakov & Gimelshein, arXiv:1805.02867).

Float64 states are computed in float64. Float32 states take float32 products of the centred data; these
lose about 1e-7 |x| |y| of x.y - |y|^2 / 2, which is no small part of sigma^2 where sigma is small. So the
leading points of every block whose weight such an error could change are ranked again by exact float64
differences; where nothing else has weight, only those enter the mean, and the second product is saved. The
rounding seen on these points says what the others may have added; queries for which that is more than
``TOLERANCE`` (many near ties) are computed again in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

import torch
from numpy.typing import ArrayLike

from symbreak.laws.law import ExactLaw, fresh, rows_of, top_eigenvalue
from symbreak.moments.covariance import Parameters
from symbreak.moments.one_pass import Moments
from symbreak.runtime.files import InputError

__all__ = ["Empirical"]

TOLERANCE = 3e-6  # relative error of a float32 posterior mean allowed to products in float32
CANDIDATES = 32  # points a block and a query that are ranked again
WINDOW = 30.0  # log weights this far below the highest do not count (e^-30 = 1e-13)
QUERIES = 1024
COPIES = 4  # times the working memory that a centred float32 copy of the data may take
CACHED = 2**24  # numbers kept as a second, float64 copy of the data


class Empirical(ExactLaw):
    """The empirical law of a data set.

    Args:
        points: [N, *S], N >= 1, or images; float32 and float64 data are kept as they are.
        memory: bytes of working memory for products with all points, beside a centred float32 copy of them where that
            takes at most four times as much; results do not depend on it.

    Raises:
        InputError: for points that are no batch, or hold NaN or infinity.

    >>> law = Empirical([[-1.0], [1.0]])
    >>> round(law.denoise(torch.tensor([[0.5]]), sigma=1.0).item(), 6)  # tanh(x / sigma^2)
    0.462117
    """

    def __init__(self, points: ArrayLike, memory: int = 2**28) -> None:
        whole = getattr(points, "tensor", None)  # of images, which are a stream
        data = torch.as_tensor(points if whole is None else whole()).detach().cpu()
        if data.dtype not in (torch.float32, torch.float64):
            data = data.double()
        if data.ndim < 2 or data.numel() == 0:
            raise InputError(f"points of shape {tuple(data.shape)}; expected [N, *S] with at least one point.")
        if not bool(torch.isfinite(data).all()):
            raise InputError("the points hold NaN or infinity; expected finite numbers.")
        if memory < 2**16:
            raise InputError(f"{memory} bytes of working memory; expected at least 65,536.")
        self.shape: tuple[int, ...] = tuple(data.shape[1:])
        self.points = data
        self.memory = int(memory)
        flat = data.reshape(len(data), -1)
        self._centre = torch.zeros(flat.shape[1], dtype=torch.float64)
        for rows in flat.split(4096):
            self._centre += rows.double().sum(0) / len(flat)
        half = torch.empty(len(flat), dtype=torch.float64)
        for i in range(0, len(flat), 4096):
            half[i : i + 4096] = 0.5 * (flat[i : i + 4096].double() - self._centre).square().sum(1)
        self._half = half
        self._small = Parameters(self._centre, half)
        self._data = Parameters(flat)
        self._copies: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.points)

    # The data in blocks

    def _centred(self, x: torch.Tensor, dtype: torch.dtype, part: slice) -> torch.Tensor:
        """Rows ``part`` of y - centre on the device of x."""
        key = (dtype, x.device)
        room = COPIES * self.memory if dtype == torch.float32 else 8 * CACHED
        if key not in self._copies and self.points.numel() * dtype.itemsize <= room:
            with torch.inference_mode(False):
                whole = torch.empty(len(self), self.dim, dtype=dtype, device=x.device)
                for i in range(0, len(self), 4096):
                    whole[i : i + 4096] = (self._raw(x)[i : i + 4096].double() - self._centre.to(x.device)).to(dtype)
            if torch._C._functorch.is_functorch_wrapped_tensor(whole):
                return whole[part]
            self._copies[key] = whole
        if key in self._copies:
            return self._copies[key][part]
        return (self._raw(x)[part].double() - self._centre.to(x.device)).to(dtype)

    def _raw(self, x: torch.Tensor) -> torch.Tensor:
        """The points [N, d] as given, on the device of x."""
        return self._data.like(x, self.points.dtype)[0]

    def _blocks(self, queries: int, size: int, x: torch.Tensor) -> Iterator[slice]:
        """Slices of the points, such that [queries, block] and [block, d] numbers of ``size`` bytes fit."""
        numbers = queries * 3
        if (torch.float64 if size == 8 else torch.float32, x.device) not in self._copies:
            numbers += 2 * self.dim
        step = max(1, min(self.memory // (size * numbers), 2**15))
        for start in range(0, len(self), step):
            yield slice(start, min(start + step, len(self)))

    def _queries(self, n: int, size: int) -> int:
        """Queries at a time: [queries, 64 points] and a few [queries, d] must fit."""
        return max(1, min(n, QUERIES, self.memory // (size * 4 * (self.dim + 64))))

    # Float64, from operations that can be differentiated

    def _log_weights(self, y: torch.Tensor, part: slice, s2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(x.y - |y|^2 / 2) / sigma^2 [b, block] for centred queries, and the centred points [block, d]."""
        rows = self._centred(y, torch.float64, part)
        return (y @ rows.T - self._small.like(y, torch.float64)[1][part]) / s2, rows

    def _wide(self, y: torch.Tensor, s2: torch.Tensor, v: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Of centred queries [b, d]: log sum w, log sum w^2, mean y [b, d], mean t (else [b, 1]).

        t = v.y for vectors v [b, d]; zeros without them.
        """
        top: torch.Tensor | None = None
        sums: tuple[torch.Tensor, ...] = ()
        for part in self._blocks(len(y), 8, y):
            log_w, rows = self._log_weights(y, part, s2)
            highest = log_w.detach().amax(1, keepdim=True)
            highest = highest if top is None else torch.maximum(top, highest)
            w = (log_w - highest).exp()
            t = (w * (v @ rows.T)).sum(1, keepdim=True) if v is not None else torch.zeros_like(highest)
            add = (w.sum(1, keepdim=True), (w * w).sum(1, keepdim=True), w @ rows, t)
            if top is None:
                sums = add
            else:
                r = (top - highest).exp()
                sums = tuple(a * f + b for a, b, f in zip(sums, add, (r, r * r, r, r)))
            top = highest
        if top is None:
            raise RuntimeError("an empirical law without points")
        mass, square, mean, t = sums
        return top + mass.log(), 2 * top + square.log(), mean / mass, t / mass

    def _chunked(self, flat: torch.Tensor, s2: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Float64 centred queries [b, d] and sigma^2, [] or [b, 1], in chunks."""
        step = self._queries(len(flat), 8)
        for start in range(0, len(flat), step):
            part = slice(start, start + step)
            yield part, flat[part].double() - self._small.like(flat, torch.float64)[0], rows_of(s2, part)

    # The law

    def _denoise(self, flat: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        if flat.dtype == torch.float32 and not _differentiated(flat, s2):
            step, s2 = self._queries(len(flat), 4), s2.expand(len(flat), 1)
            out = [self._narrow(flat[i : i + step], s2[i : i + step]) for i in range(0, len(flat), step)]
        else:
            centre = self._small.like(flat, torch.float64)[0]
            out = [(self._wide(y, s)[2] + centre).to(flat.dtype) for _, y, s in self._chunked(flat, s2)]
        return torch.cat(out) if out else flat

    @torch.no_grad()
    def _narrow(self, x: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        """Posterior means of float32 queries [b, d]; s2 [b, 1] float64."""
        x64 = x.double()
        centre, half = self._small.like(x, torch.float64)
        y = (x64 - centre).float()
        n2 = 0.5 * (x64 - centre).square().sum(1, keepdim=True)
        # A rough bound of the rounding of x.y - |y|^2 / 2 in float32; the true one is measured below.
        slack = 2.5e-7 * (2 * half.max()).sqrt() * torch.maximum((2 * n2).sqrt(), (2 * half.max()).sqrt())
        e = slack / s2
        sharp = bool((e > 0.05).any())
        s2f = s2.float()
        b = len(x)
        top = torch.full((b, 1), -math.inf, dtype=torch.float64, device=x.device)
        mass = torch.zeros(b, 1, dtype=torch.float64, device=x.device)
        square = torch.zeros_like(mass)  # sum of squared weights that were not ranked again
        radius = torch.zeros_like(mass)  # sum w |y|^2 / 2
        mean = torch.zeros(b, self.dim, dtype=torch.float64, device=x.device)
        error = torch.zeros(2, dtype=torch.float64, device=x.device)  # squared rounding seen, on how many points
        half32 = self._small.like(x, torch.float32)[1]
        for part in self._blocks(b, 4, x):
            rows = self._centred(x, torch.float32, part)
            g = torch.addmm(half32[part], y, rows.T, beta=-1.0)
            value, index = g.topk(min(CANDIDATES, g.shape[1]), dim=1)
            value = value.double()
            if sharp:
                reach = torch.maximum(top, value[:, :1]) - value
                chosen = reach < WINDOW * s2 + 4 * slack
            else:
                highest = torch.maximum(top, value[:, :1])
                total = mass * ((top - highest) / s2).exp()
                total += ((g - highest.float()) / s2f).exp_().sum(1, dtype=torch.float64, keepdim=True)
                chosen = e * ((value - highest) / s2).exp() > 1e-7 * total
            q, c = chosen.nonzero(as_tuple=True)
            j = index[q, c]
            exact = n2[q, 0] - self._half_distances(x64, q, j + part.start)
            error += torch.stack([(value[q, c] - exact).square().sum(), error.new_tensor(float(len(q)))])
            # The highest of what is kept: exact where ranked again.
            value[q, c] = exact
            highest = torch.maximum(top, value.amax(1, keepdim=True))
            # highest is float64; taking it away in two float32 pieces leaves no common shift between points
            # ranked again and the others.
            coarse = highest.float()
            g -= coarse
            g -= (highest - coarse.double()).float()
            g /= s2f
            g[q, j] = -math.inf
            # Weights below e^-60 would only be slow denormals.
            w = g.clamp_(min=-60.0).exp_()
            w[q, j] = 0.0
            r = ((top - highest) / s2).exp()
            ranked = ((exact - highest[q, 0]) / s2[q, 0]).exp()
            square = square * r * r + torch.linalg.vector_norm(w, dim=1, keepdim=True).double() ** 2
            mass = mass * r
            radius = radius * r
            mean = mean * r
            if not float(w.max()) <= math.exp(-WINDOW):  # also where a query is NaN
                w[q, j] = ranked.float()
                mass += w.sum(1, dtype=torch.float64, keepdim=True)
                radius += (w @ half32[part, None]).double()
                mean += w @ rows
            else:
                mass.index_add_(0, q, ranked[:, None])
                radius.index_add_(0, q, (ranked * half[part][j])[:, None])
                for some in torch.arange(len(q), device=x.device).split(max(1, self.memory // (32 * self.dim))):
                    weighted = ranked[some, None] * self._centred(x, torch.float32, part)[j[some]].double()
                    mean.index_add_(0, q[some], weighted)
            top = highest
        mean /= mass
        # What rounding may have done: independent errors of size e on weights w, of points a distance apart.
        spread = (2 * radius / mass - mean.square().sum(1, keepdim=True)).clamp(min=0).sqrt()
        seen = torch.where(error[1] > 0, (error[0] / error[1].clamp(min=1)).sqrt(), slack / 4)
        doubt = seen / s2 * square.sqrt() / mass * spread
        out = mean + centre
        redo = (doubt > TOLERANCE * torch.linalg.vector_norm(out, dim=1, keepdim=True))[:, 0].nonzero()[:, 0]
        if len(redo):
            out[redo] = self._wide(x64[redo] - centre, s2[redo])[2] + centre
        return out.float()

    def _half_distances(self, x64: torch.Tensor, q: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """|x_q - y_j|^2 / 2 [pairs] by differences in float64."""
        raw = self._raw(x64)
        out = torch.empty(len(q), dtype=torch.float64, device=x64.device)
        step = max(1, self.memory // (32 * self.dim))
        for i in range(0, len(q), step):
            gap = raw[j[i : i + step]].double()
            gap -= x64[q[i : i + step]]
            out[i : i + step] = 0.5 * torch.linalg.vector_norm(gap, dim=1) ** 2
        return out

    def _log_prob(self, flat: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        out = []
        for _, y, s in self._chunked(flat, s2):
            mass = self._wide(y, s)[0] - 0.5 * y.square().sum(1, keepdim=True) / s
            out.append((mass - math.log(len(self)) - 0.5 * self.dim * (s * (2 * math.pi)).log())[:, 0])
        return torch.cat(out)

    def participation(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Number of points that share the posterior, 1 / sum_j w_j^2, [B] float64, between 1 and N."""
        parts = [self._wide(y, s2) for _, y, s2 in self._chunked(*self._flat(x, sigma))]
        return torch.cat([(2 * mass - square).exp()[:, 0] for mass, square, *_ in parts])

    def posterior_weights(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Posterior probability of every point, p(y_j | x), [B, N] float64 (not bounded in memory)."""
        chunks, whole = self._chunked(*self._flat(x, sigma)), slice(0, len(self))
        return torch.cat([self._log_weights(y, whole, s2)[0].softmax(1) for _, y, s2 in chunks])

    def _covary(self, flat: torch.Tensor, v: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        out = []
        for part, y, s in self._chunked(flat, s2):
            u = v[part].double()
            log_mass, _, _, t = self._wide(y, s, u)
            # A second pass: deviations of t from its mean, not the difference of two means of products.
            total = torch.zeros_like(y)
            for block in self._blocks(len(y), 8, y):
                log_w, rows = self._log_weights(y, block, s)
                total = total + ((log_w - log_mass).exp() * (u @ rows.T - t)) @ rows
            out.append(total)
        return torch.cat(out)

    # Moments, draws and the flow

    def _covariance(self, v: torch.Tensor) -> torch.Tensor:
        """Covariance of the law times v [n, d] float64."""
        out = torch.zeros_like(v)
        for part in self._blocks(len(v), 8, v):
            rows = self._centred(v, torch.float64, part)
            out = out + (v @ rows.T) @ rows
        return out / len(self)

    @cached_property
    def _scales(self) -> tuple[float, float]:  # type: ignore[override]
        """Mean variance and top standard deviation of the points."""
        return 2 * float(self._half.mean()) / self.dim, math.sqrt(top_eigenvalue(self._covariance, self.dim))

    @cached_property
    def moments(self) -> Moments:
        """Exact mean and covariance of the law (over N, not N - 1: the points are the law)."""
        total = torch.zeros(self.dim, self.dim, dtype=torch.float64)
        for part in self._blocks(self.dim, 8, total):
            rows = self._centred(total, torch.float64, part)
            total += rows.T @ rows
        return Moments(max(2, len(self)), self._centre.reshape(self.shape), total / len(self))

    def sample(self, n: int, sigma: float = 0.0, generator: torch.Generator | None = None) -> torch.Tensor:
        """n draws of x_0 + sigma eps, [n, *S] float64."""
        g = fresh(generator)
        index = torch.randint(len(self), (n,), generator=g, device=g.device)
        noise = torch.randn(n, *self.shape, generator=g, dtype=torch.float64, device=g.device)
        return self.points.to(g.device)[index] + float(sigma) * noise

    def __repr__(self) -> str:
        return f"Empirical({len(self):,} points, shape={self.shape})"


def _differentiated(*values: torch.Tensor) -> bool:
    """Whether anything is being differentiated: by autograd, forward mode or torch.func."""
    return any(
        (v.requires_grad and torch.is_grad_enabled())
        or torch._C._functorch.is_functorch_wrapped_tensor(v)
        or torch.autograd.forward_ad.unpack_dual(v).tangent is not None
        for v in values
    )
