"""Evaluation: arrays in, numbers out."""

from __future__ import annotations

from symbreak.metrics.evaluation import default_extractor, evaluate
from symbreak.metrics.features import Extractor, extractor, features
from symbreak.metrics.fid import Distance, distance, floor

__all__ = ["Distance", "Extractor", "default_extractor", "distance", "evaluate", "extractor", "features", "floor"]
