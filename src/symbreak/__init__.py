"""symbreak: find the moments at which a diffusion model decides, and start sampling there.

Names are loaded on first use, so that ``import symbreak`` is quick and touches no network.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from symbreak.critical import CriticalTime, Curve
    from symbreak.data.images import Images
    from symbreak.data.readers import images
    from symbreak.data.samples import samples
    from symbreak.laws import Empirical, Gaussian, Mixture, PrincipalMixture, Sphere
    from symbreak.laws.saving import load_law, save_law
    from symbreak.metrics.features import extractor
    from symbreak.metrics.frechet import frechet_distance
    from symbreak.moments.low_rank import LowRankMoments, truncation_bound
    from symbreak.moments.one_pass import Moments
    from symbreak.networks.denoiser import Denoiser, score
    from symbreak.networks.families import as_unet, denoiser
    from symbreak.networks.guidance import guided
    from symbreak.networks.latents import encode
    from symbreak.networks.residual import LawResidual
    from symbreak.networks.samplers import scheduler
    from symbreak.noise import NoiseLevel, Schedule, schedule
    from symbreak.phases.bifurcation import bifurcation
    from symbreak.phases.branches import Paths
    from symbreak.phases.class_information import condition_information, guidance_window
    from symbreak.phases.clones import clone_agreement, clones
    from symbreak.phases.collapse import collapse_scaling, collapse_time, samples_needed
    from symbreak.phases.condensation import nearest_flips, nearest_of
    from symbreak.phases.excess_entropy import excess_entropy, mutual_information
    from symbreak.phases.fixed_points import fixed_points
    from symbreak.phases.gaussianity import first_rejection, gaussianity
    from symbreak.phases.kicks import opportunity
    from symbreak.phases.losses import entropy_rate, loss_curve
    from symbreak.phases.network_stability import network_stability
    from symbreak.phases.non_gaussianity import added_to_law, non_gaussianity
    from symbreak.phases.potential import arc_potential, potential
    from symbreak.phases.speciation import cloning_probability, speciation_time
    from symbreak.phases.u_turns import u_turns
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
    from symbreak.studies.audit import Sampling, audit
    from symbreak.studies.compare_samplers import Study, run
    from symbreak.studies.compare_starts import compare_starts
    from symbreak.studies.diagnose import Effort, diagnose
    from symbreak.studies.evaluate import Subset, evaluate, evaluate_network
    from symbreak.studies.measure import Measure
    from symbreak.studies.sensitivity import sensitivity
    from symbreak.studies.worlds import draw_world


def _homes() -> dict[str, str]:
    """The module of each public name, from the imports above, which only type checkers run."""
    tree = ast.walk(ast.parse(Path(__file__).read_text(encoding="utf-8")))
    imports = [node for node in tree if isinstance(node, ast.ImportFrom) and str(node.module).startswith("symbreak.")]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


_HOME = _homes()
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'symbreak' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
