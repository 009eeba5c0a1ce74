"""Names of other projects: mamba_ssm, causal_conv1d and the kernels of transformers, served by ssmkit's ops and layers."""

from ssmkit.interop import transformers
from ssmkit.interop.finder import Served, install, uninstall

__all__ = ["Served", "install", "transformers", "uninstall"]
