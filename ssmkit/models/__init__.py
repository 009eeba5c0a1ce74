"""Backbones: configs, named variants, stages."""
