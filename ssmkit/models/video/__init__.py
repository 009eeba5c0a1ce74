"""Backbones of clips by name; `ssmkit.models.create_model` makes them."""

from ssmkit.models.video.videomamba import SCAN_ORDERS, VideoMamba, VideoMambaImage

__all__ = ["SCAN_ORDERS", "VideoMamba", "VideoMambaImage"]
