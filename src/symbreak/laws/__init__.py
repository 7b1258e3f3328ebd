"""Laws: tractable distributions whose noised version x = x_0 + sigma eps is known."""

from symbreak.laws.empirical import Empirical
from symbreak.laws.gaussian import Gaussian
from symbreak.laws.mixture import Mixture
from symbreak.laws.principal import PrincipalMixture
from symbreak.laws.sphere import Sphere

__all__ = ["Empirical", "Gaussian", "Mixture", "PrincipalMixture", "Sphere"]
