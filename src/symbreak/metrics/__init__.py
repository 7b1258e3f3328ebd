"""Metrics: arrays in, numbers out."""

from symbreak.metrics.features import Extractor, extractor, features
from symbreak.metrics.frechet import Distance, distance, floor

__all__ = ["Distance", "Extractor", "distance", "extractor", "features", "floor"]
