"""`medvisionllama llm`: which blocks are known, and fetching one."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from medvisionllama.llm.catalog import CatalogEntry

app = typer.Typer(help="Language models whose block can be inserted.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="Name in the catalogue.")]


@app.command("list")
def list_() -> None:
    """List the catalogue."""
    from medvisionllama.llm.catalog import CATALOG, cached_layers

    for entry in CATALOG.values():
        layers = cached_layers(entry)
        state = (
            f"layer {', '.join(map(str, layers))} cached"
            if layers
            else ("can be pulled" if entry.wheel else "weights from a folder")
        )
        typer.echo(
            f"{entry.name:16} {entry.block_parameters / 1e6:7.2f} M a layer  {state:20} {entry.licence}"
        )


@app.command()
def show(name: Name) -> None:
    """Show one entry."""
    entry = _entry(name)
    typer.echo(entry.title)
    for key, value in entry.settings.items():
        typer.echo(f"  {key:26} {value}")
    typer.echo(f"  {'parameters of a layer':26} {entry.block_parameters}")


@app.command()
def pull(
    name: Name,
    layer: Annotated[
        list[int] | None, typer.Option(help="Layer to fetch, from the back if negative; repeat for more.")
    ] = None,
) -> None:
    """Fetch layers into the user's cache, verified by checksum."""
    from medvisionllama.llm.catalog import catalog_tensors
    from medvisionllama.llm.sources import resolve_layers

    entry = _entry(name)
    layers = resolve_layers(layer or [-1], entry.settings["num_hidden_layers"])
    catalog_tensors(entry, layers)
    typer.echo(f"{name}: layer {', '.join(map(str, layers))} is in the cache")


def _entry(name: str) -> "CatalogEntry":
    from medvisionllama.errors import BlockError
    from medvisionllama.llm.catalog import CATALOG

    if name not in CATALOG:
        raise BlockError(f"{name!r} is not in the catalogue; known: {', '.join(CATALOG)}")
    return CATALOG[name]
