"""Laws: tractable distributions whose noised version x = x_0 + sigma eps is known."""

from symbreak.laws.cluster_mixture import PrincipalMixture
from symbreak.laws.empirical import Empirical
from symbreak.laws.gaussian import Gaussian
from symbreak.laws.law import Law
from symbreak.laws.mixture import Mixture
from symbreak.laws.sphere import Sphere

__all__ = ["Empirical", "Gaussian", "Law", "Mixture", "PrincipalMixture", "Sphere"]
