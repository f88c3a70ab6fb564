"""A tiny model and an engine on it; a test file that needs another model has fixtures of the same
names.
"""

import pytest
from support.tiny_models import build

from appo.rollout.native import NativeEngine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build("qwen3", path)
    return path


@pytest.fixture
def engine(folder):
    return NativeEngine(folder, dtype="float32", max_batch=8, prefill_chunk=16)
