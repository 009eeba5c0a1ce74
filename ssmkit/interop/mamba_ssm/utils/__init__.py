"""Module paths of mamba_ssm.utils."""
