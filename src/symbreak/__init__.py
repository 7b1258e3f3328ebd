"""symbreak: find the moments at which a diffusion model decides, and start sampling there.

Names are loaded on first use, so that ``import symbreak`` is quick and touches no network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from symbreak.runtime.lazy import lazily

__version__ = "0.1.0"

if TYPE_CHECKING:
    from symbreak import laws, metrics, phases
    from symbreak.critical import CriticalTime, Curve
    from symbreak.data.images import Images
    from symbreak.data.readers import images
    from symbreak.data.samples import samples
    from symbreak.laws import Empirical, Gaussian, Mixture, PrincipalMixture, Sphere
    from symbreak.laws.saving import load_law, save_law
    from symbreak.metrics.feature_rows import extractor
    from symbreak.metrics.frechet import frechet_distance
    from symbreak.moments.low_rank import LowRankMoments, truncation_bound
    from symbreak.moments.one_pass import Moments
    from symbreak.networks.denoiser import Denoiser, score
    from symbreak.networks.families import as_unet, denoiser
    from symbreak.networks.guidance import guided
    from symbreak.networks.latents import decode, encode
    from symbreak.networks.residual import LawResidual
    from symbreak.networks.samplers import scheduler
    from symbreak.noise import NoiseLevel, Schedule, schedule
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
    from symbreak.report.html import write_report
    from symbreak.report.record import Record
    from symbreak.runtime.errors import InputError
    from symbreak.runtime.run import Run
    from symbreak.start.fit import candidate_laws, fit_start, late_start
    from symbreak.start.grids import late_sigmas
    from symbreak.start.late_start import LateStart, LateStartWarning, standard_start
    from symbreak.start.loading import load_pipeline
    from symbreak.start.pipeline import LateStartPipeline
    from symbreak.start.recipe import Recipe
    from symbreak.start.sample import generate
    from symbreak.start.train import train_network
    from symbreak.studies.attributes import attribute_levels
    from symbreak.studies.audit import Sampling, audit
    from symbreak.studies.compare_samplers import Study, run
    from symbreak.studies.compare_starts import compare_starts
    from symbreak.studies.diagnose import Effort, diagnose
    from symbreak.studies.evaluate import Subset, evaluate, evaluate_network
    from symbreak.studies.measure import Measure
    from symbreak.studies.sensitivity import sensitivity
    from symbreak.studies.worlds import draw_world


GROUPS = ("laws", "metrics", "phases")  # the same names by their kind: sb.phases.<TAB>
__getattr__, __all__ = lazily(__name__, __file__, GROUPS)


def __dir__() -> list[str]:
    return sorted([*__all__, *GROUPS, "__version__"])
