"""Models trained on packed trees get the gradients of their rows trained one by one: every loss, every family, every dtype.

The way is the learner's: credits → `pack` → `Policy` → the objective, summed over micro-batches. The other side is
tests/support/tree_gradients.py. float64 runs on the PyTorch definitions, float32 and bfloat16 on the native kernels where they are
built.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from support import tiny_models
from support.tree_gradients import (
    NOW,
    Loss,
    distance,
    drawn_by,
    gradients,
    in_float64,
    one_by_one,
    random_tree,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from appo._kernels.tree_attention import backend_torch as attention_torch
from appo._kernels.tree_attention import op as attention
from appo.algo.credit import assign
from appo.algo.objective import Objective, make_objective
from appo.algo.presets import ALGORITHMS
from appo.learner.policy import Policy, load_model
from appo.packing.pack import PackedBatch, pack
from appo.types import Counts, RolloutTree

torch.set_num_threads(1)

APPO, GRPO = ALGORITHMS["appo"], ALGORITHMS["grpo"]
LOSSES = {
    "appo": Loss(APPO),
    "appo, branches trained": Loss(replace(APPO, train_branches=True, dual_clip=3.0)),
    "appo, token mean, mean credit": Loss(replace(APPO, aggregate="token-mean", credit="mean")),
    "grpo": Loss(GRPO),
    "grpo, mean of sequences": Loss(replace(GRPO, aggregate="seq-mean-token-mean")),
    "grpo, mean of rollouts, no dual clip": Loss(replace(GRPO, aggregate="rollout-mean", dual_clip=None)),
    "grpo, future weight": Loss(replace(GRPO, future_weight=0.5, half_life=4.0, clip_high=0.28)),
    "grpo, entropy bonus, temperature": Loss(GRPO, entropy_coef=0.1, temperature=0.7),
    "appo, old log-probs": Loss(APPO, old_logprobs="old"),
    "appo, old log-probs of the version under training": Loss(APPO, old_logprobs="now"),
    "grpo, old log-probs, no importance weight": Loss(GRPO, old_logprobs="old", importance_cap=None),
}  # fmt: skip
ALL = Loss(
    replace(APPO, train_branches=True, dual_clip=3.0), entropy_coef=0.05, temperature=1.3, old_logprobs="old"
)  # fmt: skip
FAMILIES = ["llama", "llama-tied-mqa", "qwen2", "qwen2-untied-mha", "qwen3", "qwen3-untied"]
WHOLE = 10_000
CUT = 90  # tokens per stream: trees are cut between roots and between rows, their prompts repeated


class Model(NamedTuple):
    """A tiny model in its folder, in float64, and trees whose tokens it has drawn."""

    folder: str
    exact: nn.Module
    trees: list[RolloutTree]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[..., Model]:
    """Called with a family, the loss for which its tokens were drawn, and the seed of weights and trees."""

    @functools.cache
    def weights(name: str, seed: int) -> tuple[str, nn.Module]:
        folder = tmp_path_factory.mktemp(name)
        return str(folder), in_float64(tiny_models.build(name, folder, seed=seed))

    @functools.cache
    def model(name: str, loss: Loss, seed: int = 0) -> Model:
        folder, exact = weights(name, seed)
        rng = np.random.default_rng(seed)
        trees = [random_tree(rng, f"task {i}") for i in range(2)]
        drawn_by(exact, trees, rng, loss)
        return Model(folder, exact, trees)

    return model


def packed(
    trees: list[RolloutTree], loss: Loss, budget: int = WHOLE
) -> tuple[list[PackedBatch], Counts]:
    credit = assign(trees, loss.algo, keep_all=bool(loss.entropy_coef))
    streams = pack(trees, credit.credits, token_budget=budget, keep_all=bool(loss.entropy_coef))
    return streams, credit.counts


def objective_of(loss: Loss) -> Objective:
    return make_objective(
        loss.algo,
        entropy_coef=loss.entropy_coef,
        version=lambda: NOW,
        old_logp_version=lambda: {"none": None, "old": NOW - 1, "now": NOW}[loss.old_logprobs],
        importance_cap=loss.importance_cap,
    )


def on_the_tree(
    policy: Policy, streams: list[PackedBatch], counts: Counts, loss: Loss
) -> dict[str, Tensor]:
    """Gradients, as the learner sums them up."""
    objective = objective_of(loss)
    parts = [objective(policy(s, 1 / loss.temperature), s, counts)[0] for s in streams]
    return gradients(policy.lm, torch.stack(parts).sum())


def rows_of(trees: list[RolloutTree], loss: Loss):
    """Every row that the loss is defined over, those without a gradient too."""
    return assign(trees, loss.algo, keep_all=True).credits


def policy_of(model: Model, dtype: torch.dtype, **settings: bool) -> Policy:
    return Policy(load_model(model.folder, dtype).train(), **settings)


def error(model: Model, loss: Loss, dtype: torch.dtype, budget: int = WHOLE, **settings) -> float:
    got = on_the_tree(policy_of(model, dtype, **settings), *packed(model.trees, loss, budget), loss)
    return distance(got, one_by_one(model.exact, model.trees, rows_of(model.trees, loss), loss))


def test_trees_are_what_they_should_be(models) -> None:
    """Depth, tool spans, forks at both ends, single children; and no term of the losses sleeps."""
    loss = LOSSES["grpo, future weight"]
    model = models("llama", loss)
    trees = model.trees
    nodes = trees[0].nodes

    def depth(i: int) -> int:
        return 0 if nodes[i].parent is None else 1 + depth(nodes[i].parent)

    assert max(map(depth, range(len(nodes)))) >= 5
    children = [[c for c in nodes if c.parent == i] for i in range(len(nodes))]
    assert any(len(c) == 1 for c in children) and any(len(c) > 2 for c in children)
    ends = [(c.fork_at, len(n.token_ids)) for n, own in zip(nodes, children) for c in own]
    assert {1} < {at for at, _ in ends} and any(at == n - 1 for at, n in ends)
    assert any(n.role == "tool" for n in nodes)
    (stream,), counts = packed(trees, loss)
    assert stream.total_tokens > 1.9 * stream.unique_tokens
    assert len(packed(trees, loss, CUT)[0]) > 4
    policy = policy_of(model, torch.float64)
    objective = objective_of(loss)
    stats = policy(stream)
    _, metrics = objective(stats, stream, counts)
    share = {name: float(a) / float(n) for name, (a, n) in metrics.items()}
    assert 0.1 < share["policy/clip_fraction"] < 0.9
    assert 1.5 < share["policy/future_scale"] < 1.6
    d, old = stats.logp.detach() - stream.behavior_logp, stream.version == NOW - 2
    assert ((stream.advantage < 0) & (d > np.log(3)) & old & stream.mask).any()  # dual clip


def test_credits_train_every_token_once(models) -> None:
    """A token that roots and branches share is trained by its root alone, wherever streams are cut."""
    loss = ALL
    model = models("llama", loss)
    for budget in (WHOLE, CUT):
        streams, counts = packed(model.trees, loss, budget)
        seen = [
            (tree, tuple(path_to(model.trees[tree], leaf, at)))
            for s in streams
            for row, (tree, leaf) in enumerate(s.rows)
            for at in s.mask[s.offsets[row] : s.offsets[row + 1]].nonzero()[:, 0].tolist()
        ]
        assert len(seen) == len(set(seen)) == counts.tokens


def path_to(tree: RolloutTree, leaf: int, at: int) -> list[int]:
    """What names a token: the ids from the prompt to response position `at` of a leaf."""
    view = tree.trajectory(leaf)
    return view.token_ids[: view.prompt_len + at + 1].tolist()


@pytest.mark.parametrize("budget", [WHOLE, CUT], ids=["whole", "cut"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_in_float64(models, loss: str, budget: int) -> None:
    assert error(models("llama", LOSSES[loss]), LOSSES[loss], torch.float64, budget) < 1e-10


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_in_float64(models, name: str, checkpointing: bool) -> None:
    """With and without gradient checkpointing: attention runs again in backward, with the same ends."""
    found = error(models(name, ALL), ALL, torch.float64, gradient_checkpointing=checkpointing)
    assert found < 1e-10


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_in_float32(models, loss: str) -> None:
    assert error(models("llama", LOSSES[loss]), LOSSES[loss], torch.float32, CUT) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_in_float32(models, name: str, checkpointing: bool) -> None:
    found = error(models(name, ALL), ALL, torch.float32, gradient_checkpointing=checkpointing)
    assert found < 1e-5


def test_bfloat16_is_no_worse_than_dense(models) -> None:
    """Against the same bf16 weights in float64 the tree is as near as bf16 sequences one by one: the mean square over
    families and losses, since a single pair of rounding errors says little."""
    tree = dense = 0.0
    for name, seed in itertools.product(["llama", "qwen3"], [0, 1]):
        folder = models(name, LOSSES["grpo"], seed).folder
        rounded = in_float64(AutoModelForCausalLM.from_pretrained(folder).bfloat16())
        lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        policy = Policy(load_model(folder, torch.bfloat16))
        for loss in list(LOSSES.values())[seed::2]:
            trees = models(name, loss, seed).trees
            rows = rows_of(trees, loss)
            want = one_by_one(rounded, trees, rows, loss)
            tree += distance(on_the_tree(policy, *packed(trees, loss), loss), want) ** 2
            dense += distance(one_by_one(lm, trees, rows, loss), want) ** 2
    assert 0 < tree <= 1.1 * dense


# -- faults that must not pass


def shifted_labels(s: PackedBatch) -> PackedBatch:
    """The classic: every position predicts the token after the next one."""
    return replace(s, target=s.target.roll(-1))


def of_another_row(s: PackedBatch, *names: str) -> PackedBatch:
    first = int(s.offsets[1])
    return replace(s, **{name: getattr(s, name).roll(first) for name in names})


def branches_trained_on_what_they_inherit(s: PackedBatch) -> PackedBatch:
    """Shared tokens counted once more for each row that they stand in."""
    return replace(
        s, mask=s.version >= 0, advantage=torch.where(s.advantage == 0, 1.0, s.advantage)
    )


STREAM_FAULTS: dict[str, Callable[[PackedBatch], PackedBatch]] = {
    "labels shifted by one": shifted_labels,
    "plain causal mask": lambda s: replace(s, subtree_end=torch.full_like(s.subtree_end, s.unique_tokens)),
    # One token early would not show: the last token of a path predicts nothing.
    "subtrees end a token late": lambda s: replace(s, subtree_end=(s.subtree_end + 1).clamp(max=s.unique_tokens)),
    "positions are indices": lambda s: replace(s, position_ids=torch.arange(s.unique_tokens)),
    "behavior of another row": lambda s: of_another_row(s, "behavior_logp"),
    "old log-probs of another row": lambda s: of_another_row(s, "old_logp"),
    "versions of another row": lambda s: of_another_row(s, "version"),
    "advantages of another row": lambda s: of_another_row(s, "advantage"),
    "inherited tokens counted twice": branches_trained_on_what_they_inherit,
}  # fmt: skip


def mean_over_streams(policy: Policy, streams: list[PackedBatch], loss: Loss) -> dict[str, Tensor]:
    """Every micro-batch divided by its own number of tokens, then averaged."""
    objective = objective_of(loss)
    parts = [
        objective(policy(s), s, Counts(float(s.mask.sum()), len(s.rows), len(s.rows)))[0]
        for s in streams
    ]
    return gradients(policy.lm, torch.stack(parts).mean())


@pytest.mark.parametrize("fault", STREAM_FAULTS)
def test_faults_in_a_stream_are_caught(models, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = ALL
    model = models("llama", loss)
    monkeypatch.setattr(attention, "check_tree", lambda _: None)  # it would refuse some of them
    streams, counts = packed(model.trees, loss)
    want = one_by_one(model.exact, model.trees, rows_of(model.trees, loss), loss)
    policy = policy_of(model, torch.float64)
    assert distance(on_the_tree(policy, streams, counts, loss), want) < 1e-10
    wrong = [STREAM_FAULTS[fault](s) for s in streams]
    assert distance(on_the_tree(policy, wrong, counts, loss), want) > 1e-2


def test_faults_in_the_sums_are_caught(models) -> None:
    """Denominators of each micro-batch, of replicated tokens, and a row that is in two streams."""
    loss = LOSSES["grpo"]
    model = models("llama", loss)
    streams, counts = packed(model.trees, loss, CUT)
    want = one_by_one(model.exact, model.trees, rows_of(model.trees, loss), loss)
    policy = policy_of(model, torch.float64)
    assert distance(mean_over_streams(policy, streams, loss), want) > 1e-2
    twice = on_the_tree(policy, [*streams, streams[0]], counts, loss)
    assert distance(twice, want) > 1e-2
    laid_out = replace(counts, tokens=float(sum(s.unique_tokens for s in streams)))
    assert distance(on_the_tree(policy, streams, laid_out, loss), want) > 1e-2


def test_averaged_gradients_of_shared_tokens_are_caught(models, monkeypatch) -> None:
    loss = LOSSES["grpo"]
    model = models("llama", loss)
    backward = attention_torch.backward

    def averaged(call, kept, d_o, d_lse):
        dq, dk, dv = backward(call, kept, d_o, d_lse)
        users = attention_torch.visible(call.subtree_end, 0, call.subtree_end.shape[0]).sum(0)[
            :, None, None
        ]
        return dq, dk / users, dv / users

    monkeypatch.setattr(attention_torch, "backward", averaged)
    assert error(model, loss, torch.float64) > 1e-2
