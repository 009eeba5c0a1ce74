"""Module paths of mamba_ssm.distributed, for one process: there is no tensor parallelism."""
