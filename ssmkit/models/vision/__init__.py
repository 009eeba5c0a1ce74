"""Vision backbones by name; `ssmkit.models.create_model` makes them."""

from ssmkit.models.vision.backbone import FeatureList, VisionBackbone

__all__ = ["FeatureList", "VisionBackbone"]
