"""Algorithms over independent rollouts.

Every leaf is a root, and a group is all rollouts of one prompt.
"""
