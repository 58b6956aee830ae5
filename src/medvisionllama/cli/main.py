"""`medvisionllama`: assembles the verbs, and turns errors into one line and an exit code."""

import errno
import io
import logging
import os
import sys
import warnings

import typer

from medvisionllama import __version__
from medvisionllama.cli import data, demo, evaluate, experiment, explain, llm, predict, train
from medvisionllama.errors import OUT_OF_MEMORY, MedVisionLlamaError, is_out_of_memory
from medvisionllama.training.interrupts import sigterm_as_ctrl_c

app = typer.Typer(
    help="Segment 3-D medical scans from a handful of labelled cases. Research use only; not a medical device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: medvisionllama demo. From Python: medvisionllama.train, predict, evaluate and others.",
)
app.command("demo")(demo.demo)
app.command("train")(train.train)
app.command("predict")(predict.predict)
app.command("evaluate")(evaluate.evaluate)
app.command("explain")(explain.explain)
app.add_typer(data.app, name="data")
app.add_typer(experiment.app, name="experiment")
app.add_typer(llm.app, name="llm")


def print_version(asked: bool) -> None:
    """Print the version and stop."""
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", is_eager=True, callback=print_version, help="Print the version."
    ),
    offline: bool = typer.Option(False, "--offline", help="Download nothing; may stand anywhere."),
    debug: bool = typer.Option(
        False, "--debug", help="Show tracebacks and library warnings; may stand anywhere."
    ),
) -> None:
    """Take the options that every verb has; `main` has acted on them already."""


def main() -> None:
    """Run the command line; exit codes: 0 done, 2 something to fix, 130 interrupted."""
    debug = "--debug" in sys.argv
    if "--offline" in sys.argv:
        os.environ["HF_HUB_OFFLINE"] = "1"
    sys.argv = [argument for argument in sys.argv if argument not in {"--debug", "--offline"}]
    if not debug:
        warnings.filterwarnings("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):
        # A file's name need not be text in any encoding, and must not end a batch when it is shown.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sigterm_as_ctrl_c()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("medvisionllama").setLevel(logging.INFO)
    try:
        app()
    except MedVisionLlamaError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except (MemoryError, RuntimeError) as error:
        if debug or not is_out_of_memory(error):
            raise
        _fail(OUT_OF_MEMORY, 2)
    except OSError as error:
        if debug or error.errno not in _FIXABLE:
            raise
        # Of a file that was to be renamed, the first name is a hidden one of ours.
        name = error.filename2 or error.filename
        where = f" ({name})" if name else ""
        after = "" if error.errno in _GONE else "; nothing was half written"
        _fail(f"{_FIXABLE[error.errno]}{where}{after}", 2)


_GONE = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN)
"""Of a disk, or of the network before it; what is there then, nobody knows."""
_FIXABLE = {
    errno.ENOSPC: "the disk is full: free some space, then go on (a run goes on with --resume)",
    errno.EDQUOT: "the disk quota is used up: free some space, then go on (a run goes on with --resume)",
    errno.EACCES: "not allowed to read or write there: check the permissions or choose another folder",
    errno.EEXIST: "a file is where a folder should be: choose another name",
    errno.ENOTDIR: "a file is where a folder should be: choose another name",
    errno.EISDIR: "a folder is where a file should be: choose another name",
    errno.ENAMETOOLONG: "the name of a file to be written is longer than the disk allows: rename the scan",
    errno.EROFS: "that disk is read-only: choose another folder",
    **dict.fromkeys(
        _GONE, "the disk does not answer: see that it is there, then go on (a run goes on with --resume)"
    ),
}


def _fail(message: str, code: int) -> None:
    print(f"medvisionllama: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
