"""Module paths of mamba_ssm.modules."""
