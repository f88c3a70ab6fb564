"""What vLLM is told at its start, and which settings are refused."""

import sys

import pytest
import torch
from support.fake_vllm import BLOCK, FakeLLM
from support.vllm_engines import make

from appo.algo.resolve import resolve
from appo.config import load_config
from appo.errors import ConfigError, EngineError, ModelError
from appo.rollout.vllm import VLLMEngine
from appo.run.plan import _check_engine

# -- what vLLM is told -----------------------------------------------------------------------------


def test_start_arguments(folder):
    make(folder, max_batch=4, prefill_chunk=16, max_context=100)
    a = FakeLLM.last.arguments
    assert a["logprobs_mode"] == "processed_logprobs"
    assert a["enable_prefix_caching"] and a["skip_tokenizer_init"] and not a["async_scheduling"]
    assert a["max_model_len"] == 101 and a["generation_config"] == "vllm"
    assert a["block_size"] == BLOCK and a["kv_cache_memory_bytes"] > 0
    # a split prefill with a seed ends vLLM on a CPU
    assert a["enable_chunked_prefill"] is False and a["max_num_batched_tokens"] >= 101


def test_gpu_keeps_its_own_choices(folder):
    make(folder, cpu=False, max_batch=4, prefill_chunk=16)
    a = FakeLLM.last.arguments
    assert "block_size" not in a and "enable_chunked_prefill" not in a and not a["enforce_eager"]
    assert a["max_num_batched_tokens"] == 16 and "kv_cache_memory_bytes" not in a


def test_further_arguments_reach_vllm(folder):
    make(folder, cpu=False, tensor_parallel_size=2)
    assert FakeLLM.last.arguments["tensor_parallel_size"] == 2


@pytest.mark.parametrize("block", [16, 100])
def test_cpu_block_size(folder, block):
    with pytest.raises(EngineError, match=f"block_size={block}.*multiple of 32"):
        make(folder, block=block)


def test_process_is_left_as_it_was(folder):
    keep = torch.set_num_threads
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    make(folder)
    assert torch.set_num_threads is keep
    assert torch.equal(torch.rand(1), want)


def test_missing_vllm_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(EngineError, match=r"appo\[vllm\].*rollout.engine=native"):
        VLLMEngine(folder)


def test_package_imports_without_vllm():
    import appo.rollout.vllm as package

    assert package.VLLMEngine is VLLMEngine
    assert "vllm" not in sys.modules or not hasattr(sys.modules["appo.rollout.vllm.engine"], "vllm")


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (dict(statistics="roughly"), "exact, full, top"),
        (dict(max_batch=0), "max_batch=0"),
        (dict(max_context=256), "one beyond"),
        (dict(max_context=1), "use 2"),
    ],
)
def test_bad_settings(folder, more, match):
    with pytest.raises(EngineError, match=match):
        make(folder, **more)


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors"):
        make(folder)


# -- configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (["rollout.engine=vllm", "deterministic=true"], "no deterministic mode"),
        (["rollout.statistics=top"], "native engine is always exact"),
    ],
)
def test_contradictions_in_the_configuration(given, match):
    with pytest.raises(ConfigError, match=match):
        load_config("quickstart", given)


def test_a_plan_needs_vllm_and_refuses_approximate_entropies(monkeypatch):
    given = ["rollout.engine=vllm", "rollout.statistics=top"]
    cfg = load_config("quickstart", given)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"appo\[vllm\]"):
        _check_engine(cfg, resolve(cfg.algo))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="approximate.*statistics=exact"):
        _check_engine(cfg, resolve(cfg.algo))
    for fine in (["algo.branch_by=random"], ["algo=grpo"]):
        cfg = load_config("quickstart", [*given, *fine])
        _check_engine(cfg, resolve(cfg.algo))
