"""Laws: tractable distributions whose noised version x = x_0 + sigma eps is known."""

from typing import TYPE_CHECKING

from symbreak.runtime.lazy import lazily

if TYPE_CHECKING:
    from symbreak.laws.cluster_mixture import PrincipalMixture
    from symbreak.laws.empirical import Empirical
    from symbreak.laws.gaussian import Gaussian
    from symbreak.laws.law import Law
    from symbreak.laws.mixture import Mixture
    from symbreak.laws.saving import load_law, save_law
    from symbreak.laws.sphere import Sphere

__getattr__, __all__ = lazily(__name__, __file__)


def __dir__() -> list[str]:
    return __all__
