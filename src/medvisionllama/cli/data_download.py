"""`medvisionllama data download`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from medvisionllama.cli._options import Json


def download(
    what: Annotated[
        str | None,
        typer.Argument(help="Task04, 4 or hippocampus; or the https address of a .tar, .tar.gz or .zip."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder that gets the dataset's folder.")] = Path(),
    mirror: Annotated[
        str | None,
        typer.Option(
            help="Address where the tasks' archives lie; also MEDVISIONLLAMA_MSD_MIRROR.", metavar="URL"
        ),
    ] = None,
    sha256: Annotated[
        str | None, typer.Option(help="Expected checksum of the archive; refuse any other.")
    ] = None,
    keep_archive: Annotated[
        bool, typer.Option("--keep-archive", help="Leave the archive beside the folder.")
    ] = False,
    show_list: Annotated[bool, typer.Option("--list", help="List the tasks, and fetch nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Fetch a task of the Medical Segmentation Decathlon, or an archive of your own, and unpack it.

    An interrupted download goes on where it stopped. Archives with links, with paths that lead outside, or that
    unpack to absurd sizes are refused.

    Example: medvisionllama data download Task04 --out data
    """
    from medvisionllama.api import download as run
    from medvisionllama.cli._progress import TransferProgress
    from medvisionllama.errors import DataError

    if show_list:
        _print_list(as_json=as_json)
        return
    if what is None:
        raise DataError(
            "nothing to fetch: give a task, such as Task04, or an address; --list shows the tasks"
        )
    folder = run(
        what,
        out=out,
        mirror=mirror,
        sha256=sha256,
        keep_archive=keep_archive,
        progress=TransferProgress(),
    )
    typer.echo(json.dumps({"folder": str(folder)}) if as_json else folder)


def _print_list(*, as_json: bool) -> None:
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from medvisionllama.data.download import wanted_of
    from medvisionllama.data.msd_tasks import TASKS

    if as_json:
        rows = [{**asdict(task), "url": wanted_of(task.name).url} for task in TASKS.values()]
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("task", "channels", "classes", "labelled"):
        table.add_column(name, justify="right" if name == "labelled" else "left")
    for task in TASKS.values():
        table.add_row(task.name, ", ".join(task.channels), ", ".join(task.classes), str(task.num_training))
    Console().print(table)
