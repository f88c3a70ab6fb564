"""The folder of a model for the fake vLLM, and an environment as nobody had touched it."""

import json

import pytest
from safetensors.torch import save_file
from support.fake_vllm import EMBED, VOCAB, WIDTH
from support.vllm_engines import table

from appo.rollout.vllm import worker_statistics


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            dict(
                model_type="llama",
                vocab_size=VOCAB,
                max_position_embeddings=256,
                hidden_size=WIDTH,
                intermediate_size=WIDTH,
                num_hidden_layers=1,
                num_attention_heads=1,
            )
        )
    )
    save_file({EMBED: table(0)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_V2_MODEL_RUNNER", "VLLM_NO_USAGE_STATS",
                 "VLLM_LOGGING_LEVEL", "VLLM_CPU_OMP_THREADS_BIND"):  # fmt: skip
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    worker_statistics._sampled.clear()
    worker_statistics._scored.clear()
    yield
    assert (
        worker_statistics._sampled == {} and worker_statistics._scored == {}
    )  # nothing may be left in the worker
