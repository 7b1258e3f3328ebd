"""What a number claims: right values of awkward inputs, and intervals that say what they are."""

import math

import pytest
import torch

from symbreak.laws import Mixture
from symbreak.phases.class_entropy import class_entropy
from symbreak.phases.clones import clones
from symbreak.phases.speciation import cloning_probability, cloning_time, speciation_time
from symbreak.runtime.errors import InputError


def two_of_two() -> Mixture:
    """Two classes of two components each: the classes are 16 apart, the components of one class 2."""
    means = torch.tensor([[8.0, 1.0], [8.0, -1.0], [-8.0, 1.0], [-8.0, -1.0]], dtype=torch.float64)
    law = Mixture.from_parameters(means, 0.05)
    law.classes = torch.tensor([0, 0, 1, 1])
    return law


# --- classes of several components ----------------------------------------------------------------


def test_classes_of_several_components_are_told_apart_as_classes():
    """Along the first axis two Gaussians at +-8 of variance .05; the second axis says nothing of the class."""
    law, pair = two_of_two(), Mixture.from_parameters([[8.0], [-8.0]], 0.05)
    assert cloning_time(pair).sigma == pytest.approx(8.67, abs=0.005)
    # 20,000 draws: .5 % in sigma; the components by themselves give 1.74.
    time = cloning_time(law)
    assert time.sigma == pytest.approx(cloning_time(pair).sigma, rel=0.015)
    assert time.low.sigma < cloning_time(pair).sigma < time.high.sigma
    phi = cloning_probability(law, [3.0, 1e4])
    assert phi.value == pytest.approx([float(cloning_probability(pair, 3.0).value), 0.5], abs=0.002)
    assert phi.value[0] == pytest.approx(0.994, abs=0.002)
    free = speciation_time(law, "free-entropy")
    assert len(free.classes) == 2
    assert free.sigma == pytest.approx(math.sqrt(64 - 0.05), rel=0.05)
    entropy = class_entropy(law, [0.1, 8.0])
    assert entropy.total == pytest.approx(math.log(2))
    assert entropy.value[1] == pytest.approx(float(class_entropy(pair, 8.0).value), abs=0.01)


def test_clones_of_a_mixture_are_told_apart_by_its_classes():
    law = two_of_two()
    law.classes = torch.tensor([7, 7, 3, 3])  # numbers of the data's classes
    pairs = clones(law, [2.0, 8.0, 40.0], pairs=400, steps=20)
    assert pairs.classes.tolist() == [3, 7]
    assert pairs.floor == pytest.approx(0.5, abs=0.02)  # .25 if components counted
    assert pairs.curve.value[0] > 0.98


def test_components_of_one_class_have_nothing_to_decide():
    law = two_of_two()
    law.classes = torch.zeros(4, dtype=torch.int64)
    assert float(cloning_probability(law, 1.0).value) == pytest.approx(1.0, abs=1e-12)
    assert cloning_time(law).level is None
    assert "does not pass" in cloning_time(law).reason
    for ask in (lambda: class_entropy(law, 1.0), lambda: speciation_time(law, "free-entropy")):
        with pytest.raises(InputError, match="class"):
            ask()
