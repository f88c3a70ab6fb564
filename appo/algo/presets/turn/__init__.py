"""Algorithms that credit single turns.

A reward or a value for each tool call, or groups of states that repeat.

None is here yet. What belongs here has an advantage rule that looks at the turns of a trajectory
(its nodes) instead of the trajectory as a whole.
"""
