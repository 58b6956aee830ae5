# ruff: noqa: A005 # a script that nobody imports; named after what it measures
"""What reading, preprocessing and writing scans costs: one part at a time.

    python benchmarks/io.py preprocess --data DIR

A part is a module `io_PART.py` beside this file, with `add_arguments(parser)` and `run(arguments)`.
"""

import argparse
import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def main() -> None:
    # The folder of a script is on the path, and this file's name is the standard library's `io`, long imported.
    parts = sorted(path.stem.removeprefix("io_") for path in FOLDER.glob("io_*.py"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = parser.add_subparsers(dest="part", required=True, metavar="PART")
    modules = {part: importlib.import_module(f"io_{part}") for part in parts}
    for part, module in modules.items():
        module.add_arguments(choices.add_parser(part, help=(module.__doc__ or "").splitlines()[0]))
    arguments = parser.parse_args()
    modules[arguments.part].run(arguments)


if __name__ == "__main__":
    sys.exit(main())
