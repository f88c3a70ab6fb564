"""Passes on an accelerator: tables that are copied once, and CUDA graphs that replay them."""
