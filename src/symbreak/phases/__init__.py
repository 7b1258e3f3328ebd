"""Diagnosis: one file a phenomenon; questions to laws and denoisers, answers as critical times."""

from typing import TYPE_CHECKING

from symbreak.runtime.lazy import lazily

if TYPE_CHECKING:
    from symbreak.phases.beyond_gaussian import added_to_law, non_gaussianity
    from symbreak.phases.bifurcations import bifurcation
    from symbreak.phases.branches import Paths
    from symbreak.phases.class_information import condition_information, guidance_window
    from symbreak.phases.cloning import clone_agreement, clones
    from symbreak.phases.collapse import collapse_scaling, collapse_time, samples_needed
    from symbreak.phases.condensation import nearest_flips, nearest_of
    from symbreak.phases.fixed_point_search import fixed_points
    from symbreak.phases.gaussian_tests import first_rejection, gaussianity
    from symbreak.phases.information import excess_entropy, mutual_information
    from symbreak.phases.kicks import opportunity
    from symbreak.phases.losses import entropy_rate, loss_curve
    from symbreak.phases.potentials import arc_potential, potential
    from symbreak.phases.speciation import cloning_probability, speciation_time
    from symbreak.phases.stability import network_stability
    from symbreak.phases.turns import u_turns

__getattr__, __all__ = lazily(__name__, __file__)


def __dir__() -> list[str]:
    return __all__
