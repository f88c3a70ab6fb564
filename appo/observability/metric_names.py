"""Every key of a line of metrics.jsonl: its unit and its meaning. docs/metrics.md is made from it.

Tests hold the table to the code: a key that a run writes stands here, and a name here has a writer.
"""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """unit: what a value counts; "1" is a plain number, "0..1" a share.

    meaning: one sentence for users.
    """

    unit: str
    meaning: str


# What a step or an evaluation is about, by the part of a name before the slash.
GROUPS = {
    "": "The line itself",
    "eval": "Evaluation on held-out questions",
    "reward": "Rewards of the step's leaves",
    "format": "Format",
    "tool": "Tool calls",
    "rollout": "Sampled tokens",
    "tokens": "Tokens of the step's trees",
    "branch": "Branch points",
    "group": "Groups of rollouts",
    "grade": "Graders",
    "learn": "What was trained",
    "learner": "Optimizer",
    "policy": "Means over trained tokens",
    "pack": "Packing",
    "push": "Weights to the engine",
    "engine": "Work of the rollout engine in the step",
    "memory": "Memory",
    "time": "Seconds, of the slowest rank",
}

METRICS = {
    "step": Metric("steps", "Number of the training step; an evaluation has that of the step before it."),
    "kind": Metric("word", "`step` or `eval`."),
    "nonfinite": Metric("names", "Keys of this line that were NaN or infinite, and are null; absent where none was."),

    "eval/accuracy": Metric("0..1", "Share of graded questions whose answer is right."),
    "eval/accuracy_low": Metric("0..1", "Lower end of the 95 % Wilson interval of `eval/accuracy`."),
    "eval/accuracy_high": Metric("0..1", "Upper end of the 95 % Wilson interval of `eval/accuracy`."),
    "eval/tool_use": Metric("0..1", "Share of graded questions with at least one successful tool call."),
    "eval/questions": Metric("questions", "Questions that were graded."),
    "eval/errors": Metric("questions", "Questions whose grader failed; they are in no share."),
    "eval/truncated": Metric("0..1", "Share of graded questions cut off by a length limit."),

    "reward/mean": Metric("reward", "Mean over graded leaves, roots and branches alike."),
    "reward/roots": Metric("reward", "Mean over graded roots alone: comparable between algorithms."),
    "reward/std": Metric("reward", "Population standard deviation over graded leaves."),
    "reward/accuracy": Metric("0..1", "Share of graded leaves whose answer is right."),
    "format/ok": Metric("0..1", "Share of graded leaves that pass the format gate."),

    "tool/use": Metric("0..1", "Share of leaves with at least one successful call."),
    "tool/calls": Metric("calls", "Distinct calls per leaf; a call shared by branches counts once."),
    "tool/errors": Metric("0..1", "Share of distinct calls that did not succeed."),

    "rollout/entropy": Metric("nats", "Mean entropy of the policy where a token was sampled, as the engine reported it."),
    "rollout/truncated": Metric("0..1", "Share of leaves cut off by a length limit."),
    "tokens/unique": Metric("tokens", "Tokens of all trees, shared ones once."),
    "tokens/total": Metric("tokens", "Tokens of all leaves as sequences of their own."),
    "tokens/generated": Metric("tokens", "Tokens that the policy sampled."),

    "branch/points": Metric("points", "Branches that were forked."),
    "branch/strict": Metric("0..1", "Share of points where both z-scores were positive; the rest were filled by entropy."),
    "branch/shortfall": Metric("points", "Branch slots without any eligible position."),
    "branch/omega_uninformative": Metric("0..1", "Share of roots for which Ω said nothing; only with `algo.branch_by=score`."),

    "group/zero_variance": Metric("prompts", "Prompts whose leaves give no advantage, for example all rewards equal."),
    "group/ungraded_leaves": Metric("leaves", "Leaves without reward because their grader failed; not trained."),
    "grade/errors": Metric("leaves", "Leaves whose grader failed."),
    "grade/error:*": Metric("leaves", "Of those, by the first word of the grader's error."),

    "learn/rows": Metric("rows", "Leaves with an advantage that is not 0 everywhere: those that were trained."),
    "learn/tokens": Metric("tokens", "Tokens that the learner computed, shared ones once."),
    "learner/loss": Metric("1", "Loss of a mini-batch, mean over those of the step."),
    "learner/grad_norm": Metric("1", "Norm of the gradient before clipping, mean over mini-batches."),
    "learner/lr": Metric("1", "Learning rate of the last mini-batch."),
    "learner/empty": Metric("mini-batches", "Mini-batches without a row to train: no optimizer step."),
    "learner/nonfinite": Metric("mini-batches", "Mini-batches skipped because loss or gradient was not finite."),
    "learner/nonfinite_total": Metric("mini-batches", "The same since the start of the run."),
    "learner/micro_batches": Metric("micro-batches", "Forward and backward passes per rank."),

    "policy/version": Metric("updates", "Optimizer steps the weights have seen after this step."),
    "policy/entropy": Metric("nats", "Entropy of the policy under training."),
    "policy/clip_fraction": Metric("0..1", "Share of tokens whose ratio was clipped."),
    "policy/kl_old_logp": Metric("nats", "KL(old ‖ current) by its k3 estimate, r − 1 − log r."),
    "policy/log_ratio_abs": Metric("nats", "|logp − old_logp|: what the updates of this step moved."),
    "policy/log_ratio_behavior": Metric("nats", "|logp − behavior_logp|: the distance to the policy that sampled the token."),
    "policy/future_scale": Metric("1", "The future-aware factor 1 + b·clip(Ω)."),
    "policy/is_weight": Metric("1", "The truncated importance weight of `learner.importance_cap`."),
    "policy/is_clipped": Metric("0..1", "Share of tokens whose importance weight met the cap."),
    "policy/staleness": Metric("updates", "Policy version now minus the one that sampled the token."),

    "pack/tokens_all": Metric("tokens", "Tokens of all leaves as independent sequences."),
    "pack/tokens_rows": Metric("tokens", "Tokens of trained rows as independent sequences."),
    "pack/tokens_unique": Metric("tokens", "Tokens in the streams, padding left out."),
    "pack/skip_factor": Metric("1", "tokens_all / tokens_rows: saved by leaving out rows without loss."),
    "pack/sharing_factor": Metric("1", "tokens_rows / tokens_unique: saved by computing shared tokens once."),
    "pack/rows": Metric("rows", "Rows in the streams; a row that was cut counts more than once."),
    "pack/streams": Metric("streams", "Packed micro-batches of all ranks."),
    "pack/over_budget": Metric("streams", "Streams longer than `learner.token_budget`: one row alone exceeds it."),
    "pack/imbalance": Metric("1", "Work of the busiest rank over the mean, worst mini-batch of the step."),

    "push/tensors": Metric("tensors", "Tensors of one push."),
    "push/bytes": Metric("bytes", "Bytes of one push."),
    "push/crc32": Metric("checksum", "Checksum of the last push, equal on all ranks."),
    "push/adapter_gain": Metric("0..1", "How much of the adapters survived a cast of merged weights; 1 where none is made."),
    "push/probe_max": Metric("nats", "Largest |log-prob of engine − of learner| on the probe prompts."),
    "push/probe_mean": Metric("nats", "Mean of the same."),

    "engine/prefill_tokens": Metric("tokens", "Given tokens run: prompts, tool results, one per fork."),
    "engine/decode_tokens": Metric("tokens", "Sampled tokens run."),
    "engine/scored_tokens": Metric("tokens", "Tokens run to score."),
    "engine/prefix_hits_tokens": Metric("tokens", "Prompt tokens taken from another prompt's KV."),
    "engine/forks": Metric("forks", "Sequences forked."),
    "engine/tokens_saved": Metric("tokens", "Tokens that independent sequences would have run more."),
    "engine/preemptions": Metric("sequences", "Sequences sent back for want of KV memory."),
    "engine/evicted_tokens": Metric("tokens", "Tokens whose KV was dropped for want of memory."),
    "memory/kv_blocks_peak": Metric("blocks", "Most KV blocks in use since the start of the process, of any rank."),
    "memory/kv_mb_peak": Metric("MiB", "The same as memory."),

    "time/step": Metric("s", "The whole step, without evaluation and checkpoint."),
    "time/rollout": Metric("s", "Sampling of roots, with branches that start before all roots are done."),
    "time/score": Metric("s", "Scoring of roots and choice of branch points."),
    "time/branch": Metric("s", "Sampling of the remaining branches."),
    "time/reward": Metric("s", "Grading."),
    "time/learn": Metric("s", "Packing, forward, backward, optimizer; includes the two below."),
    "time/pack": Metric("s", "Part of `time/learn`: packing and balance between ranks."),
    "time/old_logprobs": Metric("s", "Part of `time/learn`: log-probs under the weights at the start of the step."),
    "time/push": Metric("s", "Weights to the engine, and the probe."),
    "time/ahead": Metric("s", "Sampling of coming steps' roots beside the learner; only with `staleness`."),
    "time/tool_wait": Metric("s", "Time in which nothing but tools ran."),
    "time/eval": Metric("s", "The evaluation of this line."),
}  # fmt: skip


def describe(key: str) -> Metric | None:
    """The metric that a key of a record is, `grade/error:timeout` by its pattern.

    None: an unknown key.
    """
    if key in METRICS:
        return METRICS[key]
    word, colon, _ = key.partition(":")
    return METRICS.get(f"{word}:*") if colon else None


def group(name: str) -> str:
    """The part of a name before the slash; "" for names without one."""
    return name.partition("/")[0] if "/" in name else ""
