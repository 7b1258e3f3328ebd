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

import numpy as np
import torch
from numpy.typing import ArrayLike

from symbreak.laws.clusters import coordinates, kmeans, labelled
from symbreak.laws.gaussian import Gaussian
from symbreak.laws.law import ExactLaw, FlowPath, flatten, fresh
from symbreak.laws.mixture import Mixture
from symbreak.moments.covariance import Parameters, posterior, shrink, solve
from symbreak.moments.low_rank import Batches, Certificate
from symbreak.moments.one_pass import LowRankMoments, Moments
from symbreak.noise import generator
from symbreak.runtime.files import InputError

__all__ = ["PrincipalMixture", "refitted"]

PRIORS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
FOLDS = 5
VALIDATED = 4000  # samples that cross-validation looks at
TABLES = 4  # sets of matrices of the flow that are kept
# Products of one row with a matrix peel off what is not aligned in memory, so their last bit would depend on the
# row's place in the batch: coordinates are padded with zeros to a multiple of this.
ALIGNED = 16


class PrincipalMixture(ExactLaw):
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
        self.leading = inner.dim
        self._tables: dict[tuple[object, ...], list[_Stage]] = {}
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
        batches: Batches,
        labels: ArrayLike | None = None,
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
        batches, labels = labelled(batches, labels)
        if labels is None and components is None:
            raise InputError("a mixture is fitted by labels= or by components=; pass at least one of them.")
        gaussian = Gaussian.fit(batches) if gaussian is None else gaussian
        variances = gaussian.eigenvalues
        p = int((variances > 0.01 * float(variances[0])).sum()) if leading is None else int(leading)
        p = min(p, 64) if leading is None else p
        if not 1 <= p <= gaussian.eigenvectors.shape[1]:
            raise InputError(f"{p} principal components; expected 1 to {gaussian.eigenvectors.shape[1]}.")
        a = coordinates(batches, gaussian.moments.mean, gaussian.eigenvectors[:, :p])
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

    def _leading(self, flat: torch.Tensor, centred: bool = False) -> torch.Tensor:
        """Leading coordinates of rows x - mu, padded with zeros: [B, P']."""
        return (flat if centred else flat - self.moments.mean.reshape(-1).to(flat)) @ self._basis.like(flat)[0]

    def _modes(self, flat: torch.Tensor, centred: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Leading coordinates [B, P], and the Gaussian's variances along them [P] float64."""
        coordinates = self._leading(flat, centred)[:, : self.leading]
        return coordinates, self.gaussian.eigenvalues[: self.leading].to(flat.device)

    def _corrected(self, flat: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """x + V by, for coordinates [B, P] or padded ones."""
        (axes,) = self._basis.like(flat)
        return flat + torch.nn.functional.pad(by.to(flat.dtype), (0, axes.shape[1] - by.shape[1])) @ axes.T

    def _denoise(self, flat: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        z, lam = self._modes(flat)
        by = self.inner._denoise(z, s2).to(z.dtype) - shrink(lam, s2) * z
        return self._corrected(self.gaussian._denoise(flat, s2), by)

    def _score(self, flat: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        z, lam = self._modes(flat)
        by = self.inner._score(z, s2).to(z.dtype) + z / (lam + s2)
        return self._corrected(self.gaussian._score(flat, s2), by)

    def _log_prob(self, flat: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        wide = flat.double()
        z, lam = self._modes(wide)
        total = lam + s2
        leading = -0.5 * ((z * z / total).sum(-1) + total.log().sum(-1) + self.leading * math.log(2 * math.pi))
        return self.gaussian._log_prob(wide, s2) - leading + self.inner._log_prob(z, s2)

    def sample(self, n: int, sigma: float = 0.0, generator: torch.Generator | None = None) -> torch.Tensor:
        """n draws [n, *S] float64 of x_0 + sigma eps."""
        g = fresh(generator)
        x = self.gaussian.sample(n, sigma, g)
        flat = x.reshape(n, -1)
        return self._corrected(flat, self.inner.sample(n, sigma, g) - self._modes(flat)[0]).reshape(x.shape)

    def _covary(self, flat: torch.Tensor, v: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        (z, lam), (u, _) = self._modes(flat), self._modes(v.to(flat.dtype), centred=True)
        by = self.inner._covary(z, u, s2).to(z.dtype) - posterior(lam, s2) * u
        return self._corrected(self.gaussian._covary(flat, v, s2), by)

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
        lam = self.gaussian.eigenvalues[: self.leading]
        flow = FlowPath(sigma, sigma_from, max(math.sqrt(float(lam[0])), 1e-12 * float(sigma)), steps)
        log_pi = self.inner.log_weights(labels, len(noise)).to(noise)
        moved = flatten(self.gaussian.transport(noise, sigma, sigma_from), self.shape)
        z = self._leading(
            noise.reshape(moved.shape), centred=math.isinf(flow.start)
        )  # pure noise has no mean to take off
        key = (flow.start, flow.end, steps, z.dtype, z.device)
        if key not in self._tables:
            while len(self._tables) >= TABLES:
                self._tables.pop(next(iter(self._tables)))
            with torch.inference_mode(False):  # tables made while sampling serve gradients too
                self._tables[key] = [_Stage(self.inner, lam, s, flow.c, z) for s in flow.sigmas]
        stages = self._tables[key]
        g = flow.carry(lambda g, i: stages[i].slope(g, log_pi), z if math.isinf(flow.start) else z / stages[0].radius)
        return self._corrected(moved, stages[-1].radius * g - self._leading(moved)).reshape(noise.shape)

    def __repr__(self) -> str:
        kind = "clusters" if self.classes is None else "components in classes"
        return f"PrincipalMixture({self.inner.components} {kind}, {self.leading} modes, shape={self.shape})"


class _Stage:
    """Everything that the slope of the flow needs at one level, in the dtype of the states."""

    def __init__(self, inner: Mixture, lam: torch.Tensor, sigma: float, c: float, like: torch.Tensor) -> None:
        means, covariance = inner.means, inner.covariance
        self.sigma = sigma
        extra = like.shape[1] - inner.dim

        def padded(values: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
            return torch.nn.functional.pad(values, (0, extra), value=fill).to(like.device, like.dtype)

        if math.isinf(sigma):
            # (D_Gauss - D_mixture) / radius (sigma + c) / c -> - mean of the mixture / c
            self.end = padded(means / -c)
            return
        s2 = sigma * sigma
        precision = covariance.dense(solve, s2)  # [K, P, P]
        outside = (covariance.floor + s2).log()
        log_det = (covariance.values + s2).log().sum(1) + (inner.dim - covariance.rank) * outside
        shift = (precision @ means[:, :, None])[:, :, 0]
        rows = torch.nn.functional.pad(precision, (0, 0, 0, extra)).permute(1, 0, 2)
        self.precision = padded(rows).reshape(like.shape[1], -1)  # x @ this: [B, K P']
        self.shift = padded(shift)  # C_k^-1 mu_k
        # log density of a component at x, up to a constant: x.shift - 1/2 x.P x - this
        self.offset = (0.5 * (log_det + (means * shift).sum(1))).to(like.device, like.dtype)
        self.radius = padded((lam + s2).sqrt(), 1.0)
        self.gauss = padded(1.0 / (lam + s2))
        self.factor = padded(s2 * (sigma + c) / c / (lam + s2).sqrt())

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


def refitted(inner: Mixture, samples: int, prior: float, clustered: bool, seed: int) -> Mixture:
    """A mixture in leading components fitted to n draws of itself: what fitting alone gets wrong.

    Args:
        inner: of a `PrincipalMixture`, whose ``prior`` it was shrunk with.
        samples: n.
        prior: as there.
        clustered: whether components are clusters, which the draws have to be sorted into.
        seed: of the draws and of the clustering.
    """
    a, code = inner.sample_labelled(samples, 0.0, generator(seed, 31))
    if clustered:
        code = _groups(a, None, inner.components, seed)[0]
    return _shrunk(a, code, inner.components, prior)


def _signs(gaussian: Gaussian, p: int) -> torch.Tensor:
    """Signs [p] that make the largest entry of every eigenvector positive: last bits of a covariance decide nothing."""
    axes = gaussian.eigenvectors[:, :p]
    return axes.gather(0, axes.abs().argmax(0, keepdim=True))[0].sign().double()


def _groups(
    a: torch.Tensor, labels: np.ndarray | None, components: int | None, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Component [N] of every sample, and the class [K] of every component."""
    y = torch.zeros(len(a), dtype=torch.int64) if labels is None else torch.as_tensor(labels).long()
    if len(y) != len(a):
        raise InputError(f"{len(y):,} labels for {len(a):,} samples; expected one label a sample.")
    names, counts = y.unique(return_counts=True)
    wanted = len(names) if components is None else int(components)
    if not len(names) <= wanted <= len(a) // 2:
        raise InputError(
            f"{wanted} components for {len(a):,} samples of {len(names)} classes; expected at least one a class, "
            "and at most one for two samples."
        )
    code, before = torch.zeros(len(a), dtype=torch.int64), 0
    classes: list[int] = []
    for name, count in zip(names.tolist(), counts.tolist()):
        if count < 2:
            raise InputError(f"class {name} has {count} sample; at least 2 are needed. Drop it.")
        # Clusters are shared out by size, rounded so that their sum is the requested number.
        spare = wanted - len(names)
        k = 1 + round(spare * (before + count) / len(a)) - round(spare * before / len(a))
        k = max(1, min(k, count // 2))
        rows = y == name
        cluster = torch.zeros(count, dtype=torch.int64)
        if k > 1:
            cluster = torch.as_tensor(kmeans(a[rows, :20].numpy(), k, seed).labels_).long()
        code[rows] = len(classes) + cluster
        classes += [name] * k
        before += count
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
        rest = torch.ones(len(a), dtype=torch.bool)
        rest[out] = False
        # A component that a fold leaves without samples has weight 0 there.
        looked = out[: VALIDATED // FOLDS]
        x = a[looked] + sigma * eps[looked]
        for i, prior in enumerate(PRIORS):
            total[i] += _shrunk(a[rest], code[rest], k, prior).log_prob(x, sigma).sum()
    return PRIORS[int(total.argmax())]
