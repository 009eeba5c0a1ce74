"""Module paths of mamba_ssm.models."""
