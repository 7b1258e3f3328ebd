"""A small network for worlds of few points: trained in a minute, and exact enough for Jacobians."""

from __future__ import annotations

import time
from itertools import pairwise

import torch

from symbreak.noise import generator, schedule
from symbreak.runtime.errors import InputError
from symbreak.runtime.plain import Values
from symbreak.runtime.run import Run

__all__ = ["PointNetwork", "train_point_network"]


class PointNetwork(torch.nn.Module):
    """A small perceptron that predicts epsilon, as a denoiser: D = x - sigma eps(alpha x, log sigma).

    Args:
        dim: dimension d of a sample.
        width: hidden units a layer.
        sigma_range: levels it is trained on.
    """

    def __init__(self, dim: int, width: int, sigma_range: tuple[float, float]) -> None:
        super().__init__()
        self.shape: tuple[int, ...] = (dim,)
        self.sigma_range = sigma_range
        sizes = (dim + 1, width, width, width)
        hidden = [(torch.nn.Linear(a, b), torch.nn.SiLU()) for a, b in pairwise(sizes)]
        self.layers = torch.nn.Sequential(*(layer for pair in hidden for layer in pair), torch.nn.Linear(width, dim))

    def epsilon(self, state: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The noise predicted from VP states [B, d] at levels [B] or []."""
        level = sigma.log().mul(0.5).expand(len(state))[:, None]
        out: torch.Tensor = self.layers(torch.cat([state, level], dim=1))
        return out

    def forward(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """E[x_0 | x] [B, d] for VE states x [B, d]; sigma a float or [B]."""
        s = torch.as_tensor(sigma, dtype=torch.float64)
        low, high = self.sigma_range
        if bool((s < low * (1 - 1e-9)).any()) or bool((s > high * (1 + 1e-9)).any()):
            raise InputError(f"sigma {float(s.min()):g} .. {float(s.max()):g}; expected {low:g} .. {high:g}.")
        s = s.to(x)
        column = s[:, None] if s.ndim else s
        weight = next(self.parameters())
        state = (x / (1 + column**2).sqrt()).to(weight)
        return x - column * self.epsilon(state, s.to(weight)).to(x)


def train_point_network(
    points: torch.Tensor,
    seed: int = 0,
    steps: int = 6000,
    batch: int = 512,
    width: int = 64,
    lr: float = 3e-3,
    run: Run | None = None,
) -> tuple[PointNetwork, Values]:
    """Train a small network on points by epsilon prediction over the DDPM linear schedule.

        loss = E |eps_theta(alpha (x_0 + sigma eps), log sigma) - eps|^2,  the step uniform over 0 .. 999

    Weights are an average over the last steps. Every draw (x_0, eps) is used together with (x_0, -eps), which
    quietens the gradient.

    Args:
        points: data [n, d].
        seed: of initial weights and draws.
        steps, batch, width, lr: optimizer steps, pairs a step, hidden units, peak learning rate.
        run: its progress counts the steps.

    Returns:
        The network in float64 (so that its Jacobians are exact) and the settings and losses of the run.

    Source: arXiv:2006.11239.
    """
    run = (run or Run()).named("training")
    if points.ndim != 2 or len(points) < 1:
        raise InputError(f"points of shape {tuple(points.shape)}; expected [n, d].")
    sched = schedule("ddpm-linear")
    table = torch.tensor([sched.level(k).sigma for k in range(1000)], dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = PointNetwork(points.shape[1], width, sched.sigma_range)
    data, g = points.float(), generator(seed, 17)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    mean = [w.detach().clone() for w in net.parameters()]
    began, losses, running = time.perf_counter(), [], 0.0
    for step in range(steps):
        x0 = data[torch.randint(len(data), (batch,), generator=g)]
        sigma = table[torch.randint(1000, (batch,), generator=g)]
        eps = torch.randn(x0.shape, generator=g)
        x0, sigma, eps = torch.cat([x0, x0]), torch.cat([sigma, sigma]), torch.cat([eps, -eps])
        alpha = (1 + sigma * sigma).rsqrt()[:, None]
        loss = (net.epsilon(alpha * (x0 + sigma[:, None] * eps), sigma) - eps).square().sum(1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        rate.step()
        with torch.no_grad():
            # From the first step on it forgets as fast as 1 / step, then over the last 200 steps.
            torch._foreach_lerp_(mean, list(net.parameters()), max(0.005, 1.0 / (step + 1)))
        running += float(loss.detach())
        if (step + 1) % 500 == 0:
            losses.append(running / 500)
            running = 0.0
            run.tell(step + 1, steps)
    with torch.no_grad():
        for weight, average in zip(net.parameters(), mean):
            weight.copy_(average)
    net = net.double().eval().requires_grad_(False)
    settings = {"steps": steps, "batch": batch, "width": width, "lr": lr, "seed": seed, "schedule": sched.name}
    count = sum(p.numel() for p in net.parameters())
    return net, {**settings, "parameters": count, "loss": losses, "seconds": time.perf_counter() - began}
