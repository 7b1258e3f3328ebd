"""symbreak: find the moments at which a diffusion model decides, and start sampling there.

Names are loaded on first use, so that ``import symbreak`` is quick and touches no network.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "adapters": ("as_unet", "denoiser", "encode", "load_pipeline", "scheduler"),
    "checks": ("compare_starts", "sensitivity"),
    "critical": ("CriticalTime", "Curve"),
    "cut": ("late_sigmas",),
    "data": ("Images", "images"),
    "denoise": ("Denoiser", "score"),
    "files": ("InputError",),
    "laws": ("Empirical", "Gaussian", "Mixture", "PrincipalMixture", "Sphere"),
    "metrics": ("evaluate", "extractor"),
    "laws.store": ("load_law", "save_law"),
    "moments": ("Moments", "frechet_distance"),
    "noise": ("NoiseLevel", "Schedule", "schedule"),
    "phases.collapse": (
        "collapse_scaling",
        "collapse_time",
        "excess_entropy",
        "mutual_information",
        "samples_needed",
    ),
    "phases.condensation": ("nearest_flips", "nearest_of"),
    "phases.clones": ("clone_agreement", "clones", "opportunity", "u_turns"),
    "phases.speciation": ("cloning_probability", "speciation_time"),
    "phases.gaussianity": ("first_rejection", "gaussianity"),
    "phases.information": ("entropy_rate", "loss_curve", "non_gaussianity"),
    "phases.landscape": ("arc_potential", "network_stability"),
    "phases.stability": ("bifurcation", "fixed_points", "potential"),
    "pipeline": ("LateStartPipeline",),
    "record": ("Record",),
    "report": ("write_report",),
    "sample": ("generate",),
    "sketch": ("LowRankMoments", "truncation_bound"),
    "start": ("LateStart", "LateStartWarning", "candidate_laws", "fit_start", "late_start", "standard_start"),
    "diagnosis": ("Effort", "diagnose"),
    "copying": ("audit",),
    "study": ("Study", "run"),
    "train": ("Recipe", "train_network"),
    "world": ("draw_world",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from symbreak.adapters import as_unet, denoiser, encode, load_pipeline, scheduler
    from symbreak.checks import compare_starts, sensitivity
    from symbreak.copying import audit
    from symbreak.critical import CriticalTime, Curve
    from symbreak.cut import late_sigmas
    from symbreak.data import Images, images
    from symbreak.denoise import Denoiser, score
    from symbreak.diagnosis import Effort, diagnose
    from symbreak.files import InputError
    from symbreak.laws import Empirical, Gaussian, Mixture, PrincipalMixture, Sphere
    from symbreak.laws.store import load_law, save_law
    from symbreak.metrics import evaluate, extractor
    from symbreak.moments import Moments, frechet_distance
    from symbreak.noise import NoiseLevel, Schedule, schedule
    from symbreak.phases.clones import clone_agreement, clones, opportunity, u_turns
    from symbreak.phases.collapse import (
        collapse_scaling,
        collapse_time,
        excess_entropy,
        mutual_information,
        samples_needed,
    )
    from symbreak.phases.condensation import nearest_flips, nearest_of
    from symbreak.phases.gaussianity import first_rejection, gaussianity
    from symbreak.phases.information import entropy_rate, loss_curve, non_gaussianity
    from symbreak.phases.landscape import arc_potential, network_stability
    from symbreak.phases.speciation import cloning_probability, speciation_time
    from symbreak.phases.stability import bifurcation, fixed_points, potential
    from symbreak.pipeline import LateStartPipeline
    from symbreak.record import Record
    from symbreak.report import write_report
    from symbreak.sample import generate
    from symbreak.sketch import LowRankMoments, truncation_bound
    from symbreak.start import (
        LateStart,
        LateStartWarning,
        candidate_laws,
        fit_start,
        late_start,
        standard_start,
    )
    from symbreak.study import Study, run
    from symbreak.train import Recipe, train_network
    from symbreak.world import draw_world


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'symbreak' has no attribute {name!r}")
    return getattr(importlib.import_module(f"symbreak.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
