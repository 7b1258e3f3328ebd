"""Mean and covariance of anything: in one pass, or the leading modes of what is too large for a covariance."""

from symbreak.moments.low_rank import LowRankMoments, truncation_bound
from symbreak.moments.one_pass import Moments, mode_images

__all__ = ["LowRankMoments", "Moments", "mode_images", "truncation_bound"]
