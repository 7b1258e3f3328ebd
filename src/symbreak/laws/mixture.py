"""A mixture of Gaussians under noise: one component a class or a cluster, everything in closed form.

With component k of weight pi_k, mean mu_k and covariance Q_k L_k Q_k^T, the noised mixture is a mixture of
N(mu_k, Q_k (L_k + sigma^2) Q_k^T), and with w_k(x) its posterior weights and D_k, C_k the posterior mean
and covariance of each component,

    D(x) = sum_k w_k D_k        Cov(x_0 | x) = sum_k w_k (C_k + (D_k - D)(D_k - D)^T).

Every component is diagonalised once, so any noise level is cheap. A component is stored by its leading
eigenvectors Q_k [d, r], their eigenvalues and one variance for all other directions (``floor``): r = d is
a full covariance, r = 0 an isotropic one, and floor 0 with r = 0 a single point. Log weights are float64
whatever the dtype of x: at small sigma they are small differences of large numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import ArrayLike

from symbreak.laws.clusters import clustered, labelled
from symbreak.laws.law import ExactLaw, fresh, top_eigenvalue
from symbreak.moments.covariance import (
    Covariance,
    Parameters,
    eigendecomposed,
    posterior,
    root,
    shrink,
    solve,
    symmetric,
    variance,
)
from symbreak.moments.low_rank import Batches, Certificate, truncation_bound
from symbreak.moments.one_pass import Moments, grouped
from symbreak.runtime.files import InputError

__all__ = ["Mixture"]

CHUNK = 2**25  # numbers [components, B, d] held at a time
EPSILON = float(np.finfo(np.float64).eps)
KINDS = ("full", "low-rank", "isotropic")


class Mixture(ExactLaw):
    """A mixture of Gaussians.

    Args:
        moments: `Moments` of each component, all of one sample shape [*S].
        weights: probabilities [K] of the components; by default in proportion to the moments' counts.

    Raises:
        InputError: for weights that are negative or do not sum to one, for shapes that differ, and for a
            covariance that is not positive semidefinite (it names the eigenvalue).

    >>> law = Mixture.from_parameters([[-1.0], [1.0]], [0.0, 0.0])
    >>> round(law.denoise(torch.tensor([[0.5]]), sigma=1.0).item(), 6)  # tanh(x / sigma^2)
    0.462117
    """

    def __init__(self, moments: Sequence[Moments], weights: ArrayLike | None = None) -> None:
        moments = list(moments)
        if not moments:
            raise InputError("a mixture of no components; expected at least one `Moments`.")
        shapes = {m.shape for m in moments}
        if len(shapes) > 1:
            raise InputError(f"components of the shapes {sorted(shapes)}; expected one shape.")
        if weights is None:
            counts = torch.tensor([float(m.count) for m in moments], dtype=torch.float64)
            weights = counts / counts.sum()
        d = moments[0].dim
        ranks = []
        for m in moments:
            values = m.eigh[0]
            ranks.append(int((values > 1e-13 * max(float(values[0]), 1e-300)).sum()))
        # Fewer samples than dimensions leave null directions; storing them pays only where they are few.
        r = d if 2 * max(ranks) > d else max(ranks)
        vectors, values = (torch.stack([m.eigh[i][..., :r] for m in moments]) for i in (1, 0))
        self._set(
            moments[0].shape,
            torch.stack([m.mean.reshape(-1) for m in moments]),
            Covariance(vectors, values, torch.zeros(len(moments), dtype=torch.float64)),
            weights,
            sum(m.count for m in moments),
        )

    def _set(
        self,
        shape: tuple[int, ...],
        means: torch.Tensor,
        covariance: Covariance,
        weights: ArrayLike,
        count: int,
        classes: torch.Tensor | None = None,
    ) -> None:
        pi = torch.as_tensor(weights, dtype=torch.float64).reshape(-1).cpu()
        if len(pi) != len(means):
            raise InputError(f"{len(pi)} weights for {len(means)} components; expected one each.")
        if not bool(torch.isfinite(pi).all()) or bool((pi < 0).any()):
            raise InputError(f"a weight is {float(pi.min()):g}; expected probabilities >= 0.")
        total = float(pi.sum())
        if abs(total - 1.0) > 1e-6:
            raise InputError(f"the weights sum to {total:.8g}; expected 1. Divide them by their sum.")
        if not bool(torch.isfinite(means).all()):
            raise InputError("a mean holds NaN or infinity; expected finite numbers.")
        self.shape, self.count = tuple(shape), count
        self.means, self.covariance = means, covariance  # [K, d]
        self.vectors, self.eigenvalues, self.floor = covariance.vectors, covariance.values, covariance.floor
        self.classes = classes  # [K], the class each component belongs to
        self._dropped: torch.Tensor | None = None  # [K, d - r], the eigenvalues that `fit` left out
        self._weigh(pi / total)

    def _weigh(self, weights: torch.Tensor) -> None:
        """Take weights that sum to one as they are."""
        self.weights = weights
        self._parameters = Parameters(self.means, weights.log())

    @classmethod
    def from_parameters(
        cls,
        means: ArrayLike,
        covariances: ArrayLike | tuple[ArrayLike, ArrayLike, ArrayLike],
        weights: ArrayLike | None = None,
    ) -> Mixture:
        """A mixture given by its parameters.

        Args:
            means: [K, *S].
            covariances: full [K, d, d]; or isotropic variances, a number, [K] or [K, 1] (0 makes a
                component a point); or low rank ``(vectors [K, d, r], eigenvalues [K, r], floor [K])`` with
                orthonormal columns: variance ``eigenvalues`` along them, ``floor`` in all other directions.
            weights: probabilities [K]; by default equal.

        Raises:
            InputError: for shapes that do not fit, weights that are no probabilities, or a covariance that
                is not positive semidefinite (it names the eigenvalue).
        """
        mu = torch.as_tensor(means, dtype=torch.float64).detach().cpu()
        if mu.ndim < 2 or mu.numel() == 0:
            raise InputError(f"means of shape {tuple(mu.shape)}; expected [K, *S] with at least one component.")
        k, shape = len(mu), tuple(mu.shape[1:])
        flat = mu.reshape(k, -1)
        d = flat.shape[1]
        if isinstance(covariances, tuple):
            if len(covariances) != 3:
                raise InputError(f"{len(covariances)} covariance factors; expected (vectors, eigenvalues, floor).")
            q, values, floor = (torch.as_tensor(c, dtype=torch.float64).detach().cpu() for c in covariances)
            floor = floor.expand(k) if floor.ndim == 0 else floor.reshape(-1)
            if q.ndim != 3 or q.shape[:2] != (k, d) or values.shape != (k, q.shape[2]) or len(floor) != k:
                raise InputError(
                    f"low-rank factors of {tuple(q.shape)}, {tuple(values.shape)}, {tuple(floor.shape)} "
                    f"for {k} means of {d} elements; expected [{k}, {d}, r], [{k}, r], [{k}]."
                )
            gap = (q.mT @ q - torch.eye(q.shape[2], dtype=torch.float64)).abs()
            if gap.numel() and float(gap.max()) > 1e-8:
                raise InputError("the low-rank vectors are not orthonormal. Pass the Q of a QR or eigendecomposition.")
        else:
            c = torch.as_tensor(covariances, dtype=torch.float64).detach().cpu()
            if c.ndim == 3:
                if c.shape != (k, d, d):
                    raise InputError(f"covariances of shape {tuple(c.shape)}; expected ({k}, {d}, {d}).")
                names = [f"covariance {i}" for i in range(k)]
                pairs = [eigendecomposed(symmetric(one, name), name) for one, name in zip(c.numpy(), names)]
                values, q = (torch.stack(parts) for parts in zip(*pairs))
                floor = torch.zeros(k, dtype=torch.float64)
            else:
                floor = c.expand(k) if c.ndim == 0 else c.reshape(-1)
                if c.ndim > 2 or (c.ndim == 2 and c.shape[1] != 1) or len(floor) != k:
                    raise InputError(
                        f"covariances of shape {tuple(c.shape)} for {k} means of {d} elements; expected "
                        f"[{k}, {d}, {d}], [{k}], or (vectors, eigenvalues, floor)."
                    )
                q, values = torch.zeros(k, d, 0, dtype=torch.float64), torch.zeros(k, 0, dtype=torch.float64)
        for name, v in (("eigenvalue", values), ("variance", floor)):
            if v.numel() and not float(v.min()) >= 0:
                raise InputError(f"a covariance has the {name} {float(v.min()):.3g}; expected numbers >= 0.")
        if weights is None:
            weights = torch.full((k,), 1.0 / k, dtype=torch.float64)
        self = cls.__new__(cls)
        self._set(shape, flat, Covariance(q, values, floor.clone()), weights, max(2, k))
        return self

    @classmethod
    def fit(
        cls,
        batches: Batches,
        labels: ArrayLike | None = None,
        components: int | None = None,
        rank: int | None = None,
        kind: str = "full",
        seed: int = 0,
        method: str = "k-means",
        leading: int = 32,
    ) -> Mixture:
        """One Gaussian a class, or a cluster; weights are the shares of the samples.

        Args:
            batches: `Images`, a tensor [N, *S], or an iterable of batches [B, *S]. With ``components`` it is
                walked three times.
            labels: class of every sample in order, [N] integers; ``True`` takes ``batches.labels``.
            components: number of clusters, moments by scikit-learn on the leading principal components.
            rank: eigenvectors kept a component, the mean of the other eigenvalues becoming the variance
                of all other directions; implies ``kind="low-rank"``.
            kind: ``"full"``, ``"low-rank"`` (needs ``rank``) or ``"isotropic"`` covariances.
            seed: of the clustering.
            method: ``"k-means"``, or ``"em"`` for a Gaussian mixture on the principal components, whose most
                probable component a sample is then counted to.
            leading: principal components used for clustering.

        Raises:
            InputError: for labels that do not fit the samples, a class of fewer than two samples, or both or
                neither of ``labels`` and ``components``.
        """
        if kind not in KINDS:
            raise InputError(f"unknown kind {kind!r}. Known: {', '.join(KINDS)}.")
        if kind == "low-rank" and rank is None:
            raise InputError("kind='low-rank' came without a rank. Pass rank=, the eigenvectors to keep.")
        if rank is not None and rank < 1:
            raise InputError(f"rank is {rank}; expected at least 1.")
        if (labels is not None and labels is not False) == (components is not None):
            raise InputError("a mixture is fitted by labels= or by components=; pass one of them.")
        batches, y = labelled(batches, labels)
        if components is not None:
            y = clustered(batches, components, seed, method, leading)
        classes, code, counts = np.unique(np.asarray(y), return_inverse=True, return_counts=True)
        if counts.min() < 2:
            raise InputError(
                f"class {classes[counts.argmin()]} has {counts.min()} sample; at least 2 are needed. Drop it, or "
                "ask for fewer components."
            )
        moments = grouped(batches, code)
        means = torch.stack([m.mean for m in moments])
        largest = float((means - means.mean(0)).square().max())  # to which sums of squares are rounded
        for label, m in zip(classes, moments):
            if not float(m.cov.diagonal().max()) > 64 * EPSILON * largest:
                raise InputError(
                    f"all {m.count:,} samples of class {label} are equal; they have no spread to learn from."
                )
        law = cls(moments)
        law.classes = torch.as_tensor(classes).long() if components is None else None
        r = 0 if kind == "isotropic" else rank
        if r is not None and r < law.dim:
            vectors, values = (torch.stack([m.eigh[i] for m in moments]) for i in (1, 0))
            covariance = Covariance(vectors[..., :r].contiguous(), values[:, :r], values[:, r:].mean(1))
            law._set(law.shape, law.means, covariance, law.weights, law.count, law.classes)
            law._dropped = values[:, r:] if r else None
        return law

    def log_weights(self, labels: ArrayLike | None, batch: int) -> torch.Tensor:
        """Log weights of the components, [1, K], or [B, K] given the class [B] of every sample.

        Raises:
            InputError: for labels of a mixture without classes, of another number, or of no class of it.
        """
        if labels is None:
            return self.weights.log()[None]
        if self.classes is None:
            raise InputError("labels for a mixture without classes. Fit it with labels=, or leave labels out.")
        y = torch.as_tensor(labels).reshape(-1).cpu()
        if len(y) != batch:
            raise InputError(f"{len(y)} labels for {batch} samples; expected one each.")
        inside = y[:, None] == self.classes
        bad = y[~inside.any(1)]
        if len(bad):
            known = ", ".join(str(c) for c in self.classes.unique().tolist()[:20])
            raise InputError(f"label {int(bad[0])} is no class of this mixture. Known: {known}.")
        return torch.where(inside, self.weights.log(), -math.inf).log_softmax(1)

    def given(self, label: int) -> Mixture:
        """The law of one class: its components, weights summing to one."""
        return self.restricted(torch.isfinite(self.log_weights([label], 1)[0]))

    def restricted(self, chosen: torch.Tensor) -> Mixture:
        """The mixture of some components, numbers [k] or a mask [K], weights summing to one."""
        law, pi = type(self).__new__(type(self)), self.weights[chosen]
        covariance = Covariance(self.vectors[chosen], self.eigenvalues[chosen], self.floor[chosen])
        classes = None if self.classes is None else self.classes[chosen]
        law._set(self.shape, self.means[chosen], covariance, pi / pi.sum(), self.count, classes)
        return law

    @property
    def components(self) -> int:
        """Number of components K."""
        return len(self.means)

    @property
    def membership(self) -> torch.Tensor:
        """Which component belongs to which class, in the order of their numbers: [K, C] of 0 and 1, float64.

        Without classes every component is a class.
        """
        k = self.components
        code = torch.arange(k) if self.classes is None else self.classes.unique(return_inverse=True)[1]
        return torch.nn.functional.one_hot(code).double()

    @property
    def class_weights(self) -> torch.Tensor:
        """Probabilities [C] of the classes."""
        return self.weights @ self.membership

    def certificate(self, sigma: float) -> Certificate | None:
        """What ``fit(rank=)`` loses at a level against the mixture of full covariances; ``None`` for other mixtures.

        KL is convex in both laws, so the components' truncation bounds are averaged by weight.
        """
        if self._dropped is None:
            return None
        total, modes = self._dropped.sum(1), self._dropped.shape[1]
        nats = 0.0
        for pi, values, r, f in zip(self.weights, self._dropped, total, self.floor):
            mean = float((values**2).sum() / r) if r > 0 else 0.0
            nats += float(pi) * truncation_bound(float(r), mean, sigma, float(f), modes)
        largest, left = float(self._dropped.max()), float(self.weights @ total)
        return Certificate(nats, float(sigma), self.dim - modes, modes, left, largest, self.count, 0.0)

    @cached_property
    def _centre(self) -> torch.Tensor:  # type: ignore[override]
        """Mean of the law [d]."""
        return self.weights @ self.means

    def _covariance(self, v: torch.Tensor) -> torch.Tensor:
        """Covariance of the law times v [n, d] float64."""
        gap = self.means - self._centre
        out = (v @ gap.T * self.weights) @ gap
        if self.covariance.rank == 0:
            return out + (self.weights @ self.floor) * v
        return out + sum(pi * self.covariance[k].apply(variance, pi, v) for k, pi in enumerate(self.weights))

    @cached_property
    def _scales(self) -> tuple[float, float]:  # type: ignore[override]
        """Mean variance and top standard deviation of the law."""
        between = ((self.means - self._centre) ** 2).sum(1)
        total = float(self.weights @ (self.covariance.trace() + between)) / self.dim
        return total, math.sqrt(top_eigenvalue(self._covariance, self.dim))

    @cached_property
    def moments(self) -> Moments:
        """Exact mean and covariance of the mixture (d x d)."""
        return Moments(
            max(2, self.count),
            self._centre.reshape(self.shape),
            self._covariance(torch.eye(self.dim, dtype=torch.float64)),
        )

    # Log weights and posterior means of the components

    def _chunks(self, x: torch.Tensor) -> Iterator[slice]:
        size = max(1, CHUNK // max(1, x.numel()))
        for start in range(0, self.components, size):
            yield slice(start, start + size)

    def _isotropic(self, flat: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        """log p_k(x) [B, K] of isotropic components, float64."""
        means, floor = self._parameters.like(flat, torch.float64)[0], self.covariance.like(flat).floor
        # Float64 products around the centre: |x|^2 - 2 x.m + |m|^2 loses 1e-16 of |x - centre|^2.
        c = self._centre.to(flat.device)
        y, m = flat.double() - c, means - c
        squares = (y * y).sum(1, keepdim=True) - 2.0 * (y @ m.T) + (m * m).sum(1)
        total = floor + s2
        return -0.5 * (squares / total + self.dim * (total.log() + math.log(2 * math.pi)))

    def _spectral(
        self, flat: torch.Tensor, s2: torch.Tensor, part: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of some components: log p_k(x) [k, B], y = x - mu_k [k, B, d] and Q^T y [k, B, r], float64."""
        covariance = self.covariance.like(flat, torch.float64)[part]
        y = flat.double() - self._parameters.like(flat, torch.float64)[0][part, None]
        z = covariance.coordinates(y)
        return covariance.log_density(y, s2, z), y, z

    def _pulls(
        self, flat: torch.Tensor, s2: torch.Tensor, part: slice, y: torch.Tensor, z: torch.Tensor, score: bool
    ) -> torch.Tensor:
        """Posterior mean, or score, of some components [k, B, d] in the dtype of x: sums without cancellation."""
        covariance = self.covariance.like(flat)[part]
        if score:
            return -covariance.apply(solve, s2, y, z, flat.dtype)
        return self._parameters.like(flat)[0][part, None] + covariance.apply(shrink, s2, y, z, flat.dtype)

    def component_log_prob(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """log density of each noised component at x, log p_sigma(x | k), [B, K] float64."""
        return self._log_components(*self._flat(x, sigma))

    def _log_components(self, flat: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        if self.covariance.rank == 0:
            return self._isotropic(flat, s2)
        return torch.cat([self._spectral(flat, s2, part)[0] for part in self._chunks(flat)]).T

    def _log_joint(self, flat: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        """log (pi_k p_k(x)) [B, K], float64."""
        return self._log_components(flat, s2) + self._parameters.like(flat, torch.float64)[1]

    def responsibilities(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Posterior probabilities of the components, p(k | x), [B, K] float64."""
        return torch.softmax(self._log_joint(*self._flat(x, sigma)), dim=1)

    def _log_prob(self, flat: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        return torch.logsumexp(self._log_joint(flat, s2), dim=1)

    def _denoise(self, flat: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        return self._average(flat, s2)[0]

    def _score(self, flat: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        return self._average(flat, s2, score=True)[0]

    def _average(self, flat: torch.Tensor, s2: torch.Tensor, score: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior mean, or score, [B, d], and log (pi_k p_k(x)) [B, K]."""
        if self.covariance.rank == 0:
            means, floor = self._parameters.like(flat, torch.float64)[0], self.covariance.like(flat).floor
            joint = self._log_joint(flat, s2)
            w = torch.softmax(joint, dim=1)
            pull, stay = w * ((1.0 if score else s2) / (floor + s2)), w * (floor / (floor + s2))
            return pull @ means + (-pull if score else stay).sum(1, keepdim=True) * flat.double(), joint
        # One pass over the components with a running maximum, so that memory does not grow with their number.
        log_pi = self._parameters.like(flat, torch.float64)[1]
        joints: list[torch.Tensor] = []
        top = weight = shift = None
        for part in self._chunks(flat):
            joint, y, z = self._spectral(flat, s2, part)
            joint = joint + log_pi[part, None]
            joints.append(joint)
            # A component of weight 0 has log weight -inf; the floor keeps -inf minus -inf away.
            highest = joint.detach().amax(0).clamp(min=-1e300)
            highest = highest if top is None else torch.maximum(top, highest)
            w = (joint - highest).exp()
            add = torch.einsum("kb,kbd->bd", w.to(flat.dtype), self._pulls(flat, s2, part, y, z, score))
            if top is None or weight is None or shift is None:
                weight, shift = w.sum(0), add
            else:
                rescale = (top - highest).exp()
                weight = weight * rescale + w.sum(0)
                shift = shift * rescale[:, None].to(flat.dtype) + add
            top = highest
        if weight is None or shift is None:
            raise RuntimeError("a mixture without components")
        return shift / weight[:, None].to(flat.dtype), torch.cat(joints).T

    def _covary(self, flat: torch.Tensor, v: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        u = v.to(flat.dtype)
        mean, joint = self._average(flat, s2)
        w = torch.softmax(joint, dim=1)
        if self.covariance.rank == 0:
            means, floor = self._parameters.like(flat, torch.float64)[0], self.covariance.like(flat).floor
            y, v64 = flat.double(), u.double()
            inside = (w * posterior(floor, s2)).sum(1, keepdim=True) * v64
            # Posterior means of the components are g_k mu_k + (1 - g_k) x, and t is v times them.
            g = s2 / (floor + s2)
            t = g * (v64 @ means.T) + (1 - g) * (y * v64).sum(1, keepdim=True)
            wt = w * (t - (w * t).sum(1, keepdim=True))
            # wt sums to 0 but for rounding, so the means may be counted from D, where little cancels.
            between = (wt * g) @ means + (wt * (1 - g)).sum(1, keepdim=True) * y
            return inside + between - wt.sum(1, keepdim=True) * mean
        out = torch.zeros_like(flat)
        for part in self._chunks(flat):
            _, y, z = self._spectral(flat, s2, part)
            gap = self._pulls(flat, s2, part, y, z, score=False) - mean
            share = w.T[part].to(flat.dtype)
            covered = self.covariance.like(flat)[part].apply(posterior, s2, u)
            out = out + torch.einsum("kb,kbd->bd", share, covered)
            out = out + torch.einsum("kb,kbd->bd", share * (gap * u).sum(-1), gap)
        return out

    def sample(
        self, n: int, sigma: float = 0.0, generator: torch.Generator | None = None, component: int | None = None
    ) -> torch.Tensor:
        """n draws of x_0 + sigma eps, [n, *S] float64; of one component only where it is given."""
        return self.sample_labelled(n, sigma, generator, component)[0]

    def sample_labelled(
        self, n: int, sigma: float = 0.0, generator: torch.Generator | None = None, component: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """n draws [n, *S] float64 of x_0 + sigma eps and the component [n] of each."""
        g = fresh(generator)
        if component is None:
            label = torch.multinomial(self.weights.to(g.device), n, replacement=True, generator=g)
        elif 0 <= component < self.components:
            label = torch.full((n,), int(component), device=g.device)
        else:
            raise InputError(
                f"component {component} of a mixture of {self.components}; expected 0 .. {self.components - 1}."
            )
        z = torch.randn(n, self.dim, generator=g, dtype=torch.float64, device=g.device)
        (means, _), covariance = self._parameters.like(z), self.covariance.like(z)
        s2 = torch.tensor(float(sigma) ** 2, dtype=torch.float64, device=g.device)
        if covariance.rank == 0:
            x = means[label] + root(covariance.floor[label], s2)[:, None] * z
        else:
            x = means[label]
            for k in label.unique().tolist():
                chosen = label == k
                x[chosen] += covariance[k].apply(root, s2, z[chosen])
        return x.reshape(n, *self.shape), label

    def transport(
        self,
        noise: torch.Tensor,
        sigma: float,
        sigma_from: float | None = None,
        steps: int = 48,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `ExactLaw.transport`; with ``labels``, the class [B] of every sample, each follows its class's flow."""
        if labels is None:
            return super().transport(noise, sigma, sigma_from, steps)
        self.log_weights(labels, len(noise))
        out = torch.zeros_like(noise)
        y = torch.as_tensor(labels).reshape(-1).cpu()
        for label in y.unique().tolist():
            # The whole batch for every class: no sample's bits depend on the classes of its neighbours.
            moved = self.given(label).transport(noise, sigma, sigma_from, steps)
            out[y == label] = moved[y == label]
        return out

    def __repr__(self) -> str:
        r = self.covariance.rank
        kind = "isotropic" if r == 0 else "full" if r == self.dim else f"rank {r}"
        return f"Mixture({self.components} {kind} components, shape={self.shape})"
