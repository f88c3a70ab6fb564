"""Triton kernel of sampling."""
