"""What a user can do wrong, as exceptions whose message is one line: what, where, what is allowed, what next.

The command line prints the message and exits with `exit_code`; a traceback appears only with `--debug`.
"""


class MedVisionLlamaError(ValueError):
    """Base of every error that the user, not the programmer, can fix."""

    exit_code = 2


class DataError(MedVisionLlamaError):
    """A scan, a label or a dataset folder cannot be used as it is."""


class ConfigError(MedVisionLlamaError):
    """A preset, a key or a value does not exist or does not fit the others."""


class BlockError(MedVisionLlamaError):
    """A language model's block cannot be found, fetched or read."""


class CheckpointError(MedVisionLlamaError):
    """A run folder or its weights are missing, damaged or of another model."""


class OtherProcessError(MedVisionLlamaError):
    """Another process of a distributed run failed, so this one ends too."""


class ClusterError(MedVisionLlamaError):
    """A Ray cluster cannot be joined, or its nodes are not fit for runs."""
