"""The memory formulas against published sizes, the settings they repeat, and (through the script) what is measured."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.tiny_models import CONFIGS, SHAPE
from transformers import AutoModelForCausalLM

from appo._kernels.linear_logprob import backend_cpu as linear_cpu
from appo.algo.resolve import resolve
from appo.config import load_config
from appo.learner import zero
from appo.models.shape import read_shape
from appo.run import memory
from appo.run.memory import Training

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "learner" / "memory.py"

QWEN = dict(head_dim=128, tie_word_embeddings=False)
PUBLISHED = {
    "reasoning_7b": (7_615_616_512, QWEN | dict(
        model_type="qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, max_position_embeddings=32768)),
    "deepsearch_8b": (8_190_735_360, QWEN | dict(
        model_type="qwen3", hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=151936, max_position_embeddings=40960)),
    "deepsearch_14b": (14_768_307_200, QWEN | dict(
        model_type="qwen3", hidden_size=5120, intermediate_size=17408, num_hidden_layers=40, num_attention_heads=40,
        num_key_value_heads=8, vocab_size=151936, max_position_embeddings=40960)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_counted_tensor_by_tensor(name):
    cls, extra = CONFIGS[name]
    config = cls(**{**SHAPE, **extra})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = read_shape(config.to_dict())
    assert sorted(shape.tensors()) == sorted(p.numel() for p in model.parameters())


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_the_large_recipes_load_and_fit_eight_gpus(recipe):
    parameters, config = PUBLISHED[recipe]
    shape, cfg = read_shape(config), load_config(recipe)
    assert shape.parameters == parameters
    rows = memory.estimate(shape, cfg, resolve(cfg.algo), 8, context=32768, gpu=True)
    on_gpu = sum(r.bytes for r in rows if not r.host)
    assert on_gpu < 74e9  # of 80, and 6 for what is not computed
    assert cfg.learner.token_budget >= cfg.rollout.max_context  # one row fits a micro-batch
    alone = memory.estimate(shape, cfg, resolve(cfg.algo), 1, context=32768, gpu=True)
    assert sum(r.bytes for r in alone) > 80e9  # and not one


def test_what_makes_room_makes_room():
    shape = read_shape(PUBLISHED["deepsearch_8b"][1])
    base = Training(zero_stage=3, world=8)
    state = memory.state(shape, base)
    assert memory.state(shape, dataclasses.replace(base, world=16)).total < 0.51 * state.total
    assert (
        memory.state(shape, dataclasses.replace(base, zero_stage=2)).weights > 7.9 * state.weights
    )
    lora = memory.state(shape, dataclasses.replace(base, lora_r=16))
    assert lora.moments + lora.masters < 0.01 * (state.moments + state.masters)
    moved = memory.state(shape, dataclasses.replace(base, offload="optimizer"))
    assert moved.host == {"masters", "moments", "gradients"}
    tokens = 8192
    plain = memory.saved(shape, base, tokens)
    checkpointed = dataclasses.replace(base, checkpointing=True)
    assert (
        memory.saved(shape, checkpointed, tokens) + memory.recomputed(shape, checkpointed, tokens)
        < 0.15 * plain
    )
    assert memory.saved(shape, base, 2 * tokens) == 2 * plain


def test_settings_that_are_repeated_here_are_those_of_the_learner():
    assert (memory.BUCKET, memory.KEPT_WHOLE) == (zero.BUCKET, zero.KEPT_WHOLE)
    shape = dataclasses.replace(read_shape(PUBLISHED["reasoning_7b"][1]), vocab=5000)
    for edges in (10, 3000):
        assert memory.head_kept(shape, Training(), edges) == linear_cpu.cache_bytes(edges, 5000)
    assert memory.head_kept(shape, Training(dtype="float32"), 10) == 0
    assert memory.head_kept(shape, Training(), 10**6) == 0  # less than half would fit


@pytest.mark.timeout(400)
def test_formulas_agree_with_what_is_measured(tmp_path):
    """Exact for weights, masters, moments and KV, 2 % with gradients, 10 % for activations: see bench/learner/memory.py."""
    out = tmp_path / "memory.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found = json.loads(out.read_text())
    names = " ".join(c["name"] for c in found["checks"])
    for part in (
        "ZeRO 0",
        "ZeRO 1",
        "ZeRO 2",
        "ZeRO 3",
        "offload optimizer",
        "lora",
        "rank 1 of 2",
        "checkpointing",
        "KV",
    ):
        assert part in names
    assert all(c["good"] for c in found["checks"]) and max(found["on_gpu"].values()) <= 80e9
