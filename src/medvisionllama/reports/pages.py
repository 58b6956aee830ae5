"""How a page is made: its template, filled in, with everything that comes from outside escaped."""

from typing import Any

from jinja2 import Environment, PackageLoader


def render(template: str, **values: Any) -> str:
    """Fill in a template of this package."""
    environment = Environment(loader=PackageLoader("medvisionllama.reports"), autoescape=True)
    return environment.get_template(template).render(**values)
