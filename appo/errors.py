"""Errors that a user can act on.

Every message names the field, the value and the fix.  `assert` is kept for invariants of our own.
"""

from __future__ import annotations


class AppoError(Exception):
    """Base of all errors raised on purpose.

    The CLI prints it as one paragraph and exits with `exit_code`.

    reported: it has been printed (by this process, or by another rank for all).
    """

    exit_code = 1
    reported = False


class ConfigError(AppoError):
    """The configuration (or another input of the user) cannot be used.

    Raised before long work starts.
    """

    exit_code = 2


class ModelError(ConfigError):
    """A model or tokenizer cannot be found, verified or used."""


class DataError(ConfigError):
    """A data set is missing, empty or malformed."""


class ToolError(AppoError):
    """A tool failed.

    `kind` is a stable word for counting: crash, timeout, unavailable, bad_request.
    """

    def __init__(self, message: str, kind: str = "crash"):
        super().__init__(message)
        self.kind = kind


class SandboxError(ConfigError):
    """No sandbox of the requested level works on this machine."""


class EngineError(AppoError):
    """The rollout engine was used against its contract, or ran out of room."""


class PoolTooSmallError(EngineError):
    """A sequence may need more KV than the whole pool could hold for it alone."""


class StaleWeightsError(EngineError):
    """KV cache or logprobs of an old policy version were about to be used as current ones."""


class GraderError(AppoError):
    """A grader timed out or crashed; counted, never turned into a reward of 0."""


class LearnerError(AppoError):
    """The learner refused to go on (for example: too many non-finite losses in a row)."""


class RankError(AppoError):
    """Another process of the run has gone, so this one cannot go on."""


class CheckpointError(AppoError):
    """A checkpoint is missing, incomplete or does not belong to this run."""

    exit_code = 2
