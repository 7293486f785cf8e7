"""Adapters of several methods in one model. No method of its own, so it registers none."""

from .model import COMPATIBLE_TUNER_TYPES, MixedModel

__all__ = ["COMPATIBLE_TUNER_TYPES", "MixedModel"]
