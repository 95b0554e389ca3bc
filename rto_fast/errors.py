"""The errors that end a run with one clear line, and its exit codes."""

from __future__ import annotations

REFUSED = 2
"""Exit code where the settings or the input cannot work; nothing was written."""
STOPPED = 3
"""Exit code of a run that had to stop, and whose saved work is whole."""


class ConfigError(ValueError):
    """A setting that cannot work; the message names the setting and the remedy."""


LONGEST = 2000
"""Characters of a message that are shown."""


def shown(message: object, longest: int = LONGEST) -> str:
    """The message as one line for a terminal: what would move its cursor, turn or break it is spelt out."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(message))
    return text if len(text) <= longest else f"{text[:longest]}... ({len(text):,} characters)"


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


class DataError(ConfigError):
    """Data that cannot be used; the message names the argument, the file, the row and the remedy."""


class RewardError(RuntimeError):
    """A reward source failed; the message names the source and what it did."""


class RolloutError(RuntimeError):
    """Sampling cannot go on; the message says at which request and why."""


class EngineFailure(RolloutError):
    """The engine itself broke or hung; a new one may do better."""


class OutOfMemory(EngineFailure):
    """The engine found too little memory; a new one would do no better."""


class DeviceLost(RolloutError):
    """The device's context is broken: this process can compute no more, and must end."""


class SyncError(RuntimeError):
    """The engine does not hold the weights it was pushed; the message names the parameter or the evidence."""


class StorageError(RuntimeError):
    """Something could not be written; the message names the file or folder and the reason."""


class Preempted(RuntimeError):
    """A signal has ended the run behind a whole checkpoint; the message names both."""


class Diverged(RuntimeError):
    """Too many non-finite steps in a row; the message says what was not finite."""
