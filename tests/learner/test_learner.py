"""The learner against plain autograd on independent sequences, and every promise it makes about bad input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.learner_forest import (
    PROBES,
    AdapterEngine,
    PlainEngine,
    counts_of,
    forest,
    objective,
    relative,
    write_model,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from appo.config import LearnerConfig, LoraConfig, RunContext
from appo.errors import ConfigError, LearnerError, ModelError
from appo.learner.learner import Learner
from appo.learner.lora import CastRetention, dithered_bfloat16
from appo.learner.policy import Policy, load_model
from appo.learner.push_weights import ChecksumStream, push
from appo.learner.zero import learning_rate
from appo.packing.pack import PackedBatch, pack
from appo.types import Counts

FLOAT32 = RunContext(dtype="float32")

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def full(model_dir: Path) -> Iterator[Learner]:
    settings = LearnerConfig(lr=1e-3, max_grad_norm=0.0)
    with Learner(model_dir, settings, seed=0, context=FLOAT32) as learner:
        yield learner


@pytest.fixture
def lora(model_dir: Path, tmp_path: Path) -> Iterator[Learner]:
    settings = LearnerConfig(mode="lora", lr=1e-2, lora=LoraConfig(r=4, layers=1))
    context = RunContext(dtype="float32", dump_dir=str(tmp_path / "dump"))
    with Learner(model_dir, settings, seed=0, context=context) as learner:
        yield learner


def plain_gradients(lm: torch.nn.Module, trees, credits, temperature: float) -> dict[str, Tensor]:
    """The same loss by textbook means: one sequence at a time, causal attention, full softmax, shift by one."""
    tokens = counts_of(credits).tokens
    lm.zero_grad()
    for tree, rows in zip(trees, credits):
        for c in rows:
            view = tree.trajectory(c.leaf)
            ids = torch.from_numpy(view.token_ids)[None]
            logits = lm(ids).logits[0, view.prompt_len - 1 : -1] / temperature
            logp_all = torch.log_softmax(logits, -1)
            logp = logp_all.gather(1, torch.from_numpy(view.response_ids)[:, None])[:, 0]
            entropy = -(logp_all.exp() * logp_all).sum(-1)
            ratio = (logp - torch.from_numpy(view.logprobs)).exp()
            loss = (-ratio * torch.from_numpy(c.advantage) - 0.1 * entropy) * c.weight
            (loss[torch.from_numpy(c.loss_mask)].sum() / tokens).backward()
    return {n: p.grad.clone() for n, p in lm.named_parameters()}


def learner_gradients(
    learner: Learner, batches: list[PackedBatch], counts: Counts
) -> dict[str, Tensor]:
    learner.accumulate(batches, counts, objective, len(batches))
    gradients = learner.gradients()
    for group in learner.engine.optimizer.param_groups:
        group["lr"] = 0.0
    learner.engine.step()  # clears the gradients; with rate 0 nothing moves
    return gradients


def reference_model(learner: Learner) -> torch.nn.Module:
    lm = AutoModelForCausalLM.from_pretrained(learner.model_dir, attn_implementation="eager")
    lm.load_state_dict(learner.lm.state_dict())
    return lm


# -- forward and gradient


def float64_norm(self: torch.nn.Module, x: Tensor) -> Tensor:
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_tree_equals_independent_sequences_in_float64(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path, family)
    trees, credits = forest()
    (batch,) = pack(trees, credits, token_budget=1000)
    batch = replace(
        batch, advantage=batch.advantage.double(), behavior_logp=batch.behavior_logp.double()
    )
    for cs in credits:
        for c in cs:
            c.advantage = c.advantage.astype(np.float32).astype(np.float64)
    # not eager attention: its softmax is float32 as well
    reference = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, attn_implementation="sdpa"
    )
    # theirs is float32 inside; in float64 the learner runs it too
    monkeypatch.setattr(type(reference.model.norm), "forward", float64_norm)
    lm = load_model(path, torch.float64)
    loss, _ = objective(Policy(lm)(batch, 1 / 0.7), batch, counts_of(credits))
    loss.backward()
    expected = plain_gradients(reference, trees, credits, 0.7)
    assert relative({n: p.grad for n, p in lm.named_parameters()}, expected) < 1e-10


def test_gradient_checkpointing_changes_nothing(model_dir: Path) -> None:
    trees, credits = forest()
    (batch,) = pack(trees, credits, token_budget=1000)
    grads = []
    for on in (False, True):
        lm = load_model(model_dir, torch.float32)
        policy = Policy(lm, gradient_checkpointing=on).train()
        assert lm.model.layers[0].gradient_checkpointing == on
        objective(policy(batch), batch, counts_of(credits))[0].backward()
        grads.append({n: p.grad for n, p in lm.named_parameters()})
    assert relative(grads[1], grads[0]) < 1e-6


def test_gradient_through_deepspeed_equals_plain_autograd(full: Learner) -> None:
    trees, credits = forest()
    expected = plain_gradients(reference_model(full), trees, credits, 1.0)
    counts = counts_of(credits)
    for budget in (1000, 40, 25, 1):  # from one micro-batch to one per row
        batches = pack(trees, credits, token_budget=budget)
        assert relative(learner_gradients(full, batches, counts), expected) < 1e-5


SEEDED_BUGS: dict[str, Callable[[PackedBatch], PackedBatch]] = {
    "labels shifted by one": lambda b: replace(b, source=(b.source - 1).clamp(min=0)),
    "causal instead of interval mask": lambda b: replace(
        b, subtree_end=torch.full_like(b.subtree_end, b.unique_tokens)
    ),
    "position in the stream instead of the path": lambda b: replace(
        b, position_ids=torch.arange(b.unique_tokens)
    ),
    "siblings swapped": lambda b: replace(b, target=b.target.flip(0)),
}


@pytest.mark.parametrize("bug", SEEDED_BUGS)
def test_seeded_bugs_are_caught(full: Learner, bug: str) -> None:
    trees, credits = forest()
    expected = plain_gradients(reference_model(full), trees, credits, 1.0)
    (batch,) = pack(trees, credits, token_budget=1000)
    assert (
        relative(learner_gradients(full, [SEEDED_BUGS[bug](batch)], counts_of(credits)), expected)
        > 1e-2
    )


def test_logprobs_are_those_of_the_plain_model(full: Learner) -> None:
    sequences = [[1, 2, 3, 4, 5], [9, 8], [7, 7, 7]]
    lm = reference_model(full)
    for ids, mine in zip(sequences, full.logprobs(sequences, temperature=0.5), strict=True):
        with torch.no_grad():
            logp = torch.log_softmax(lm(torch.tensor([ids])).logits[0, :-1] / 0.5, -1)
        expected = logp.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert np.allclose(mine, expected, atol=1e-5)


def test_old_logp_are_what_training_sees_and_leave_no_trace(full: Learner) -> None:
    trees, credits = forest()
    batches = pack(trees, credits, token_budget=40)
    seen: list[Tensor] = []

    def looking(stats, batch: PackedBatch, counts: Counts):
        seen.append(stats.logp.detach().clone())
        return objective(stats, batch, counts)

    old_logprobs = full.old_logprobs(batches)
    assert all(p.grad is None for p in full.lm.parameters())
    full.accumulate(batches, counts_of(credits), looking, len(batches))
    for group in full.engine.optimizer.param_groups:
        group["lr"] = 0.0
    full.engine.step()
    assert len(old_logprobs) == len(batches) == len(seen) > 1
    for old_logp, logp, batch in zip(old_logprobs, seen, batches, strict=True):
        assert old_logp.dtype == torch.float32 and old_logp.shape == batch.mask.shape
        assert torch.equal(old_logp, logp)
        assert not old_logp[~batch.mask].any()
        assert bool((old_logp[batch.mask] < 0).all())


# -- the optimiser step


def snapshot(learner: Learner) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in learner.lm.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[n], b[n]) for n in a)


def test_training_lowers_the_loss_whatever_the_split(model_dir: Path) -> None:
    trees, credits = forest()
    finals = []
    for budget in (1000, 20):
        with Learner(model_dir, LearnerConfig(lr=1e-3), seed=0, context=FLOAT32) as learner:
            batches = pack(trees, credits, token_budget=budget)
            runs = [
                learner.train_minibatch(batches, counts_of(credits), objective) for _ in range(5)
            ]
            assert runs[-1]["learner/loss"] < runs[0]["learner/loss"] - 0.05
            assert learner.step == 5
            finals.append(runs)
    for one, many in zip(*finals, strict=True):
        assert one["learner/loss"] == pytest.approx(many["learner/loss"], abs=1e-5)
        assert one["entropy"] == pytest.approx(many["entropy"], abs=1e-5)
        assert one["learner/grad_norm"] == pytest.approx(many["learner/grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("stage", "mode", "dtype"), [(2, "lora", "bfloat16"), (3, "full", "float32")]
)
def test_other_zero_stages_train_alike(model_dir: Path, stage: int, mode: str, dtype: str) -> None:
    trees, credits = forest()
    batches = pack(trees, credits, token_budget=30)
    losses, weights = [], []
    for zero_stage in (1, stage):
        settings = LearnerConfig(mode=mode, lr=1e-2, lora=LoraConfig(r=4), zero_stage=zero_stage)  # type: ignore[arg-type]
        with Learner(model_dir, settings, seed=0, context=RunContext(dtype=dtype)) as learner:
            runs = [
                learner.train_minibatch(batches, counts_of(credits), objective) for _ in range(3)
            ]
            losses.append([m["learner/loss"] for m in runs])
            weights.append({n: t.clone() for n, t in learner.named_weights()})
    assert losses[0] == pytest.approx(losses[1], abs=1e-4 if dtype == "float32" else 2e-2)
    assert weights[0].keys() == weights[1].keys()
    for name, w in weights[0].items():
        assert w.shape == weights[1][name].shape
        if dtype == "float32":
            # By norm: Adam divides a gradient by its own size, so one that is all rounding moves its weight anywhere.
            assert (w - weights[1][name]).norm() <= 1e-4 * w.norm()


def test_an_empty_minibatch_is_no_step(lora: Learner) -> None:
    before = snapshot(lora)
    metrics = lora.train_minibatch([], Counts(10.0, 2.0, 2.0), objective)
    assert metrics["learner/empty"] == 1.0
    assert lora.step == 0
    assert same(before, snapshot(lora))


def nan_reward(batch: PackedBatch) -> PackedBatch:
    advantage = batch.advantage.clone()
    advantage[batch.mask.nonzero()[0]] = float("nan")
    return replace(batch, advantage=advantage)


def bad_gradient(stats, batch: PackedBatch, counts: Counts):
    """Finite loss, NaN gradient: the root of zero."""
    loss, metrics = objective(stats, batch, counts)
    return loss + (stats.logp[batch.mask].sum() * 0).abs().sqrt(), metrics


def infinite_loss(stats, batch: PackedBatch, counts: Counts):
    loss, metrics = objective(stats, batch, counts)
    return loss + float("inf"), metrics


@pytest.mark.parametrize(
    ("spoil", "loss_fn", "reason"),
    [
        (nan_reward, objective, "advantage"),
        (
            lambda b: replace(b, behavior_logp=b.behavior_logp - float("inf")),
            objective,
            "behavior log-prob",
        ),
        (lambda b: b, infinite_loss, "loss"),
        (lambda b: b, bad_gradient, "gradient"),
    ],
)
def test_what_is_not_finite_never_reaches_weights(
    lora: Learner, spoil, loss_fn, reason: str
) -> None:
    trees, credits = forest()
    batches, counts = pack(trees, credits, token_budget=30), counts_of(credits)
    lora.train_minibatch(batches, counts, objective)
    before, moments = snapshot(lora), optimizer_state(lora)
    bad = [batches[0], spoil(batches[1]), *batches[2:]]
    for _ in range(2):
        metrics = lora.train_minibatch(bad, counts, loss_fn)
        assert metrics["learner/nonfinite"] == 1.0
    assert same(before, snapshot(lora))
    assert all(torch.equal(a, b) for a, b in zip(moments, optimizer_state(lora), strict=True))
    assert lora.step == 1
    with pytest.raises(LearnerError, match=f"3 mini-batches in a row.*{reason}") as caught:
        lora.train_minibatch(bad, counts, loss_fn)
    (dump,) = Path(lora.context.dump_dir or "").glob("*.pt")
    assert str(dump) in str(caught.value)
    saved = torch.load(dump, weights_only=False)
    assert torch.equal(saved["batches"][0]["token_ids"], batches[0].token_ids)
    assert same(before, snapshot(lora))
    good = lora.train_minibatch(
        batches, counts, objective
    )  # the state is clean: training can go on
    assert good["learner/nonfinite"] == 0.0
    assert not same(before, snapshot(lora))


def optimizer_state(learner: Learner) -> list[Tensor]:
    inner = learner.engine.optimizer.optimizer
    return [
        v.clone() for state in inner.state.values() for v in state.values() if isinstance(v, Tensor)
    ]


@pytest.mark.parametrize(
    ("stage", "dtype"), [(1, "bfloat16"), (2, "bfloat16"), (3, "float32"), (0, "float32")]
)
def test_every_zero_optimiser_refuses_nan(model_dir: Path, stage: int, dtype: str) -> None:
    trees, credits = forest()
    batches, counts = pack(trees, credits, token_budget=30), counts_of(credits)
    lora = LoraConfig(r=4, layers=1)
    settings = LearnerConfig(mode="lora", lr=1e-2, lora=lora, zero_stage=stage)
    finals = []
    for spoiled in (True, False):
        with Learner(model_dir, settings, seed=0, context=RunContext(dtype=dtype)) as learner:
            if spoiled:
                bad = [batches[0], nan_reward(batches[1])]
                assert learner.train_minibatch(bad, counts, objective)["learner/nonfinite"] == 1.0
            learner.train_minibatch(batches, counts, objective)
            finals.append({n: t.clone() for n, t in learner.named_weights()})
    assert same(*finals)  # as if the bad one had never been


def test_a_good_minibatch_resets_the_count(lora: Learner) -> None:
    trees, credits = forest()
    good, counts = pack(trees, credits, token_budget=1000), counts_of(credits)
    bad = [nan_reward(good[0])]
    for batch in (bad, bad, good, bad, bad):
        metrics = lora.train_minibatch(batch, counts, objective)
    assert metrics["learner/nonfinite_total"] == 4.0
    assert lora.guard.in_a_row == 2


def test_learning_rate_schedules() -> None:
    s = LearnerConfig(lr=1.0, warmup_steps=2, schedule="linear")
    assert [learning_rate(s, i, 6) for i in range(7)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    cosine = replace(s, schedule="cosine")
    assert [learning_rate(cosine, i, 6) for i in (2, 4, 6)] == pytest.approx([1.0, 0.5, 0.0])
    assert learning_rate(replace(s, schedule="constant"), 100, 6) == 1.0


# -- adapters and weights


def test_adapters_train_the_last_layers_only_and_reach_the_merged_weights(
    lora: Learner, tmp_path: Path
) -> None:
    trees, credits = forest()
    base = AutoModelForCausalLM.from_pretrained(lora.model_dir)
    before = {n: p.clone() for n, p in lora.lm.named_parameters() if ".lora_" not in n}
    start = {n: t.clone() for n, t in lora.named_weights()}
    own = dict(base.named_parameters())
    assert len(start) == 7
    assert all(n.startswith("model.layers.1.") and torch.equal(t, own[n]) for n, t in start.items())

    for _ in range(3):
        lora.train_minibatch(pack(trees, credits, token_budget=1000), counts_of(credits), objective)
    moved = {n: t.clone() for n, t in lora.named_weights()}
    assert all(not torch.equal(t, start[n]) for n, t in moved.items())
    assert all(torch.equal(p, before[n]) for n, p in lora.lm.named_parameters() if n in before)

    lora.save_hf(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    merged_own = dict(merged.named_parameters())
    assert all(torch.equal(p, moved.get(n, own[n])) for n, p in merged_own.items())
    ids = [4, 8, 15, 16, 23, 42]
    with torch.no_grad():
        logp = torch.log_softmax(merged(torch.tensor([ids])).logits[0, :-1], -1)
    expected = logp.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert np.allclose(lora.logprobs([ids])[0], expected, atol=1e-4)
    assert (tmp_path / "tokenizer.json").exists()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 1000


def test_a_small_adapter_survives_the_merge_into_bfloat16(model_dir: Path) -> None:
    settings = LearnerConfig(mode="lora", lr=1e-5, lora=LoraConfig(r=4))
    with Learner(model_dir, settings, seed=0) as learner:
        base = dict(
            AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).named_parameters()
        )
        for name, merged in learner.named_weights():
            assert torch.equal(merged, base[name])  # nothing trained, nothing changed
        trees, credits = forest()
        learner.train_minibatch(
            pack(trees, credits, token_budget=1000), counts_of(credits), objective
        )
        retention, nearest = CastRetention(), CastRetention()
        first = {n: t.clone() for n, t in learner.named_weights(retention)}
        assert retention.value == pytest.approx(1.0, abs=0.3)
        assert all(torch.equal(t, first[n]) for n, t in learner.named_weights())
        for name, module in learner.lm.named_modules():
            if name + ".weight" in first and hasattr(module, "lora_A"):
                a, b = (
                    getattr(module, k)["default"].weight.detach().float()
                    for k in ("lora_A", "lora_B")
                )
                delta = module.scaling["default"] * b @ a
                w = base[name + ".weight"].float()
                rounded = (w + delta).bfloat16().float()
                nearest.along += float(((rounded - w) * delta).sum())
                nearest.delta += float(delta.square().sum())
        assert nearest.value < 0.3  # what the usual cast would have delivered


def test_dithered_rounding_is_unbiased_and_picks_a_neighbour() -> None:
    x = torch.linspace(-3, 3, 64 * 1000).reshape(64, 1000)
    q = dithered_bfloat16(x).float()
    step = 2.0 ** (torch.floor(torch.log2(x.abs())) - 7)
    assert bool(((q - x).abs() < step).all())
    assert float((q - x).mean(1).abs().max()) < 3e-4  # a step is up to 1.6e-2
    exact = x.bfloat16().float()
    assert torch.equal(dithered_bfloat16(exact).float(), exact)


@pytest.mark.parametrize("tied", [True, False])
def test_full_weights_have_the_names_of_the_folder(tmp_path: Path, tied: bool) -> None:
    path = write_model(tmp_path / "in", "llama", tied)
    with Learner(path, LearnerConfig(), seed=0, context=FLOAT32) as learner:
        names = [n for n, _ in learner.named_weights()]
        assert ("lm_head.weight" in names) is not tied
        assert names.count("model.embed_tokens.weight") == 1
        assert len(names) == len(set(names)) == 2 * 9 + 2 + (not tied)
        assert learner.parameter_counts()["trainable"] == learner.parameter_counts()["total"]
        learner.save_hf(tmp_path / "out")
    a, b = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (path, tmp_path / "out"))
    assert a.keys() == b.keys()
    assert same(a, b)


def test_a_push_arrives_and_a_skipped_tensor_stops_the_run(lora: Learner) -> None:
    trees, credits = forest()
    for _ in range(3):
        lora.train_minibatch(pack(trees, credits, token_budget=1000), counts_of(credits), objective)
    engine = PlainEngine(lora.model_dir)
    metrics = push(lora, engine, 7, PROBES)
    assert metrics["push/probe_max"] < 1e-4
    assert metrics["push/tensors"] == 7.0
    assert metrics["push/adapter_gain"] == pytest.approx(1.0, abs=1e-3)
    assert engine.sequences == {0: [], 1: []}  # every probe was released

    for skip in ("q_proj", "down_proj", "v_proj"):
        with pytest.raises(
            LearnerError, match=r"disagree after push of policy version 8.*may be 0\.001"
        ):
            push(lora, PlainEngine(lora.model_dir, skip=skip), 8, PROBES)
    with pytest.raises(LearnerError, match="reports version 7"):
        push(lora, PlainEngine(lora.model_dir, version_lag=1), 8, PROBES)
    with pytest.raises(LearnerError, match="stopped reading after 1 tensors"):
        push(lora, PlainEngine(lora.model_dir, stop_early=True), 8, PROBES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3,), (7, 5), (64, 33), (513,)])
def test_the_checksum_of_a_push_sees_every_byte(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    def checksum(name: str, tensor: Tensor) -> int:
        stream = ChecksumStream([(name, tensor)])
        assert [n for n, _ in stream] == [name]
        return stream.crc

    whole = torch.randn(torch.Size(shape).numel() + 1, dtype=dtype)
    part = whole[1:].view(shape)  # begins in the middle of a word
    expected = checksum("w", part)
    assert checksum("w", part.clone()) == expected
    assert checksum("v", part) != expected
    for at in {0, part.numel() // 2, part.numel() - 1}:
        other = part.clone()
        other.view(-1).view(torch.uint8)[at * part.element_size()] ^= 1
        assert checksum("w", other) != expected


def test_an_engine_that_applies_adapters_gets_them_with_their_scale(lora: Learner) -> None:
    trees, credits = forest()
    for _ in range(3):
        lora.train_minibatch(pack(trees, credits, token_budget=1000), counts_of(credits), objective)
    metrics = push(lora, AdapterEngine(lora.model_dir), 1, PROBES)
    assert metrics["push/tensors"] == 14.0
    assert metrics["push/probe_max"] < 1e-4
    with pytest.raises(LearnerError, match="disagree after push"):
        push(lora, AdapterEngine(lora.model_dir, skip="v_proj"), 1, PROBES)


# -- settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "lora", "lora": LoraConfig(layers=3)}, "lora.layers is 3, but the model has 2"),
        (
            {"mode": "lora", "lora": LoraConfig(targets=["q_proj", "c_attn"])},
            r"\['c_attn'\].*q_proj",
        ),
        ({"lora": LoraConfig(r=0)}, "lora.r is 0"),
        ({"mode": "qlora"}, "learner.mode='qlora'.*one of lora, full"),
        ({"lr": 0.0}, "learner.lr"),
        ({"schedule": "cosine"}, "run has .* 0 updates"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0, but must not be negative"),
        ({"betas": [0.9]}, "two numbers"),
        ({"zero_stage": 0}, "master weights"),
        ({"offload": "disk"}, "learner.offload='disk'.*one of none"),
        (
            {"offload": "optimizer", "zero_stage": 0},
            "offload is optimizer and learner.zero_stage is 0; .* learner.zero_stage=1 or above",
        ),
        ({"offload": "all", "zero_stage": 2}, "needs learner.zero_stage=3"),
    ],
)
def test_settings_that_cannot_work_are_refused(model_dir: Path, change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Learner(model_dir, LearnerConfig(**change), seed=0)


def test_a_folder_without_a_model_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load a model"):
        Learner(tmp_path, LearnerConfig(), seed=0)
