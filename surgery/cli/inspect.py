"""`surgery inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import common_options, set_verbosity
from surgery.cli.output import note, show, show_json, summary, table
from surgery.errors import listing
from surgery.storage.hub_cache import check_names
from surgery.system.text import human_bytes

if TYPE_CHECKING:
    from surgery.inspection.report import InspectedRole, InspectedSite, Inspection


@click.command("inspect")
@click.argument("path")
@click.option("--plot", metavar="FILE.png", help="Draw a heat map, layers by roles (.png, .svg or .pdf).")
@click.option("--base", metavar="MODEL", help="Base model of an adapter whose changes depend on it.")
@click.option("--spectra", is_flag=True, help="Decompose dense matrices too, a model's weights included. Slow.")
@click.option("--trust-remote-code", is_flag=True, help="Run model code that comes with a model.")
@common_options()
def command(path: str, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
    """Say what is in a model or adapter folder.

    PATH is a folder or a Hub id. Of a model only the headers are read. Of an adapter every layer's weight change is:
    where its squared norm sits, and how many ranks hold 95 % and 99 % of it.

    \b
    Examples:
      surgery inspect lora/ --plot lora.png
      surgery inspect model/
    """
    check_names(path, options["base"])
    set_verbosity(verbose, quiet)
    from surgery.inspection.inspect import inspect

    found = inspect(path, **options)
    if as_json:
        show_json(found.to_dict())
    elif quiet:
        show(human_bytes(found.bytes))
    else:
        _show(found, verbose)


def _show(found: Inspection, verbose: bool) -> None:
    for line in found.notes:
        note(f"Note: {line}")
    for reason in dict.fromkeys(found.not_adapted.values()):
        names = [name for name, why in found.not_adapted.items() if why == reason]
        note(f"Note: cannot be adapted: {listing(names, 3)} ({reason})")
    show(summary(_facts(found)))
    columns = [column for column in _COLUMNS if any(column[1](role) for role in found.roles)]
    if found.roles:
        rows = [[cell(role) for _, cell in columns] for role in found.roles]
        show("\n" + table([title for title, _ in columns], rows, right=range(1, len(columns))))
    if verbose and found.sites:
        rows = [[cell(site) for _, cell in _SITE_COLUMNS] for site in found.sites]
        show("\n" + table([t for t, _ in _SITE_COLUMNS], rows, right=range(1, len(_SITE_COLUMNS))))


def _facts(found: Inspection) -> list[tuple[str, str]]:
    dtypes = ", ".join(f"{name} {human_bytes(size)}" for name, size in found.dtypes.items())
    files = "" if found.files == 1 else f" in {found.files} files"
    what = found.model_class or f"{found.peft_type} adapter" + (f", {found.task}" if found.task else "")
    facts = [(found.kind, what)]
    if found.kind == "adapter":
        facts.append(("base", found.base or "not named"))
    facts += [
        ("parameters", f"{found.parameters:,}"),
        ("size", f"{human_bytes(found.bytes)}{files} ({dtypes})"),
        ("layers", f"{found.modules:,} {'linear' if found.kind == 'model' else 'changed'}"),
    ]
    if found.carried:
        facts.append(("brings", f"{listing(found.carried, 4)}, whole"))
    if found.kind == "adapter" and any(site.energy for site in found.sites):
        facts.append(("energy", _by_layer(found.sites)))
    if found.out:
        facts.append(("picture", found.out))
    return facts


def _by_layer(sites: list[InspectedSite]) -> str:
    """Which blocks hold most of the change."""
    layers: dict[str, float] = {}
    for site in sites:
        name = "outside the blocks" if site.layer is None else f"layer {site.layer}"
        layers[name] = layers.get(name, 0.0) + (site.energy or 0.0)
    most = sorted(layers, key=lambda name: -layers[name])[:3]
    return ", ".join(f"{layers[name]:.0%} in {name}" for name in most) + (" ..." if len(layers) > 3 else "")


def _range(values: Any) -> str:
    if not values:
        return ""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _shapes(role: InspectedRole) -> str:
    return ", ".join(f"{rows} x {columns}" for rows, columns in role.shapes)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


_COLUMNS: list[tuple[str, Any]] = [
    ("role", lambda role: role.role),
    ("layers", lambda role: str(role.layers)),
    ("shape", _shapes),
    ("dtype", lambda role: ", ".join(role.dtypes)),
    ("parameters", lambda role: f"{role.parameters:,}"),
    ("size", lambda role: human_bytes(role.bytes)),
    ("rank", lambda role: _range(role.ranks)),
    ("energy", lambda role: _share(role.energy)),
    ("95 % in", lambda role: _range(role.rank_95)),
    ("99 % in", lambda role: _range(role.rank_99)),
]
_SITE_COLUMNS: list[tuple[str, Any]] = [
    ("module", lambda site: site.module),
    ("shape", lambda site: f"{site.shape[0]} x {site.shape[1]}" if site.shape else "-"),
    ("parameters", lambda site: f"{site.parameters:,}"),
    ("size", lambda site: human_bytes(site.bytes)),
    ("rank", lambda site: "-" if site.rank is None else str(site.rank)),
    ("norm", lambda site: "-" if site.norm is None else f"{site.norm:.4g}"),
    ("energy", lambda site: _share(site.energy) or "-"),
    ("95 % in", lambda site: "-" if site.rank_95 is None else str(site.rank_95)),
    ("99 % in", lambda site: "-" if site.rank_99 is None else str(site.rank_99)),
]
