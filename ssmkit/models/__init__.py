"""Backbones: configs, named variants, stages."""

from ssmkit.models import video, vision  # they register their models
from ssmkit.models.registry import create_model, list_models, register_model

__all__ = ["create_model", "list_models", "register_model", "video", "vision"]
