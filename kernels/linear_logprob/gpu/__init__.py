"""Triton kernels of the log-probability from hidden states, forward and backward."""
