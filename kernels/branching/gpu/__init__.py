"""Triton kernels of branching."""
