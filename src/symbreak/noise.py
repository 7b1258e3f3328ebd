"""Noise levels and schedules: one axis for every time.

A diffusion process writes x_t = alpha_t (x_0 + sigma eps), eps ~ N(0, I). The noise-to-signal
ratio ``sigma`` (EDM's sigma) is the coordinate that all formulas of this package share; the rest
are views of it:

    alpha-bar = 1 / (1 + sigma^2)        OU time tau = 1/2 log(1 + sigma^2)        log-SNR = -2 log sigma

``alpha`` only says in which frame a state lives: VP (variance preserving) has
alpha = 1 / sqrt(1 + sigma^2), VE (variance exploding) has alpha = 1, flow matching alpha = 1 - s.
A model's own time ``t`` (a DDPM step, 0-based) is a view through its `Schedule`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from symbreak.runtime.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = ["NoiseLevel", "Schedule", "generator", "schedule"]


@dataclass(frozen=True)
class NoiseLevel:
    """A noise level: x = alpha (x_0 + sigma eps).

    Args:
        sigma: noise-to-signal ratio, 0 <= sigma <= inf.
        alpha: scale of the state; ``None`` means variance preserving, 1 means variance exploding.

    Raises:
        ValueError: for a negative or undefined ``sigma`` or a negative ``alpha``.

    >>> level = NoiseLevel(1.0)
    >>> round(level.alpha_bar, 3), round(level.ou_time, 4), level.log_snr
    (0.5, 0.3466, -0.0)
    """

    sigma: float
    alpha: float = field(default=None)  # type: ignore[assignment]  # None -> VP, resolved below

    def __post_init__(self) -> None:
        sigma = float(self.sigma)
        if not sigma >= 0:
            raise ValueError(f"sigma is {sigma}; a noise-to-signal ratio is a number >= 0.")
        vp = 0.0 if math.isinf(sigma) else 1.0 / math.hypot(1.0, sigma)
        alpha = vp if self.alpha is None else float(self.alpha)
        if not alpha >= 0:
            raise ValueError(f"alpha is {alpha}; the scale of a state is a number >= 0.")
        object.__setattr__(self, "sigma", sigma)
        object.__setattr__(self, "alpha", alpha)

    @classmethod
    def from_ou_time(cls, tau: float) -> NoiseLevel:
        """The VP level at Ornstein-Uhlenbeck time tau: sigma^2 = exp(2 tau) - 1."""
        if not tau >= 0:
            raise ValueError(f"OU time is {tau}; it is a number >= 0.")
        return cls(math.sqrt(math.expm1(2.0 * tau)) if tau < 350 else math.inf)

    @classmethod
    def from_alpha_bar(cls, alpha_bar: float) -> NoiseLevel:
        """The VP level with squared signal scale alpha-bar = 1 / (1 + sigma^2)."""
        if not 0 <= alpha_bar <= 1:
            raise ValueError(f"alpha-bar is {alpha_bar}; it lies between 0 and 1.")
        return cls(math.inf if alpha_bar == 0 else math.sqrt((1.0 - alpha_bar) / alpha_bar))

    @classmethod
    def from_log_snr(cls, log_snr: float) -> NoiseLevel:
        """The VP level with log-SNR = -2 log sigma."""
        return cls(math.exp(-0.5 * log_snr))

    def __float__(self) -> float:
        return self.sigma

    @property
    def std(self) -> float:
        """Standard deviation of the noise in the state, alpha sigma."""
        if math.isinf(self.sigma):
            return 1.0 if self.alpha == 0 else math.inf
        return self.alpha * self.sigma

    @property
    def log_snr(self) -> float:
        """-2 log sigma."""
        return math.inf if self.sigma == 0 else -2.0 * math.log(self.sigma)

    @property
    def ou_time(self) -> float:
        """tau = 1/2 log(1 + sigma^2), the time of dx = -x dtau + sqrt(2) dB."""
        if self.sigma > 1e100:
            return math.log(self.sigma)
        return 0.5 * math.log1p(self.sigma**2)

    @property
    def alpha_bar(self) -> float:
        """1 / (1 + sigma^2): squared signal scale of the VP process at this ratio."""
        return 0.0 if self.sigma > 1e100 else 1.0 / (1.0 + self.sigma**2)

    @property
    def is_vp(self) -> bool:
        """Whether the state lives in the variance-preserving frame."""
        return math.isclose(self.alpha**2, self.alpha_bar, rel_tol=1e-9, abs_tol=1e-300)

    def to_dict(self) -> dict[str, float]:
        """All views as plain numbers, for records."""
        return {view: getattr(self, view) for view in ("sigma", "alpha", "ou_time", "log_snr", "alpha_bar")}


@dataclass(frozen=True)
class Schedule:
    """The map between a model's own time ``t`` and noise levels.

    Attributes:
        name: what it is called in messages and records.
        t_min, t_max: the ends of the model's time; noise grows with t.
        steps: number of discrete steps, ``None`` for a continuous time.
    """

    name: str
    t_min: float
    t_max: float
    steps: int | None
    _level: Callable[[float], NoiseLevel] = field(repr=False)
    _time: Callable[[float], float] = field(repr=False)

    def level(self, t: float) -> NoiseLevel:
        """The noise level at model time t (between discrete steps log sigma is linear in t).

        Raises:
            ValueError: where t lies outside the schedule.
        """
        if not self.t_min <= t <= self.t_max:
            raise ValueError(
                f"time {t} is outside the schedule {self.name}, which runs from {self.t_min:g} to "
                f"{self.t_max:g}. Choose a time in that range."
            )
        return self._level(float(t))

    def time(self, level: NoiseLevel | float) -> float:
        """The model time of a level (or of a bare sigma), fractional between discrete steps.

        Raises:
            ValueError: where the level lies outside the schedule.
        """
        sigma = level.sigma if isinstance(level, NoiseLevel) else NoiseLevel(float(level)).sigma
        low, high = self.sigma_range
        if low * (1 - 1e-9) <= sigma <= high * (1 + 1e-9):
            return float(min(max(self._time(min(max(sigma, low), high)), self.t_min), self.t_max))
        raise ValueError(
            f"sigma {sigma:.6g} is outside the schedule {self.name}, which covers sigma {low:.6g} to "
            f"{high:.6g}. Choose a level in that range."
        )

    def step(self, level: NoiseLevel | float) -> int:
        """The first discrete step that is at least as noisy as the level.

        Raises:
            ValueError: for a continuous schedule, or a level outside it.
        """
        if self.steps is None:
            raise ValueError(f"the schedule {self.name} has a continuous time; use .time(level).")
        t = self.time(level)
        nearest = round(t)
        return int(nearest) if abs(t - nearest) < 1e-9 else math.ceil(t)

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Smallest and largest sigma of the schedule."""
        return self._level(self.t_min).sigma, self._level(self.t_max).sigma


def sigma_of(level: Any) -> Any:
    """The sigma of a level; numbers and tensors are sigmas already."""
    return level.sigma if isinstance(level, NoiseLevel) else level


def _table(name: str, alphas_cumprod: np.ndarray) -> Schedule:
    """A VP schedule over discrete steps 0 .. T-1, log sigma linear in between."""
    alpha_bar = np.asarray(alphas_cumprod, dtype=np.float64)
    falls = alpha_bar.ndim == 1 and len(alpha_bar) >= 2 and bool(np.all(np.diff(alpha_bar) < 0))  # NaN does not
    if not falls or not 0 <= alpha_bar[-1] < alpha_bar[0] <= 1:
        raise ValueError(f"the schedule {name} needs alpha-bar falling from at most 1 to 0 over at least two steps.")
    with np.errstate(divide="ignore"):
        log_sigma = 0.5 * (np.log1p(-alpha_bar) - np.log(alpha_bar))
    finite = np.isfinite(log_sigma)
    last = len(alpha_bar) - 1
    grid = np.arange(len(alpha_bar), dtype=np.float64)

    def level(t: float) -> NoiseLevel:
        if not finite[-1] and t > last - 1:
            # A zero-SNR last step has no log sigma: alpha-bar is linear over that one interval.
            return NoiseLevel.from_alpha_bar(float(alpha_bar[-2] * (last - t)))
        return NoiseLevel(math.exp(float(np.interp(t, grid[finite], log_sigma[finite]))))

    def time(sigma: float) -> float:
        if not finite[-1] and math.log(sigma) > log_sigma[-2]:
            return last - NoiseLevel(sigma).alpha_bar / float(alpha_bar[-2])
        return float(np.interp(math.log(sigma), log_sigma[finite], grid[finite]))

    return Schedule(name, 0.0, float(last), len(alpha_bar), level, time)


def _cosine_alpha_bar(steps: int = 1000) -> np.ndarray:
    """alpha-bar of the cosine schedule with betas capped at 0.999 (arXiv:2102.09672)."""
    f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.cumprod(1.0 - np.minimum(1.0 - f[1:] / f[:-1], 0.999))


def _quarter_log(name: str, low: float, high: float, alpha: float | None) -> Schedule:
    """Networks whose time is c_noise = log(sigma) / 4, as in EDM (arXiv:2206.00364, table 1)."""
    if not 0 < low < high:
        raise ValueError(f"the schedule {name} runs from sigma {low:g} to {high:g}; expected 0 < low < high.")

    def level(t: float) -> NoiseLevel:
        sigma = math.exp(4.0 * t)
        return NoiseLevel(sigma) if alpha is None else NoiseLevel(sigma, alpha)

    return Schedule(name, 0.25 * math.log(low), 0.25 * math.log(high), None, level, lambda s: 0.25 * math.log(s))


def _flow(name: str, steps: int) -> Schedule:
    """Flow matching: x = (1 - s) x_0 + s eps, model time t = steps * s, sigma = s / (1 - s)."""

    def level(t: float) -> NoiseLevel:
        s = t / steps
        return NoiseLevel(math.inf, alpha=0.0) if s >= 1 else NoiseLevel(s / (1 - s), alpha=1 - s)

    def time(sigma: float) -> float:
        return steps * (1.0 if math.isinf(sigma) else sigma / (1 + sigma))

    return Schedule(name, 0.0, float(steps), None, level, time)


def flow_sigmas(scheduler: Any) -> bool:
    """Whether a scheduler of other networks, such as DPM-Solver's, is told to run along flow matching's levels."""
    return bool((getattr(scheduler, "config", None) or {}).get("use_flow_sigmas"))


def schedule(source: Any = "ddpm-linear") -> Schedule:
    """The `Schedule` of a diffusers scheduler or of a named process.

    Args:
        source: a diffusers scheduler (beta-type, EDM or flow matching), or one of
            ``"ddpm-linear"`` (betas 1e-4 .. 0.02, T = 1000), ``"cosine"`` (T = 1000),
            ``"ou"`` (t is the OU time tau, arXiv:2402.18491) and ``"edm"`` (t is sigma, VE frame).

    Raises:
        ValueError: for an unknown name.
        TypeError: for an object that is no diffusers scheduler.

    >>> round(schedule("ddpm-linear").level(999).ou_time, 5)
    5.05886
    """
    if isinstance(source, Schedule):
        return source
    if isinstance(source, str):
        if source == "ddpm-linear":
            return _table(source, np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000)))
        if source == "cosine":
            return _table(source, _cosine_alpha_bar())
        if source == "ou":
            return Schedule(source, 0.0, 300.0, None, NoiseLevel.from_ou_time, lambda s: NoiseLevel(s).ou_time)
        if source == "edm":
            return Schedule(source, 0.0, 1e6, None, lambda t: NoiseLevel(t, alpha=1.0), lambda s: s)
        raise ValueError(f"unknown schedule {source!r}. Known: ddpm-linear, cosine, ou, edm, or a scheduler.")
    name = type(source).__name__
    config = getattr(source, "config", None)
    if name.startswith("EDM") and config is not None:
        low, high = float(config.sigma_min), float(config.sigma_max)
        return _quarter_log(name, low, high, alpha=1.0)
    if (name.startswith("FlowMatch") or flow_sigmas(source)) and config is not None:
        return _flow(name, int(config.num_train_timesteps))
    alphas_cumprod = getattr(source, "alphas_cumprod", None)
    if alphas_cumprod is None:
        raise TypeError(
            f"{name} has no alphas_cumprod. Pass a diffusers scheduler (beta-type, EDM or flow matching) "
            "or one of ddpm-linear, cosine, ou, edm."
        )
    import torch

    # diffusers' add_noise leaves them where it worked.
    alpha_bar = torch.as_tensor(alphas_cumprod, device="cpu").double().numpy()
    if config is not None and config.get("rescale_betas_zero_snr") and alpha_bar[-1] >= alpha_bar[-2]:
        # In place of no signal diffusers writes 2^-24, which may be more than the step before it has.
        alpha_bar = np.append(alpha_bar[:-1], 0.0)
    table = _table(name, alpha_bar)
    if config is not None and config.get("timestep_type") == "continuous" and config.prediction_type == "v_prediction":
        low, high = config.get("sigma_min"), config.get("sigma_max")
        ends = table.sigma_range
        return _quarter_log(name, float(low or ends[0]), float(high or ends[1]), alpha=None)
    return table


def generator(*key: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A separate random generator for every key of integers >= 0: no global state, no order of use.

    Trailing zeros do not tell keys apart, so use keys of one length.

    >>> import torch
    >>> a, b = generator(3, 1), generator(3, 1)
    >>> bool(torch.equal(torch.randn(2, generator=a), torch.randn(2, generator=b)))
    True
    """
    import torch

    if min(key, default=0) < 0:
        raise InputError(f"a seed of {min(key)}; expected a whole number of at least 0.")
    state = np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0]
    return torch.Generator(device=device).manual_seed(int(state))
