"""Stop callbacks of the vLLM backend: they may raise, cancel and release."""

import pytest
from support.fake_vllm import FakeLLM
from support.vllm_engines import OTHER, PROMPT, make, run, sample, submit

from appo.errors import EngineError


def three(engine, stop, n=(1, 4, 1)):
    """Three sequences of one prompt, decoding in this order; `stop` is the second one's callback."""
    seqs = [engine.add_prompt(PROMPT) for _ in range(3)]
    for i, seq in enumerate(seqs):
        submit(engine, seq, n=n[i], seed=i, stop=stop if i == 1 else None)
    return seqs


@pytest.mark.parametrize("statistics", ["exact", "full"])
@pytest.mark.parametrize("error", [ValueError("a parser error"), KeyboardInterrupt()])
def test_a_callback_that_raises_loses_nothing(folder, statistics, error):
    """Neither what stopped before it in the step, nor what comes after it, nor its own token."""
    seen = []

    def stop(token):
        seen.append(token)
        if len(seen) == 1:
            raise error
        return False

    engine = make(folder, statistics=statistics)
    seqs = three(engine, stop, n=(1, 4, 3))
    says = "stop callback of sequence 1 raised ValueError.*step.., or cancel"
    expected = (EngineError, says) if isinstance(error, Exception) else (KeyboardInterrupt, None)
    with pytest.raises(expected[0], match=expected[1]) as info:
        engine.step()
    assert error in (info.value, info.value.__cause__)
    assert engine.has_work() and [engine.length(s) for s in seqs] == [71, 71, 71]
    for call in (lambda: engine.append(seqs[0], [1]), lambda: submit(engine, seqs[0])):
        with pytest.raises(EngineError, match="it is decoding"):
            call()  # its event has not been handed out
    events, undisturbed = run(engine), make(folder, statistics=statistics)
    three(undisturbed, None, n=(1, 4, 3))
    assert events == run(undisturbed) and seen == events[seqs[1]].token_ids


@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize("n", [1, 4])
def test_a_callback_may_cancel_and_release(folder, answer, n):
    """Itself, one that stopped earlier in the step, one whose output is still to be taken; vLLM may
    be done with all.
    """
    engine = make(folder)

    def stop(token):
        for seq in seqs[:2]:
            engine.cancel(seq)
        if seqs[2] in engine.sequences.by_handle:
            engine.release(seqs[2])
        return answer

    seqs = three(engine, stop, n=(1, n, n))
    assert engine.step() == [] and not engine.has_work()
    assert engine.tokens(seqs[0]) == engine.tokens(seqs[1]) == PROMPT
    assert FakeLLM.last.llm_engine.requests == {}
    assert len(sample(engine).token_ids) == 8


def test_a_callback_may_not_step_or_score(folder):
    engine, problems = make(folder), []

    def stop(token):
        for call in (engine.step, lambda: engine.score([seqs[0]])):
            with pytest.raises(EngineError, match="a step is under way") as info:
                call()
            problems.append(info)
        return True

    seqs = [engine.add_prompt(OTHER), *three(engine, stop)]
    assert len(run(engine)) == 3 and len(problems) == 2


def test_a_callback_that_raises_during_a_score(folder):
    """The score is given up, what stopped beside it is not."""
    engine = make(folder)
    seqs = three(engine, lambda token: 1 / 0, n=(1, 1, 1))
    with pytest.raises(EngineError, match="raised ZeroDivisionError"):
        engine.score([engine.add_prompt(OTHER)])
    assert sorted(e.seq for e in engine.step()) == seqs and not engine.has_work()


def test_a_sequence_that_vllm_ends_takes_no_other_with_it(folder):
    engine = make(folder)
    seqs = three(engine, None, n=(1, 4, 1))
    core = FakeLLM.last.llm_engine
    core.requests[core.seen[1].key].sampling_params.max_tokens = 1
    with pytest.raises(
        EngineError, match="vLLM ended sequence 1 by itself .finish_reason='length'"
    ):
        engine.step()
    assert sorted(e.seq for e in engine.step()) == [seqs[0], seqs[2]] and not engine.has_work()
    engine.append(seqs[1], [1])  # it can go on
    submit(engine, seqs[1], n=2)
    assert engine.length(seqs[1]) + 2 == 74 and len(run(engine)[seqs[1]].token_ids) == 2


def test_entropies_that_the_worker_does_not_have(folder):
    engine = make(folder)
    seqs = three(engine, None)
    take = FakeLLM.last.appo_take_sampled
    lost = FakeLLM.last.llm_engine.seen[0].key
    FakeLLM.last.appo_take_sampled = lambda keys: {k: v for k, v in take(keys).items() if k != lost}
    with pytest.raises(EngineError, match="no distribution for token 0 of sequence 0"):
        engine.step()
    assert sorted(run(engine)) == seqs[1:]
