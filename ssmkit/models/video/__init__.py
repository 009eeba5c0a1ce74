"""Backbones of clips by name; `ssmkit.models.create_model` makes them."""
