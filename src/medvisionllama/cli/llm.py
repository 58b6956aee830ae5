"""`medvisionllama llm`: which blocks are known, what one costs, and fetching one."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from medvisionllama.cli._options import Json

app = typer.Typer(help="Language models whose block can be inserted.", no_args_is_help=True)
Layers = Annotated[
    str,
    typer.Option(
        metavar="NUMBERS", help="Layers, from the back if negative: -1, or 0,1, or 28:30 (28 and 29)."
    ),
]


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the catalogue; any folder, GGUF file or Hub id works as well as a name of it.

    Example: medvisionllama llm list
    """
    from rich.console import Console
    from rich.table import Table

    from medvisionllama.llm import list_models

    rows = list_models()
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name, value in rows[0].items():
        table.add_column(name, justify="right" if isinstance(value, int | float) else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)


@app.command("show")
def show_(
    source: Annotated[str, typer.Argument(help="Name in the catalogue, folder, file, or Hub id.")],
    layers: Layers = "-1",
    as_json: Json = False,
) -> None:
    """Show a model's family and sizes, and what its block costs against the whole checkpoint.

    Example: medvisionllama llm show llama-3.1-8b --layers 30,31
    """
    from medvisionllama.llm import show

    facts = show(source, layers=_numbers(layers))
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for key, value in facts.items():
        if value is None or value == []:
            continue
        shown = f"{value / 1e6:,.1f} MB" if key.endswith("_bytes") else value
        shown = f"{value:.2%}" if key == "share_of_checkpoint" else shown
        shown = ", ".join(map(str, value)) if isinstance(value, list) else shown
        typer.echo(f"{key:20} {shown}")


@app.command("pull")
def pull_(
    source: Annotated[
        str, typer.Argument(help="Name in the catalogue, or organisation/name[@revision] on the Hub.")
    ],
    layers: Layers = "-1",
    sha256: Annotated[
        str | None, typer.Option(help="Expected checksum of the block; refuse any other.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fetch layers into the user's cache: of a checkpoint, only the bytes of these layers.

    An interrupted download goes on where it stopped. With --offline, only say whether the layers are there. Set
    HF_TOKEN for a gated model, HF_ENDPOINT for a mirror.

    Example: medvisionllama llm pull HuggingFaceTB/SmolLM2-360M --layers 30:32
    """
    from medvisionllama.cli._progress import TransferProgress
    from medvisionllama.llm import pull

    pulled = pull(source, layers=_numbers(layers), sha256=sha256, progress=TransferProgress())
    if as_json:
        typer.echo(json.dumps(asdict(pulled) | {"folder": str(pulled.folder)}, indent=2))
        return
    typer.echo(f"layers {', '.join(map(str, pulled.layers))} of {pulled.name} are in {pulled.folder}")
    typer.echo(f"sha256 {pulled.sha256}")


def _numbers(text: str) -> tuple[int, ...]:
    from medvisionllama.config.schema import parse_layers
    from medvisionllama.errors import BlockError

    try:
        return parse_layers(text)
    except ValueError as error:
        raise BlockError(f"--layers {error}") from None
