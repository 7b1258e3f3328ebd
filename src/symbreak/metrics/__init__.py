"""Metrics: arrays in, numbers out."""

from typing import TYPE_CHECKING

from symbreak.runtime.lazy import lazily

if TYPE_CHECKING:
    from symbreak.metrics.extractors import Extractor
    from symbreak.metrics.feature_rows import extractor, features
    from symbreak.metrics.frechet import Distance, distance, floor, frechet_distance

__getattr__, __all__ = lazily(__name__, __file__)


def __dir__() -> list[str]:
    return __all__
