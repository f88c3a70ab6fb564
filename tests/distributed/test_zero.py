"""ZeRO in every arrangement is the same training as plain PyTorch on one process, and goes on in any other arrangement.

One launch of two ranks does everything that needs two; this process is the world of one.

Tolerances, with the largest differences seen after six steps in brackets. float32 differs by rounding only, from the order
of sums over streams and ranks: losses and norms 2e-6 (3.5e-7), weights 1e-6 (5e-8). bfloat16 against plain float32 is the
rounding of the model itself: 8e-2 (5e-2) and 1e-2 (4e-3); between two arrangements of bfloat16 a stream's gradient is rounded
(4e-3) before it enters the float32 sum: 2e-2 (4e-3). What is loaded is equal bit by bit.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.learner_forest import counts_of, forest, write_model
from support.rank_runs import run

from appo.config import LoraConfig
from appo.errors import CheckpointError
from appo.learner.learner import Learner
from appo.learner.lora import add_lora, merged_tensors
from appo.learner.policy import Policy, load_model
from appo.learner.zero import learning_rate
from appo.packing.pack import pack

sys.path.insert(0, str(Path(__file__).parent))
import zero_cases
from zero_cases import (
    CASES,
    CONTINUED,
    FAULTS,
    RESUMED,
    SAVED_AGAIN_AT,
    SAVED_AT,
    STEPS,
    Case,
)

torch.set_num_threads(1)
LIMIT = {"float32": 2e-6, "bfloat16": 8e-2}
WEIGHT_LIMIT = {"float32": 1e-6, "bfloat16": 1e-2}
ARRANGED_LIMIT = {"float32": 1e-6, "bfloat16": 2e-2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def alone(model: Path, folder: Path) -> dict[str, Any]:
    """Every case in one process: metrics per step and the weights at the end; checkpoints are left in FOLDER/one."""
    seen: dict[str, Any] = {}
    with zero_cases.everything_partitioned():
        for case in CASES:
            with zero_cases.start(model, case) as learner:
                seen[case.name] = zero_cases.train(learner, range(SAVED_AT))
                if case in RESUMED:
                    learner.save(folder / "one" / case.name)
                seen[case.name] += zero_cases.train(learner, range(SAVED_AT, STEPS))
                seen["weights " + case.name] = zero_cases.weights(learner)
    return seen


@pytest.fixture(scope="module")
def together(model: Path, folder: Path, alone: dict[str, Any]) -> dict[str, Any]:
    """The same on two ranks, and all the checks of zero_cases.main."""
    run(2, Path(zero_cases.__file__), model, folder, timeout=500)
    first, second = (json.loads((folder / f"seen_by_{r}.json").read_text()) for r in (0, 1))
    assert first == second  # metrics are over all ranks, on every rank
    return first


def plain(model: Path, case: Case) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """The same training in textbook PyTorch: one stream, one process, torch.optim.AdamW, no DeepSpeed. float32"""
    s, context = case.settings, case.context
    torch.manual_seed(0)
    lm = load_model(model, torch.float32)
    if case.mode == "lora":
        add_lora(lm, r=s.lora.r, alpha=s.lora.alpha, targets=s.lora.targets)
    policy, params = Policy(lm), [p for p in lm.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(params, lr=s.lr, eps=s.eps, weight_decay=s.weight_decay)
    trees, credits = forest()
    (batch,) = pack(trees, credits, token_budget=1000)
    seen = []
    for step in range(STEPS):
        loss, _ = zero_cases.objective(
            policy(batch, 1 / context.temperature), batch, counts_of(credits)
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, s.max_grad_norm)
        assert norm > s.max_grad_norm  # clipping is at work
        adam.param_groups[0]["lr"] = learning_rate(s, step, context.total_steps)
        adam.step()
        adam.zero_grad()
        seen.append({"learner/loss": loss.item(), "learner/grad_norm": norm.item()})
    return seen, {n: t.clone() for n, t in merged_tensors(lm)}


@pytest.fixture(scope="module")
def reference(model: Path) -> dict[str, Any]:
    return {mode: plain(model, Case(1, mode)) for mode in ("full", "lora")}


def gap(a: list[dict[str, float]], b: list[dict[str, float]]) -> float:
    """The largest relative difference of losses and gradient norms. Losses change sign: relative to 1 as well."""
    assert len(a) == len(b)
    return max(
        abs(x[k] - y[k]) / max(abs(x[k]), 1.0)
        for x, y in zip(a, b)
        for k in ("learner/loss", "learner/grad_norm")
    )


def weight_gap(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n].float() - b[n].float()).norm() / b[n].float().norm()) for n in a)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_one_rank_and_plain_pytorch(
    case: Case, alone: dict[str, Any], reference: dict[str, Any]
) -> None:
    steps, weights = reference[case.mode]
    assert gap(alone[case.name], steps) < LIMIT[case.dtype]
    assert weight_gap(alone["weights " + case.name], weights) < WEIGHT_LIMIT[case.dtype]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_two_ranks_and_plain_pytorch(
    case: Case,
    alone: dict[str, Any],
    together: dict[str, Any],
    reference: dict[str, Any],
    folder: Path,
) -> None:
    assert gap(together[case.name], alone[case.name]) < ARRANGED_LIMIT[case.dtype]
    steps, weights = reference[case.mode]
    assert gap(together[case.name], steps) < LIMIT[case.dtype]
    assert weight_gap(torch.load(folder / f"{case.name}.pt"), weights) < WEIGHT_LIMIT[case.dtype]
    assert [m["learner/micro_batches"] for m in together[case.name]] == [1, 3, 2, 1, 3, 2]
    assert together[case.name][-1]["learner/lr"] == learning_rate(
        case.settings, STEPS - 1, case.context.total_steps
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_between_ranks_are_seen(
    fault: str, together: dict[str, Any], reference: dict[str, Any]
) -> None:
    assert gap(together["faulty " + fault], reference["full"][0]) > 100 * LIMIT["float32"]


# -- another number of ranks, another stage


def whole(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Masters and moments of a checkpoint, put together from its shards without the code under test."""
    out: dict[str, torch.Tensor] = {}
    for file in sorted((checkpoint / "zero").glob("rank_*.pt")):
        shard = torch.load(file)
        for name, (start, numel) in shard["places"].items():
            for kind in ("master", "exp_avg", "exp_avg_sq"):
                shape = json.loads((checkpoint / "learner.json").read_text())["trained"][name]
                full = out.setdefault(
                    f"{kind} {name}", torch.full((torch.Size(shape).numel(),), float("nan"))
                )
                full[start : start + numel] = shard[kind][name]
    return out


@pytest.mark.parametrize("case", RESUMED, ids=lambda c: c.name)
def test_two_ranks_load_what_one_saved_bit_by_bit(
    case: Case, together: dict[str, Any], folder: Path
) -> None:
    one, two = whole(folder / "one" / case.name), whole(folder / "loaded" / case.name)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[n], two[n]) for n in one)  # NaN, an element in no shard, is unequal
    frozen = [n for n in one if ".lora_" not in n] if case.mode == "lora" else []
    assert not frozen
    parts = [file.stat().st_size for file in (folder / "loaded" / case.name / "zero").iterdir()]
    if case.stage:
        assert max(parts) < 1.2 * min(parts)  # each rank wrote its half


@pytest.mark.parametrize("case", CONTINUED, ids=lambda c: c.name)
def test_from_one_rank_to_two_and_back(
    case: Case, model: Path, alone: dict[str, Any], together: dict[str, Any], folder: Path
) -> None:
    limit = ARRANGED_LIMIT[case.dtype]
    expected = alone[case.name]
    between = together["resumed " + case.name]
    assert gap(between, expected[SAVED_AT:SAVED_AGAIN_AT]) < limit
    # … and into another stage on the way
    stage = case.stage % 3 + 1
    with (
        zero_cases.everything_partitioned(),
        zero_cases.start(model, replace(case, stage=stage), seed=7) as learner,
    ):
        learner.load(folder / "two" / case.name)
        assert learner.step == SAVED_AGAIN_AT
        last = zero_cases.train(learner, range(SAVED_AGAIN_AT, STEPS))
    assert gap(last, expected[SAVED_AGAIN_AT:]) < limit


def test_random_states_of_ranks_that_were_not_there(model: Path, tmp_path: Path) -> None:
    """A rank goes on where it stopped; a new one gets a state of its own, the same at every load."""
    from appo.learner.shards import load_shards

    with zero_cases.start(model, Case(1)) as learner:
        learner.save(tmp_path)
        expected = torch.rand(3)
        drawn = []
        for rank in (0, 1, 2, 1):
            load_shards(tmp_path, learner.engine, learner.lm, rank, 1)
            drawn.append(torch.rand(3))
    assert torch.equal(drawn[0], expected)
    assert torch.equal(drawn[1], drawn[3])
    assert not torch.equal(drawn[1], drawn[0]) and not torch.equal(drawn[1], drawn[2])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"lora": LoraConfig(r=4, targets=["q_proj", "v_proj"])},
            r"lora is .* in the checkpoint and .*v_proj",
        ),
        ({"mode": "full"}, "mode is 'lora' in the checkpoint and 'full' in this run"),
        ({}, "dtype is 'float32' in the checkpoint"),
    ],
)
def test_a_checkpoint_of_other_parameters_is_refused(
    change: dict[str, Any], words: str, model: Path, alone: dict[str, Any], folder: Path
) -> None:
    case = Case(1, "lora")
    settings = replace(case.settings, **change)
    context = case.context if change else replace(case.context, dtype="bfloat16")
    with (
        Learner(model, settings, seed=0, context=context) as learner,
        pytest.raises(CheckpointError, match=words),
    ):
        learner.load(folder / "one" / Case(1, "lora").name)


def test_a_damaged_shard_is_refused(model: Path, tmp_path: Path) -> None:
    with zero_cases.start(model, Case(2, "lora")) as learner:
        learner.save(tmp_path)
        file = tmp_path / "zero" / "rank_0.pt"
        file.write_bytes(file.read_bytes()[:3000])
        with pytest.raises(CheckpointError, match=r"rank_0.pt cannot be read"):
            learner.load(tmp_path)
        saved = json.loads((tmp_path / "learner.json").read_text())
        (tmp_path / "learner.json").write_text(json.dumps(saved | {"world_size": 3}))
        with pytest.raises(
            CheckpointError,
            match=r"written by 3 ranks, and zero/rank_1.pt is missing \(as are 1 more",
        ):
            learner.load(tmp_path)
