"""Trajectories onto training points: exact scores of few points collapse, a law of many does not."""

import math

import numpy as np
import pytest
import torch

from symbreak.laws import Empirical, Mixture
from symbreak.networks.families import as_unet, denoiser
from symbreak.networks.samplers import scheduler
from symbreak.noise import generator
from symbreak.phases.cloning import clones
from symbreak.phases.collapse import collapse_time
from symbreak.phases.condensation import nearest_flips, nearest_of
from symbreak.runtime.files import InputError
from symbreak.runtime.run import Run


def points(n, d, seed=0):
    return torch.randn(n, d, generator=generator(seed), dtype=torch.float64)


def test_the_score_of_a_data_set_ends_on_its_points():
    data = Empirical(points(200, 16))
    found = nearest_flips(data, data, trajectories=96, steps=80, seeds=1)
    assert found.ratio.max() < 0.05  # final images are training points, up to the last level's noise
    assert found.participation.value[-1] == pytest.approx(0.0, abs=1e-3)
    assert found.participation.value[0] == pytest.approx(math.log10(200), abs=0.02)
    assert (np.diff(found.settled.value) >= 0).all()
    assert found.settled.value[-1] == 1.0
    # [B]: the last change happens at the collapse: here within a factor of two of it.
    at = collapse_time(Mixture.from_parameters(torch.zeros(1, 16), 1.0), samples=200).sigma
    assert found.last.low.sigma < found.last.sigma < found.last.high.sigma
    assert 0.5 < found.last.sigma / at < 2.0
    counts = np.bincount(found.nearest[-1], minlength=200)
    assert counts.max() < 8  # 96 trajectories spread over 200 points


def test_the_law_that_the_points_came_from_does_not_collapse():
    law, train = Mixture.from_parameters(torch.zeros(1, 16), 1.0), Empirical(points(200, 16))
    found = nearest_flips(law, train, trajectories=96, steps=80, seeds=1)
    fresh = torch.randn(2000, 16, generator=generator(5), dtype=torch.float64)
    d = torch.cdist(fresh, train.points).topk(2, largest=False).values
    usual = float((d[:, 0] / d[:, 1]).median())
    # The median of 96 has a standard error of about 0.01 (the ratio spreads over 0.08).
    assert np.median(found.ratio) == pytest.approx(usual, abs=0.04)
    assert found.ratio.min() > 1 / 3


def test_clones_end_at_one_sample_below_the_collapse():
    data = Empirical(points(60, 12, 2))
    found = clones(data, [0.1, 1.0, 20.0], nearest_of(data.points), pairs=120, steps=40, seeds=0)
    agree = dict(zip(found.curve.sigma, found.curve.value))
    assert agree[0.1] == 1.0
    assert agree[20.0] == pytest.approx(found.floor, abs=4 * math.sqrt(0.05 / 120))
    assert found.floor < 0.05


def test_networks_blocks_and_interruptions(tmp_path):
    data = Empirical(points(50, 4, 3).reshape(50, 1, 2, 2).float())
    full = scheduler("ddpm")
    network = denoiser(as_unet(data, full), full)
    whole = nearest_flips(network, data, trajectories=70, steps=20, sigma_end=0.05)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nearest_flips(network, data, trajectories=70, steps=20, sigma_end=0.05, run=Run(tmp_path, progress=stop))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    done = []
    go_on = Run(tmp_path, progress=lambda _, a, b: done.append((a, b)))
    again = nearest_flips(network, data, trajectories=70, steps=20, sigma_end=0.05, run=go_on)
    np.testing.assert_array_equal(again.ends, whole.ends)
    np.testing.assert_array_equal(again.nearest, whole.nearest)
    assert done[-1] == (2, 2)
    assert again.calls == 20 * 70
    assert set(again.to_dict()) == {"settled", "participation", "last", "trajectories", "median_ratio", "calls"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: nearest_flips(Mixture.from_parameters(torch.zeros(1, 5), 1.0), d), "points of shape"),
        (lambda d: nearest_flips(d, Empirical(points(2, 4))), "at least 3"),
        (lambda d: nearest_flips(d, d, sigma_start=1.0, sigma_end=2.0), "levels from 1 to 2"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(InputError, match=message) as error:
        call(Empirical(points(30, 4)))
    assert "\n" not in str(error.value)
