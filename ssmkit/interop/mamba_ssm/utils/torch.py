"""Decorators of autograd functions that choose a dtype under CUDA's autocast."""

from functools import partial

from torch.amp import custom_bwd as _backward
from torch.amp import custom_fwd as _forward

custom_fwd = partial(_forward, device_type="cuda")
custom_bwd = partial(_backward, device_type="cuda")
