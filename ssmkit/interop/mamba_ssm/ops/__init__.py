"""Module paths of mamba_ssm.ops."""
