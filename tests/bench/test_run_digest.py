"""The digest of a run: every bit of a number counts, seconds and the spelling of a field do not."""

import copy
import importlib.util
import json
import struct
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location(
    "run_digest", ROOT / "bench" / "evidence" / "run_digest.py"
)
run_digest = importlib.util.module_from_spec(spec)
sys.modules["run_digest"] = run_digest
spec.loader.exec_module(run_digest)

RUN = {
    "trees": [
        {
            "format": 1,
            "step": step,
            "task": {"task_id": f"sum-{step}", "messages": [{"role": "user", "content": "1+1?"}]},
            "nodes": [
                {"parent": None, "token_ids": [1, 324, 81], "logprobs": None, "anchor": None},
                {"parent": 0, "token_ids": [7, 2], "logprobs": [-0.25, -3.5e-05], "closed": True,
                 "anchor": [-0.5, -1e-300]},
            ],
            "leaves": [{"node": 1, "reward": 1.0, "branch_z": [0.1, -0.0],
                        "tool_calls": [{"output": "2", "ok": True, "wall_s": 0.037, "tokens": 3}]}],
            "minibatch": 0,
        }
        for step in (1, 2)
    ],
    "metrics": [
        {"step": 0, "kind": "eval", "eval/accuracy": 0.5, "time/eval": 1.25},
        {"step": 1, "kind": "step", "policy/kl_anchor": 0.0056, "policy/log_ratio_behaviour": 0.02,
         "branch/omega_flat": 0.5, "push/crc32": 274387129.0, "memory/kv_mb_peak": 21.7,
         "time/step": 1.5},
    ],
    "branches": [
        {"step": 1, "flat": [True, False], "prompt_id": "sum-1", "shortfall": 0,
         "rows": [{"root": 0, "position": 3, "score": 2.303, "flat": True}]},
    ],
}  # fmt: skip


def places(value, path=()):
    """(path, value) of everything that is neither a record nor a list, without timed fields."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not run_digest.is_timed(key):
                yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from places(inner, (*path, i))
    else:
        yield path, value


PLACES = list(places(RUN))
NUMBERS = [(p, v) for p, v in PLACES if isinstance(v, int | float) and not isinstance(v, bool)]
OTHERS = [(p, v) for p, v in PLACES if (p, v) not in NUMBERS]


def written(folder, run):
    folder.mkdir(parents=True, exist_ok=True)
    for part, records in run.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{part}.jsonl").write_text(lines)
    return folder


def with_value(path, value):
    """The run with one value replaced."""
    run = copy.deepcopy(RUN)
    inner = run
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return run


def renamed(value, names):
    if isinstance(value, dict):
        return {names.get(k, k): renamed(v, names) for k, v in value.items()}
    return [renamed(v, names) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return written(tmp_path_factory.mktemp("digest") / "first", RUN)


def check_change(first, second, path):
    """Only the changed part and the overall digest differ; the comparison finds the place."""
    a, b = run_digest.digest_run(first), run_digest.digest_run(second)
    changed = {name for name in a if a[name] != b[name]}
    assert changed == {"overall", path[0]}, (path, changed)
    found = run_digest.first_difference(first, second)
    assert (found.part, found.record) == path[:2]
    last = next(key for key in reversed(path) if isinstance(key, str))
    assert run_digest.RENAMED.get(last, last) in found.key


@settings(deadline=None, max_examples=200)
@given(place=st.sampled_from(NUMBERS), bit=st.integers(0, 63))
def test_one_bit_of_any_number_changes_the_digest(first, place, bit):
    path, value = place
    if isinstance(value, float):
        (bits,) = struct.unpack(">Q", struct.pack(">d", value))
        other = struct.unpack(">d", struct.pack(">Q", bits ^ 1 << bit))[0]
    else:  # among them every token id
        other = value ^ 1 << bit % 31
    check_change(first, written(first.parent / "second", with_value(path, other)), path)


@pytest.mark.parametrize("place", OTHERS, ids=lambda place: "/".join(map(str, place[0])))
def test_other_values_count_too(first, tmp_path, place):
    path, value = place
    other = (not value) if isinstance(value, bool) else f"{value}x"
    check_change(first, written(tmp_path / "second", with_value(path, other)), path)


@pytest.mark.parametrize("pair", [(1, 1.0), (0.0, -0.0), (1, True), ("1", 1), ([], {}), (None, 0)])
def test_kinds_of_values_are_told_apart(pair):
    assert len({b"".join(run_digest.encoded(v)) for v in pair}) == 2


def test_order_of_records_counts_and_order_of_keys_does_not(first, tmp_path):
    same = {part: [dict(reversed(r.items())) for r in records] for part, records in RUN.items()}
    assert run_digest.digest_run(written(tmp_path / "same", same)) == run_digest.digest_run(first)
    other = RUN | {"trees": RUN["trees"][::-1]}
    found = run_digest.digest_run(written(tmp_path / "other", other))
    assert found["trees"]["sha256"] != run_digest.digest_run(first)["trees"]["sha256"]


def test_seconds_do_not_count(first, tmp_path):
    run = copy.deepcopy(RUN)
    run["metrics"][0]["time/eval"] = 99.0
    run["metrics"][1]["time/added"] = 1.0
    run["trees"][0]["leaves"][0]["tool_calls"][0]["wall_s"] = 5.0
    second = written(tmp_path / "second", run)
    assert run_digest.digest_run(second) == run_digest.digest_run(first)
    assert run_digest.first_difference(first, second) is None


def test_old_and_new_spelling_are_one(first, tmp_path):
    new = renamed(RUN, run_digest.RENAMED)
    assert new != RUN
    second = written(tmp_path / "second", new)
    assert run_digest.digest_run(second) == run_digest.digest_run(first)
    assert run_digest.first_difference(first, second) is None


def test_a_new_row_of_the_table_leaves_recorded_digests_as_they_are(first, tmp_path, monkeypatch):
    before = run_digest.digest_run(first)
    monkeypatch.setitem(run_digest.RENAMED, "shortfall", "missing_points")
    monkeypatch.setitem(run_digest._HASHED_AS, "missing_points", "shortfall")
    second = written(tmp_path / "second", renamed(RUN, {"shortfall": "missing_points"}))
    assert run_digest.digest_run(first) == run_digest.digest_run(second) == before


def test_both_spellings_in_one_record_are_refused(tmp_path):
    run = with_value(("metrics", 1, "policy/kl_old_logp"), 0.5)
    with pytest.raises(SystemExit, match=r"metrics.jsonl:2: .*'policy/kl_old_logp' twice"):
        run_digest.digest_run(written(tmp_path / "both", run))


def test_counts_of_records_and_numbers(first):
    found = run_digest.digest_run(first)
    assert [found[part]["records"] for part in run_digest.PARTS] == [2, 2, 1]
    assert sum(found[part]["numbers"] for part in run_digest.PARTS) == len(NUMBERS)


def test_the_command(first, tmp_path, capsys):
    assert run_digest.main([str(first), "--compare", str(first)]) == 0
    assert "equal bit by bit" in capsys.readouterr().out
    path = ("trees", 1, "nodes", 1, "logprobs", 0)
    second = written(tmp_path / "second", with_value(path, -0.25 - 2**-54))
    file = tmp_path / "digest.json"
    assert run_digest.main([str(first), "--compare", str(second), "--json", str(file)]) == 1
    said = capsys.readouterr().out
    assert "trees.jsonl, record 1, nodes[1].logprobs[0]: -0.25 (bits bfd0000000000000)" in said
    assert "-0.25000000000000006 (bits bfd0000000000001)" in said
    assert json.loads(file.read_text()) == run_digest.digest_run(first)


def test_a_missing_record_is_a_difference(first, tmp_path):
    second = written(tmp_path / "second", RUN | {"trees": RUN["trees"][:1]})
    found = run_digest.first_difference(first, second)
    assert (found.part, found.record, found.right) == ("trees", 1, run_digest.MISSING)


def test_an_incomplete_run_is_refused(first, tmp_path):
    with pytest.raises(SystemExit, match=r"trees.jsonl: no such file"):
        run_digest.digest_run(tmp_path)
    torn = written(tmp_path / "torn", RUN)
    with open(torn / "trees.jsonl", "a") as file:
        file.write('{"step": 3, "no')
    with pytest.raises(SystemExit, match=r"trees.jsonl:3: "):
        run_digest.digest_run(torn)
