"""A mixture in the leading principal components, one Gaussian in all others: the law of late starts.

    x_0 = mu + V a + rest        a ~ mixture of Gaussians on R^P, V the P leading principal components,
                                 rest ~ Gaussian with the other eigenvalues, independent of a

Modes whose variance is far below sigma^2 cannot be told from noise, so classes and clusters need only the
leading ones there; the cost of a denoiser falls from K d^2 to d^2 + K P^2.

Every covariance is shrunk to the pooled one within components, C_k <- (S_k + n_0 C) / (n_k - 1 + n_0) with S_k
the scatter of its n_k samples: few samples span few directions, and without shrinking a draw would lie on
them. n_0 is the number of samples that the pooled covariance counts for, chosen by cross-validation.

The flow runs in g = (Lambda + sigma^2)^-1/2 V^T (x - mu), whose slope

    dg / dlog sigma = (Lambda + sigma^2)^-1/2 (D_Gauss - D_mixture)

vanishes where the law is Gaussian, in the time a = log(sigma / (sigma + c)) of `symbreak.laws.law`, from
infinite noise: a few Runge-Kutta steps do. All samples take the same steps with the same matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from symbreak.laws.gaussian import Gaussian
from symbreak.laws.law import Parameters, column, first_level, flatten, fresh, level, path, runge_kutta
from symbreak.laws.mixture import Mixture
from symbreak.moments.low_rank import Certificate
from symbreak.moments.one_pass import LowRankMoments, Moments
from symbreak.noise import generator
from symbreak.runtime.files import InputError
from symbreak.runtime.ranks import from_each, own_rows
from symbreak.runtime.run import padded_blocks

__all__ = ["PrincipalMixture"]

PRIORS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
FOLDS = 5
VALIDATED = 4000  # samples that cross-validation looks at
TABLES = 4  # sets of matrices of the flow that are kept
# Products of one row with a matrix peel off what is not aligned in memory, so their last bit would depend on the
# row's place in the batch: coordinates are padded with zeros to a multiple of this.
ALIGNED = 16
PIECE = 2**23  # numbers of the samples whose coordinates are taken at a time
EVALUATIONS = 4  # of the slope, a Runge-Kutta step


class PrincipalMixture:
    """A mixture of Gaussians in the leading principal components of a Gaussian law.

    Args:
        gaussian: the data's Gaussian law, of any sample shape [*S].
        inner: mixture of sample shape [P] of the coordinates V^T (x_0 - mu), V the Gaussian's P leading
            eigenvectors. Its ``classes`` [K], if any, say which class each component belongs to.

    Attributes:
        prior: samples n_0 that the pooled covariance counts for; ``None`` where it was not fitted here.

    Raises:
        InputError: where the mixture has more coordinates than the Gaussian has eigenvectors.
    """

    def __init__(self, gaussian: Gaussian, inner: Mixture, prior: float | None = None) -> None:
        if len(inner.shape) != 1 or inner.dim > gaussian.eigenvectors.shape[1]:
            raise InputError(
                f"a mixture of sample shape {inner.shape} in {gaussian.eigenvectors.shape[1]} principal components; "
                "expected [P] with P at most their number."
            )
        self.gaussian, self.inner, self.prior = gaussian, inner, prior
        self.shape: tuple[int, ...] = gaussian.shape
        self.dim, self.leading = gaussian.dim, inner.dim
        self._tables: dict[Any, list[_Stage]] = {}
        axes = torch.nn.functional.pad(gaussian.eigenvectors[:, : self.leading], (0, -self.leading % ALIGNED))
        self._basis = Parameters(axes)

    @property
    def moments(self) -> Moments | LowRankMoments:
        """Moments of the Gaussian law, which the mixture shares up to shrinkage."""
        return self.gaussian.moments

    @property
    def classes(self) -> torch.Tensor | None:
        """Class [K] of each component, ``None`` for clusters."""
        return self.inner.classes

    @classmethod
    def fit(
        cls,
        batches: Any,
        labels: Any = None,
        components: int | None = None,
        leading: int | None = None,
        prior: float | None = None,
        sigma: float | None = None,
        gaussian: Gaussian | None = None,
        seed: int = 0,
    ) -> PrincipalMixture:
        """One Gaussian a class, a cluster, or a cluster within a class, in two passes over the data.

        Args:
            batches: `Images`, a tensor [N, *S], or an iterable of batches [B, *S] that can be walked twice.
            labels: class of every sample, [N] integers; ``True`` takes ``batches.labels``.
            components: k-means clusters; with labels, clusters within the classes, shared out by size.
            leading: principal components P; by default those with a variance above 1 % of the largest, at
                most 64.
            prior: samples n_0 that the pooled covariance counts for; by default chosen by 5-fold
                cross-validation of the noised log-likelihood.
            sigma: level at which that likelihood is taken; by default half the spectral speciation level.
            gaussian: the data's Gaussian law, where it is already fitted.
            seed: of the clustering and of the cross-validation.

        Raises:
            InputError: for labels that do not fit the samples, neither labels nor components, or a
                component of fewer than two samples.
        """
        if isinstance(batches, torch.Tensor | np.ndarray):
            batches = [batches]
        elif iter(batches) is batches:
            batches = list(batches)
        if labels is True:
            labels = getattr(batches, "labels", None)
            if labels is None:
                raise InputError("labels=True, but the data have no labels. Pass labels=[N] or components=.")
        if labels is None and components is None:
            raise InputError("a mixture is fitted by labels= or by components=; pass at least one of them.")
        gaussian = Gaussian.fit(batches) if gaussian is None else gaussian
        variances = gaussian.eigenvalues
        p = int((variances > 0.01 * float(variances[0])).sum()) if leading is None else int(leading)
        p = min(p, 64) if leading is None else p
        if not 1 <= p <= gaussian.eigenvectors.shape[1]:
            raise InputError(f"{p} principal components; expected 1 to {gaussian.eigenvectors.shape[1]}.")
        a = _coordinates(gaussian, batches, p)
        code, classes = _groups(a, labels, components, seed)
        low = 0.5 * math.sqrt(max(float(variances[0]) - 1.0, 0.25 * float(variances[0])))
        at = low if sigma is None else float(sigma)
        n0 = _cross_validated(a * _signs(gaussian, p), code, at, seed) if prior is None else float(prior)
        inner = _shrunk(a, code, len(classes), n0)
        inner.classes = classes if labels is not None else None
        return cls(gaussian, inner, n0)

    def given(self, label: int) -> PrincipalMixture:
        """The law of one class: its components, and the Gaussian in all other modes."""
        return PrincipalMixture(self.gaussian, self.inner.given(label), self.prior)

    # The Gaussian does everything; in the leading coordinates the mixture's answer takes the place of its own.

    def _leading(self, x: torch.Tensor, centred: bool = False) -> torch.Tensor:
        """Leading coordinates of x - mu, padded with zeros: [B, P']."""
        flat = flatten(x, self.shape)
        return (flat if centred else flat - self.gaussian.moments.mean.reshape(-1).to(x)) @ self._basis.like(x)[0]

    def _variances(self, x: torch.Tensor) -> torch.Tensor:
        """Leading eigenvalues [P], float64 on the device of x."""
        return self.gaussian.eigenvalues[: self.leading].to(x.device)

    def _corrected(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """x + V by, for coordinates [B, P] or padded ones."""
        (axes,) = self._basis.like(x)
        padded = torch.nn.functional.pad(by.to(x.dtype), (0, axes.shape[1] - by.shape[1]))
        return x + (padded @ axes.T).reshape(x.shape)

    # The law

    def denoise(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """E[x_0 | x_0 + sigma eps = x], [B, *S]; sigma a float or [B]."""
        s = level(sigma, x)
        z, lam = self._leading(x)[:, : self.leading], self._variances(x)
        own = lam / (lam + column(s * s)) * z
        return self._corrected(self.gaussian.denoise(x, s), self.inner.denoise(z, s) - own)

    def score(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Gradient of `log_prob`, [B, *S]."""
        s = level(sigma, x)
        z, lam = self._leading(x)[:, : self.leading], self._variances(x)
        return self._corrected(self.gaussian.score(x, s), self.inner.score(z, s) + z / (lam + column(s * s)))

    def log_prob(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """log density of x_0 + sigma eps at x, [B], nats, float64."""
        s = level(sigma, x)
        wide = x.double()
        z, lam = self._leading(wide)[:, : self.leading], self._variances(wide)
        total = lam + column(s * s)
        own = -0.5 * ((z * z / total).sum(-1) + total.log().sum(-1) + self.leading * math.log(2 * math.pi))
        return self.gaussian.log_prob(wide, s) - own + self.inner.log_prob(z, s)

    def sample(self, n: int, sigma: float = 0.0, generator: torch.Generator | None = None) -> torch.Tensor:
        """n draws [n, *S] float64 of x_0 + sigma eps."""
        g = fresh(generator)
        x = self.gaussian.sample(n, sigma, g)
        return self._corrected(x, self.inner.sample(n, sigma, g) - self._leading(x)[:, : self.leading])

    def posterior_covariance(self, x: torch.Tensor, v: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Cov(x_0 | x_0 + sigma eps = x) v, [B, *S], for v of the shape of x."""
        s = level(sigma, x)
        z, lam = self._leading(x)[:, : self.leading], self._variances(x)
        u = self._leading(v, centred=True)[:, : self.leading]
        s2 = column(s * s)
        own = lam * s2 / (lam + s2) * u
        return self._corrected(
            self.gaussian.posterior_covariance(x, v, s), self.inner.posterior_covariance(z, u, s) - own
        )

    def certificate(self, sigma: float) -> Certificate:
        """What the truncation of the Gaussian loses at a level; 0 for a full one."""
        return self.gaussian.certificate(sigma)

    def transport(
        self,
        noise: torch.Tensor,
        sigma: float,
        sigma_from: float | None = None,
        steps: int = 3,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Carry noise along the law's probability flow to level sigma, deterministically.

        As `Mixture.transport`, in the leading coordinates only; the others follow the Gaussian's closed form. In
        these coordinates the flow is smooth: 3 Runge-Kutta steps, 12 slopes, leave a squared error far below what
        a law costs (``docs/choosing-a-start.md``).
        """
        start = first_level(sigma, sigma_from, steps)
        log_pi = self.inner.log_weights(labels, len(noise)).to(noise)
        moved = self.gaussian.transport(noise, sigma, sigma_from)
        z = self._leading(noise, centred=math.isinf(start))  # pure noise has no mean to take off
        return self._corrected(moved, self._flow(z, start, float(sigma), steps, log_pi) - self._leading(moved))

    def _flow(self, z: torch.Tensor, start: float, end: float, steps: int, log_pi: torch.Tensor) -> torch.Tensor:
        """Padded leading coordinates [B, P']: white noise, or states at ``start``, to states at ``end``."""
        lam = self.gaussian.eigenvalues[: self.leading]
        c = max(math.sqrt(float(lam[0])), 1e-12 * end)
        key = (start, end, steps, z.dtype, z.device)
        if key not in self._tables:
            while len(self._tables) >= TABLES:
                self._tables.pop(next(iter(self._tables)))
            with torch.inference_mode(False):  # tables made while sampling serve gradients too
                self._tables[key] = [_Stage(self.inner, lam, s, c, z) for s in path(start, end, c, steps)]
        stages = self._tables[key]
        g = z if math.isinf(start) else z / stages[0].radius
        g = runge_kutta(lambda g, i: stages[i].slope(g, log_pi), g, path(start, end, c, steps), c)
        return stages[-1].radius * g

    def __repr__(self) -> str:
        kind = "clusters" if self.classes is None else "components in classes"
        return f"PrincipalMixture({self.inner.components} {kind}, {self.leading} modes, shape={self.shape})"


class _Stage:
    """Everything that the slope of the flow needs at one level, in the dtype of the states."""

    def __init__(self, inner: Mixture, lam: torch.Tensor, sigma: float, c: float, like: torch.Tensor) -> None:
        means, vectors, values, floor = inner.means, inner.vectors, inner.eigenvalues, inner.floor
        self.sigma = sigma
        extra = like.shape[1] - inner.dim

        def kept(values: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
            padded = torch.nn.functional.pad(values, (0, extra), value=fill)
            return padded.to(like.device, like.dtype)

        if math.isinf(sigma):
            # (D_Gauss - D_mixture) / radius (sigma + c) / c -> - mean of the mixture / c
            self.end = kept(means / -c)
            return
        s2 = sigma * sigma
        outside = 1.0 / (floor + s2)
        inside = 1.0 / (values + s2) - outside[:, None]
        eye = torch.eye(inner.dim, dtype=torch.float64)
        precision = (vectors * inside[:, None]) @ vectors.mT + outside[:, None, None] * eye  # [K, P, P]
        log_det = (values + s2).log().sum(1) + (inner.dim - values.shape[1]) * (floor + s2).log()
        shift = (precision @ means[:, :, None])[:, :, 0]
        rows = torch.nn.functional.pad(precision, (0, 0, 0, extra)).permute(1, 0, 2)
        self.precision = kept(rows).reshape(like.shape[1], -1)  # x @ this: [B, K P']
        self.shift = kept(shift)  # C_k^-1 mu_k
        # log density of a component at x, up to a constant: x.shift - 1/2 x.P x - this
        self.offset = (0.5 * (log_det + (means * shift).sum(1))).to(like.device, like.dtype)
        self.radius = kept((lam + s2).sqrt(), 1.0)
        self.gauss = kept(1.0 / (lam + s2))
        self.factor = kept(s2 * (sigma + c) / c / (lam + s2).sqrt())

    def slope(self, g: torch.Tensor, log_pi: torch.Tensor) -> torch.Tensor:
        """dg / da [B, P]; ``log_pi`` [B, K] or [1, K] are the log weights of the components."""
        if math.isinf(self.sigma):
            return torch.softmax(log_pi, dim=1) @ self.end + torch.zeros_like(g)
        x = g * self.radius
        y = (x @ self.precision).reshape(len(x), *self.shift.shape)  # C_k^-1 x: the one large array, read twice
        quadratic = (y * x[:, None]).sum(-1)  # 3 times faster than 256 products of a matrix and a vector
        w = torch.softmax(log_pi - self.offset + x @ self.shift.T - 0.5 * quadratic, dim=1)
        pull = torch.bmm(w[:, None], y)[:, 0] - w @ self.shift
        return self.factor * (pull - self.gauss * x)


def _signs(gaussian: Gaussian, p: int) -> torch.Tensor:
    """Signs [p] that make the largest entry of every eigenvector positive: last bits of a covariance decide nothing."""
    axes = gaussian.eigenvectors[:, :p]
    return axes.gather(0, axes.abs().argmax(0, keepdim=True))[0].sign().double()


def _coordinates(gaussian: Gaussian, batches: Iterable[Any], p: int) -> torch.Tensor:
    """Leading principal coordinates [N, p] float64 of all samples, batch by batch; ranks share a data set."""
    axes, parts = gaussian.eigenvectors[:, :p], []
    mean = gaussian.moments.mean.reshape(-1)
    size = max(1, min(256, PIECE // math.prod(gaussian.shape)))
    own, _, shared = own_rows(batches, size)
    tensors = (b if isinstance(b, torch.Tensor) else torch.as_tensor(np.asarray(b)) for b in own)
    # Products of one size: a row's last bits depend neither on its batch nor on the rank that made it.
    for block, count in padded_blocks(tensors, size):
        # The digits of the eigenvectors: those of a sketch are float32, and a wider copy could fill the memory.
        rows = flatten(block.float() if block.dtype not in (torch.float32, torch.float64) else block, gaussian.shape)
        if not bool(torch.isfinite(rows).all()):
            raise InputError("the samples hold NaN or infinity; expected finite numbers.")
        parts.append(((rows.to(axes.dtype) - mean.to(axes.dtype)) @ axes).double()[:count])
    found = from_each({"rows": torch.cat(parts).numpy()}, shared)
    return torch.from_numpy(np.concatenate([f["rows"] for f in found]))


def _groups(a: torch.Tensor, labels: Any, components: int | None, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Component [N] of every sample, and the class [K] of every component."""
    from sklearn.cluster import KMeans

    near = a[:, :20].numpy()
    if labels is None:
        y = torch.zeros(len(a), dtype=torch.int64)
    else:
        y = torch.as_tensor(np.asarray(torch.as_tensor(labels).cpu())).reshape(-1).long()
        if len(y) != len(a):
            raise InputError(f"{len(y):,} labels for {len(a):,} samples; expected one label a sample.")
    names = y.unique()
    wanted = len(names) if components is None else int(components)
    if not len(names) <= wanted <= len(a) // 2:
        raise InputError(
            f"{wanted} components for {len(a):,} samples of {len(names)} classes; expected at least one a class, "
            "and at most one for two samples."
        )
    code, classes, used = torch.zeros(len(a), dtype=torch.int64), [], 0
    for i, name in enumerate(names.tolist()):
        rows = (y == name).nonzero()[:, 0]
        # Clusters are shared out by size, rounded so that their sum is what was asked for.
        before = int((y[:, None] == names[:i]).sum()) if i else 0
        spare = wanted - len(names)
        k = 1 + round(spare * (before + len(rows)) / len(a)) - round(spare * before / len(a))
        k = max(1, min(k, len(rows) // 2))
        if len(rows) < 2:
            raise InputError(f"class {name} has {len(rows)} sample; at least 2 are needed. Drop it.")
        own = torch.zeros(len(rows), dtype=torch.int64)
        if k > 1:
            own = torch.as_tensor(KMeans(k, random_state=seed, n_init=4).fit_predict(near[rows])).long()
        code[rows] = used + own
        classes += [name] * k
        used += k
    return code, torch.tensor(classes)


def _shrunk(a: torch.Tensor, code: torch.Tensor, k: int, prior: float) -> Mixture:
    """The mixture of components with covariances shrunk to the pooled one."""
    counts = torch.bincount(code, minlength=k).double()
    means = torch.zeros(k, a.shape[1], dtype=torch.float64).index_add_(0, code, a) / counts.clamp_min(1)[:, None]
    y = a - means[code]
    scatter = torch.stack([y[code == i].T @ y[code == i] for i in range(k)])
    pooled = scatter.sum(0) / max(1, len(a) - k)
    covariance = (scatter + prior * pooled) / ((counts - 1).clamp_min(0) + prior)[:, None, None]
    law = Mixture.from_parameters(means, covariance, counts / len(a))
    law.count = len(a)
    return law


def _cross_validated(a: torch.Tensor, code: torch.Tensor, sigma: float, seed: int) -> float:
    """The prior count with the largest noised log-likelihood of samples left out."""
    order = torch.randperm(len(a), generator=generator(seed, 5))
    k = int(code.max()) + 1
    total = torch.zeros(len(PRIORS), dtype=torch.float64)
    eps = torch.randn(a.shape, generator=generator(seed, 6), dtype=torch.float64)
    for fold in range(FOLDS):
        out = order[fold::FOLDS]
        kept = torch.ones(len(a), dtype=torch.bool)
        kept[out] = False
        # A component that a fold leaves without samples has weight 0 there.
        looked = out[: VALIDATED // FOLDS]
        x = a[looked] + sigma * eps[looked]
        for i, prior in enumerate(PRIORS):
            total[i] += _shrunk(a[kept], code[kept], k, prior).log_prob(x, sigma).sum()
    return PRIORS[int(total.argmax())]
