"""Metrics: arrays in, numbers out."""

from symbreak.metrics.extractors import Extractor
from symbreak.metrics.features import extractor, features
from symbreak.metrics.frechet import Distance, distance, floor

__all__ = ["Distance", "Extractor", "distance", "extractor", "features", "floor"]
