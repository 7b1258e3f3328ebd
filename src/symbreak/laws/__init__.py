"""Laws: tractable distributions whose noised version x = x_0 + sigma eps is known."""

from symbreak.laws.gaussian import Gaussian

__all__ = ["Gaussian"]
