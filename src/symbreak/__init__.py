"""symbreak: find the moments at which a diffusion model decides, and start sampling there.

Names are loaded on first use, so that ``import symbreak`` is quick and touches no network.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "networks.families": ("as_unet", "denoiser"),
    "networks.guidance": ("guided",),
    "networks.latents": ("encode",),
    "networks.loading": ("load_pipeline",),
    "networks.samplers": ("scheduler",),
    "studies.compare_starts": ("compare_starts",),
    "studies.sensitivity": ("sensitivity",),
    "studies.measure": ("Measure",),
    "critical": ("CriticalTime", "Curve"),
    "data.images": ("Images",),
    "data.readers": ("images",),
    "start.grids": ("late_sigmas",),
    "networks.denoiser": ("Denoiser", "score"),
    "runtime.errors": ("InputError",),
    "runtime.run": ("Run",),
    "laws": ("Empirical", "Gaussian", "Mixture", "PrincipalMixture", "Sphere"),
    "metrics.features": ("extractor",),
    "studies.evaluate": ("Subset", "evaluate", "evaluate_network"),
    "laws.saving": ("load_law", "save_law"),
    "moments.one_pass": ("Moments", "frechet_distance"),
    "noise": ("NoiseLevel", "Schedule", "schedule"),
    "phases.collapse": ("collapse_scaling", "collapse_time", "excess_entropy", "mutual_information", "samples_needed"),
    "phases.condensation": ("nearest_flips", "nearest_of"),
    "phases.branches": ("Paths",),
    "phases.clones": ("clone_agreement", "clones"),
    "phases.kicks": ("opportunity",),
    "phases.u_turns": ("u_turns",),
    "phases.speciation": ("cloning_probability", "speciation_time"),
    "phases.gaussianity": ("first_rejection", "gaussianity"),
    "phases.losses": ("entropy_rate", "loss_curve"),
    "phases.non_gaussianity": ("non_gaussianity",),
    "phases.network_stability": ("arc_potential", "network_stability"),
    "phases.bifurcation": ("bifurcation", "fixed_points", "potential"),
    "start.pipeline": ("LateStartPipeline",),
    "report.record": ("Record",),
    "report.html": ("write_report",),
    "start.sample": ("generate",),
    "moments.low_rank": ("LowRankMoments", "truncation_bound"),
    "start.late_start": ("LateStart", "LateStartWarning", "standard_start"),
    "start.fit": ("candidate_laws", "fit_start", "late_start"),
    "studies.diagnose": ("Effort", "diagnose"),
    "studies.audit": ("Sampling", "audit"),
    "studies.compare_samplers": ("Study", "run"),
    "networks.train": ("Recipe", "train_network"),
    "studies.worlds": ("draw_world",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from symbreak.critical import CriticalTime, Curve
    from symbreak.data.images import Images
    from symbreak.data.readers import images
    from symbreak.laws import Empirical, Gaussian, Mixture, PrincipalMixture, Sphere
    from symbreak.laws.saving import load_law, save_law
    from symbreak.metrics.features import extractor
    from symbreak.moments.low_rank import LowRankMoments, truncation_bound
    from symbreak.moments.one_pass import Moments, frechet_distance
    from symbreak.networks.denoiser import Denoiser, score
    from symbreak.networks.families import as_unet, denoiser
    from symbreak.networks.guidance import guided
    from symbreak.networks.latents import encode
    from symbreak.networks.loading import load_pipeline
    from symbreak.networks.samplers import scheduler
    from symbreak.networks.train import Recipe, train_network
    from symbreak.noise import NoiseLevel, Schedule, schedule
    from symbreak.phases.bifurcation import bifurcation, fixed_points, potential
    from symbreak.phases.branches import Paths
    from symbreak.phases.clones import clone_agreement, clones
    from symbreak.phases.collapse import (
        collapse_scaling,
        collapse_time,
        excess_entropy,
        mutual_information,
        samples_needed,
    )
    from symbreak.phases.condensation import nearest_flips, nearest_of
    from symbreak.phases.gaussianity import first_rejection, gaussianity
    from symbreak.phases.kicks import opportunity
    from symbreak.phases.losses import entropy_rate, loss_curve
    from symbreak.phases.network_stability import arc_potential, network_stability
    from symbreak.phases.non_gaussianity import non_gaussianity
    from symbreak.phases.speciation import cloning_probability, speciation_time
    from symbreak.phases.u_turns import u_turns
    from symbreak.report.html import write_report
    from symbreak.report.record import Record
    from symbreak.runtime.errors import InputError
    from symbreak.runtime.run import Run
    from symbreak.start.fit import candidate_laws, fit_start, late_start
    from symbreak.start.grids import late_sigmas
    from symbreak.start.late_start import LateStart, LateStartWarning, standard_start
    from symbreak.start.pipeline import LateStartPipeline
    from symbreak.start.sample import generate
    from symbreak.studies.audit import Sampling, audit
    from symbreak.studies.compare_samplers import Study, run
    from symbreak.studies.compare_starts import compare_starts
    from symbreak.studies.diagnose import Effort, diagnose
    from symbreak.studies.evaluate import Subset, evaluate, evaluate_network
    from symbreak.studies.measure import Measure
    from symbreak.studies.sensitivity import sensitivity
    from symbreak.studies.worlds import draw_world


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'symbreak' has no attribute {name!r}")
    return getattr(importlib.import_module(f"symbreak.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
