"""Triton kernels and their launchers, one file per op; imported as ssmkit.kernels and importing nothing of ssmkit."""
