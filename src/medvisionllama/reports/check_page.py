"""`write_check_page`: what a check found, as one page without further files."""

from collections import defaultdict
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from medvisionllama import __version__
from medvisionllama._files import write_text
from medvisionllama.colours import colour_of
from medvisionllama.data.check.facts import CaseFacts
from medvisionllama.data.check.findings import SEVERITIES, TITLES, Finding
from medvisionllama.data.check.report import CheckReport
from medvisionllama.reports.pages import render
from medvisionllama.reports.plots import png
from medvisionllama.reports.thumbnails import MAX_PICTURES, Thumbnails, colour_places

_SHOWN_PER_CODE = 20


@dataclass(frozen=True)
class Row:
    """A case in the table; numbers are there to sort by."""

    facts: CaseFacts
    findings: list[Finding]
    picture: str | None

    @property
    def worst(self) -> int:
        """0 for an error, 3 for nothing found."""
        ranks = [SEVERITIES.index(finding.severity) for finding in self.findings]
        return min(ranks, default=len(SEVERITIES))


def write_check_page(report: CheckReport, path: Path, pictures: Thumbnails) -> None:
    """Write findings, a figure of sizes, spacings and intensities, and a sortable table of cases."""
    by_case: dict[str, list[Finding]] = defaultdict(list)
    for finding in report.findings:
        for case in finding.cases:
            by_case[case].append(finding)
    ordered = sorted(report.facts, key=lambda facts: Row(facts, by_case[facts.case_id], None).worst)
    rows = [
        Row(
            facts,
            by_case[facts.case_id],
            pictures.source(facts.case_id) if number < MAX_PICTURES else None,
        )
        for number, facts in enumerate(ordered)
    ]
    groups = [(code, list(found)) for code, found in groupby(report.findings, lambda finding: finding.code)]
    page = render(
        "check.html.j2",
        report=report,
        groups=groups,
        titles=TITLES,
        shown=_SHOWN_PER_CODE,
        rows=rows,
        figure=_figure(report.facts, report.channels) if report.facts else None,
        classes=_class_colours(report),
        any_picture=any(row.picture for row in rows),
        max_pictures=MAX_PICTURES,
        version=__version__,
    )
    write_text(path, page)


def _class_colours(report: CheckReport) -> list[tuple[str, str]]:
    """Name and colour of each class that a label holds."""
    values = {value for facts in report.facts if facts.mask for value in facts.mask.voxels}
    places = colour_places(values, report.classes)
    return [
        (report.classes.get(value, f"class {value}"), colour_of(place)) for value, place in places.items()
    ]


def _figure(facts: tuple[CaseFacts, ...], channels: tuple[str, ...]) -> str:
    """One dot per case: size, spacing, and width of the intensities, with a jitter so that equal ones are seen."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    sizes, spacings, intensities = figure.subplots(1, 3)
    rng = np.random.default_rng(0)
    for axes, values, title in (
        (sizes, [case.extent_mm for case in facts], "length of the scan, mm"),
        (spacings, [case.spacing_mm for case in facts], "spacing, mm"),
    ):
        for axis in range(3):
            column = np.array([value[axis] for value in values])
            axes.scatter(
                axis + rng.uniform(-0.25, 0.25, len(column)),
                column,
                s=9,
                alpha=0.5,
                linewidths=0,
                color=colour_of(4),
            )
        wide = np.max(values) > 20 * np.min(values)
        axes.set(xticks=range(3), xticklabels=list("xyz"), title=title, yscale="log" if wide else "linear")
        axes.set_ylim(bottom=None if wide else 0)
        _name_ticks(axes.yaxis)
    for index, name in enumerate(channels):
        scales = [
            case.channels[index].scale
            for case in facts
            if len(case.channels) == len(channels) and case.channels[index].scale > 0
        ]
        if scales:
            edges = np.geomspace(min(scales) / 1.1, max(scales) * 1.1, 31)
            intensities.hist(scales, bins=edges, alpha=0.6, color=colour_of(index), label=name[:24])
            intensities.legend(frameon=False)
    intensities.set(xscale="log", title="width of the intensities", ylabel="cases")
    _name_ticks(intensities.xaxis)
    return png(figure)


def _name_ticks(axis: Axis) -> None:
    """Plain numbers: matplotlib writes those of logarithmic axes as formulas, which are text in our pictures."""
    if axis.get_scale() == "log":
        axis.set_major_formatter(LogFormatter())
        axis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
