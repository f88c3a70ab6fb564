"""Random operations on the segment tree: C++ against the plain definition, both against a shadow
(tree_machine.py).
"""

from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from support.tree_machine import Operations


def test_random_operations():
    run_state_machine_as_test(
        Operations, settings=settings(max_examples=60, stateful_step_count=40, deadline=None)
    )
