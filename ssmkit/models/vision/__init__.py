"""Vision backbones by name; `ssmkit.models.create_model` makes them."""

from ssmkit.models.vision.backbone import FeatureList, VisionBackbone
from ssmkit.models.vision.mamba2d import Mamba2DBackbone
from ssmkit.models.vision.vim import Vim
from ssmkit.models.vision.vmamba import VMamba

__all__ = ["FeatureList", "Mamba2DBackbone", "VMamba", "Vim", "VisionBackbone"]
