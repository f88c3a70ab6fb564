"""One thread, no network, helpers on the path.

Tests must not depend on who else uses the machine.
"""

import os
import sys
from pathlib import Path

import pytest
from support import durations

for key, value in {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1",
                   "TOKENIZERS_PARALLELISM": "false"}.items():  # fmt: skip
    os.environ.setdefault(key, value)

# Triton kernels run in its interpreter where there is no device; the flag is read when triton is
# first imported. Compiling for a device cannot share a process with the interpreter:
# tests/bench/test_aot.py starts its own.
DEVICES = ("nvidia[0-9]*", "kfd", "dxg")  # NVIDIA, AMD, and either under WSL
if not any(found for name in DEVICES for found in Path("/dev").glob(name)):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# `support` is on the path already, by the pytest settings in pyproject.toml.
sys.path.append(str(Path(__file__).parents[1]))  # for `bench`


def pytest_collection_modifyitems(items):
    mark_slow_tests(items, durations.read())


def mark_slow_tests(items, recorded):
    """The mark `slow` on what a recorded run of the whole suite found to take long."""
    for item in items:
        if item.nodeid in recorded:
            item.add_marker(pytest.mark.slow)
