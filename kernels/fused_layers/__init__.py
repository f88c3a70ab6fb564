"""Norm, activation and rotary angles of a decoder layer, each in one pass over its input."""
