"""Triton kernel of the policy loss."""
