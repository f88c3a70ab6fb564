"""Triton kernels of tree attention, forward and backward."""
