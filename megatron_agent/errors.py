"""One small tree of errors. Each names the boundary it belongs to, and pickles (they cross Ray)."""

from __future__ import annotations


class MegatronAgentError(Exception):
    """Root of all errors that this project raises on purpose."""


def cause_of(error: Exception, otherwise: type[MegatronAgentError]) -> MegatronAgentError:
    """The error of ours that a remote task raised, without Ray's wrapping; any other one as `otherwise`."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, MegatronAgentError) else otherwise(str(error))


class ConfigError(MegatronAgentError, ValueError):
    """The user's configuration cannot be: what was given, what is allowed, what to do."""


class DataError(MegatronAgentError, ValueError):
    """A dataset, row or picture that cannot be used; names file, row and reason."""


class CheckpointError(MegatronAgentError, ValueError):
    """A checkpoint folder that is incomplete, of another model or damaged."""


class EnvError(MegatronAgentError, ValueError):
    """A tool call that cannot be carried out; its text is shown to the model as the observation."""


class EngineError(MegatronAgentError, RuntimeError):
    """A rollout engine died or refused a request."""


class RequestLostError(EngineError):
    """The engines could not carry out one request, and others they can: its trajectory ends, the run goes on."""


class WeightSyncError(MegatronAgentError, RuntimeError):
    """Weights did not arrive as they were sent; generation must not go on."""


class StopRequested(MegatronAgentError):
    """SIGTERM, SIGINT or a scheduler's pre-emption asked the run to end."""


class AlarmStop(MegatronAgentError, RuntimeError):
    """An alarm that the run is configured to stop at; what was learned is in a checkpoint."""


class TrainingError(MegatronAgentError, RuntimeError):
    """A trainer rank failed, or the loss is not a number."""
