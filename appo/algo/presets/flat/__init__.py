"""Algorithms over independent rollouts: every leaf is a root, and a group is all rollouts of one
prompt.
"""
