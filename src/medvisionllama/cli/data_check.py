"""`medvisionllama data check`: what in a dataset would break or mislead training."""

import json
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medvisionllama.cli._options import Exclude, Json, PatientPattern

if TYPE_CHECKING:
    from medvisionllama.data.check.report import CheckReport

_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def check(
    data: Annotated[
        Path,
        typer.Argument(help="A dataset's folder; or a scan, or a folder of scans, to check images alone."),
    ],
    fast: Annotated[bool, typer.Option("--fast", help="Read headers only.")] = False,
    splits: Annotated[Path | None, typer.Option(help="A splits file that must fit the dataset.")] = None,
    patient_pattern: PatientPattern = None,
    exclude: Exclude = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with pictures of every case.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Findings of each kind in the table.")] = 5,
    as_json: Json = False,
) -> None:
    """Find what would break or mislead training; exit code 2 when training must not start.

    Example: medvisionllama data check Task04_Hippocampus --html check.html
    """
    from medvisionllama import api
    from medvisionllama.cli._progress import TerminalProgress

    report = api.check(
        data,
        fast=fast,
        splits=splits,
        patient_pattern=patient_pattern,
        exclude=exclude or (),
        html=html,
        progress=TerminalProgress(),
    )
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
    else:
        _print_findings(report, rows)
        if html is not None:
            typer.echo(str(html))
    if not report.ok:
        raise typer.Exit(2)


def _print_findings(report: "CheckReport", rows: int) -> None:
    """Print findings by kind, the worst first, and a summary line last."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from medvisionllama.data.check.findings import TITLES

    console = Console(highlight=False)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for code, group in groupby(report.findings, key=lambda finding: finding.code):
        found = list(group)
        severity = found[0].severity
        lines = [report.short(finding.message) for finding in found[:rows]]
        if len(found) > rows:
            lines.append(f"and {len(found) - rows} more")
        title = TITLES[code] + (f" ({len(found)})" if len(found) > 1 else "")
        if not console.is_terminal:
            # In a file a message stays on its line.
            typer.echo("\n    ".join([f"{severity}: {title}", *lines]))
            continue
        table.add_row(Text(severity, _STYLES[severity]), Text(title, "bold"))
        for line in lines:
            table.add_row("", Text(line))
    if table.row_count:
        console.print(table)
    typer.echo(report.summary)
