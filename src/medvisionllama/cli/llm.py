"""`medvisionllama llm`: which blocks are known, what one costs, and fetching one."""

import json
import re
from typing import TYPE_CHECKING, Annotated

import typer

from medvisionllama.cli._options import Json

if TYPE_CHECKING:
    from medvisionllama.llm.catalog import CatalogEntry

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

    from medvisionllama.llm.catalog import CATALOG
    from medvisionllama.llm.describe import layer_parameters
    from medvisionllama.llm.families import family_of

    rows = [
        {
            "name": entry.name,
            "family": family_of(entry.settings["model_type"]).name,
            "width": entry.settings["hidden_size"],
            "layers": entry.settings["num_hidden_layers"],
            "MB/layer": round(layer_parameters(entry) * entry.bytes_per_parameter / 1e6, 1),
            "licence": entry.licence.replace(" Community License", "").replace(" Terms of Use", ""),
            "state": _state(entry),
        }
        for entry in CATALOG.values()
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name, value in rows[0].items():
        table.add_column(name, justify="right" if isinstance(value, int | float) else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)


@app.command()
def show(
    source: Annotated[str, typer.Argument(help="Name in the catalogue, folder, file, or Hub id.")],
    layers: Layers = "-1",
    as_json: Json = False,
) -> None:
    """Show a model's family and sizes, and what its block costs against the whole checkpoint.

    Example: medvisionllama llm show llama-3.1-8b --layers 30,31
    """
    from medvisionllama.llm.describe import describe

    facts = describe(source, layers=_numbers(layers))
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


@app.command()
def pull(
    source: Annotated[
        str, typer.Argument(help="Name in the catalogue, or organisation/name[@revision] on the Hub.")
    ],
    layers: Layers = "-1",
    sha256: Annotated[
        str | None, typer.Option(help="Expected checksum of the block; refuse any other.")
    ] = None,
) -> None:
    """Fetch layers into the user's cache: of a checkpoint, only the bytes of these layers.

    An interrupted download goes on where it stopped. With --offline, only say whether the layers are there. Set
    HF_TOKEN for a gated model, HF_ENDPOINT for a mirror.

    Example: medvisionllama llm pull HuggingFaceTB/SmolLM2-360M --layers 30:32
    """
    from medvisionllama.cli._progress import TransferProgress
    from medvisionllama.errors import BlockError
    from medvisionllama.llm.block import FrozenBlock
    from medvisionllama.llm.cache import layer_file, one_at_a_time
    from medvisionllama.llm.families import family_of
    from medvisionllama.llm.fetched import FetchedSource
    from medvisionllama.llm.sources import open_source, resolve_layers

    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise BlockError(f"--sha256 {sha256[:80]!r} is no checksum; it has 64 digits from 0 to f")
    opened = open_source(source, progress=TransferProgress())
    if not isinstance(opened, FetchedSource):
        raise BlockError(f"{source} is on this machine already; use it as network.block.source={source}")
    family = family_of(opened.settings["model_type"])
    config = family.make_config(opened.settings)
    positions = resolve_layers(_numbers(layers), config.num_hidden_layers)
    kept_before = set(opened.cache.layers())
    opened.layer_tensors(positions, family)
    block = FrozenBlock.from_pretrained(source, layers=positions)
    if sha256 and block.sha256() != sha256.lower():
        fetched_now = set(positions) - kept_before
        with one_at_a_time():
            for position in fetched_now:
                opened.cache.forget(layer_file(position))
            if not opened.cache.layers():
                opened.cache.clear()
        fate = "was not kept" if fetched_now else f"stays in {opened.cache.folder} from before"
        raise BlockError(
            f"the block of {source} has sha256 {block.sha256()}, expected was {sha256}; it {fate}, check --layers, the revision and the source"
        )
    typer.echo(f"layers {', '.join(map(str, positions))} of {opened.name} are in {opened.cache.folder}")
    typer.echo(f"sha256 {block.sha256()}")


def _numbers(text: str) -> tuple[int, ...]:
    from medvisionllama.config.schema import parse_layers
    from medvisionllama.errors import BlockError

    try:
        return parse_layers(text)
    except ValueError as error:
        raise BlockError(f"--layers {error}") from None


def _state(entry: "CatalogEntry") -> str:
    from medvisionllama.llm.cache import BlockCache
    from medvisionllama.llm.hub import cache_of

    kept = (BlockCache(entry.name) if entry.wheel else cache_of(entry.repo)).layers()
    if kept:
        return f"cached: {kept[0]}" if len(kept) == 1 else f"{len(kept)} cached"
    return "gated" if entry.gated else "can be pulled"
