"""What a user can do wrong, as exceptions whose message is one line: what, where, what is allowed, what next.

The command line prints the message and exits with `exit_code`; a traceback appears only with `--debug`.
"""

import shlex


def command(verb: str, *words: object) -> str:
    """A command of ours as a message names it: with quotes where a shell needs them, so that it can be pasted."""
    return f"medvisionllama {verb} {shlex.join(map(str, words))}".rstrip()


class MedVisionLlamaError(ValueError):
    """Base of every error that the user, not the programmer, can fix."""

    exit_code = 2


OUT_OF_MEMORY = (
    "out of memory: use smaller scans or a machine with more; a training takes less with --members 1,"
    " --set train.batch_size=1 or smaller crops (data.max_crop_voxels, data.crop_size)"
)


_NO_MEMORY = ("can't allocate memory", "not enough memory")
"""PyTorch's words on Linux and macOS, and on Windows."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, as Python says it, or PyTorch of the machine or of its GPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in str(error) for words in _NO_MEMORY)
    )


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
