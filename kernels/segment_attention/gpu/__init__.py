"""Triton kernels of segment attention, and how a pass is cut into their work."""
