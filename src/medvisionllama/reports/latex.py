"""Tables of a study in LaTeX: booktabs, everything escaped, no wider than a page."""

import re
from itertools import groupby

from medvisionllama.reports.study import percent
from medvisionllama.reports.study_tables import Cell, MeasureTable, SizeRow

_MOST_COLUMNS = 6
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "×": r"$\times$",
    "<": r"$<$",
    ">": r"$>$",
    **{character: "\\" + character for character in "&%$#_{}"},
}
_SIGNS = {"better": "+", "worse": "-", "open": ""}
_NEEDS = "% needs \\usepackage{booktabs}\n"


def escape(text: str) -> str:
    r"""Text that LaTeX prints as it is.

    >>> escape("100 % of a_b")
    '100 \\% of a\\_b'
    """
    return "".join(_SPECIAL.get(character, character) for character in " ".join(text.split()))


def file_name(*parts: str) -> str:
    """A name that is safe on every disk and in \\input.

    >>> file_name("table", "vit/plain", "hd95_mm")
    'table-vit-plain-hd95-mm.tex'
    """
    return "-".join(re.sub(r"[^A-Za-z0-9]+", "-", part).strip("-") or "x" for part in parts) + ".tex"


def measure_latex(table: MeasureTable, *, reference: str, family: str, rule: str = "") -> str:
    """A table of means and SDs; one with many columns becomes several, one below the other.

    `family` says in words over which comparisons Holm's correction went, `rule` how the measure is to be read.
    """
    caption = (
        f"{escape(table.metric.title)} of the model {escape(table.model)}: mean over patients and runs "
        rf"$\pm$ SD over runs; fractions of the training cases. Bold: best mean of a column. "
        f"$^{{+}}$ better, $^{{-}}$ worse than {escape(reference)} "
        rf"($p < 0.05$ by Wilcoxon over patients after Holm's correction {family}, and by t test over runs). "
        r"$^{\dagger}$ fewer runs than other arms of the column." + (f" {escape(rule)}" if rule else "")
    )
    parts = [
        table.part(start, start + _MOST_COLUMNS) for start in range(0, len(table.columns), _MOST_COLUMNS)
    ]
    return (
        "% from summary.csv and comparisons.csv\n"
        + _NEEDS
        + "\n".join(_measure_part(part, caption if part is parts[0] else "Continued.") for part in parts)
    )


def _measure_part(table: MeasureTable, caption: str) -> str:
    groups, rules, column = [""], [], 2
    for task, found in groupby(table.columns, lambda pair: pair[0]):
        width = len(list(found))
        groups.append(rf"\multicolumn{{{width}}}{{c}}{{{escape(task)}}}")
        rules.append(rf"\cmidrule(lr){{{column}-{column + width - 1}}}")
        column += width
    head = [
        " & ".join(groups) + r" \\",
        " ".join(rules),
        " & ".join(["arm", *(escape(percent(fraction)) for _, fraction in table.columns)]) + r" \\",
    ]
    rows = [[escape(arm), *map(_cell, cells)] for arm, cells in table.rows]
    return _table("l" + "c" * len(table.columns), head, rows, caption)


def size_latex(rows: list[SizeRow], columns: list[tuple[str, float]]) -> str:
    """The ablation table."""
    titles = ["model", "arm", "trainable", "frozen", "GFLOPs"]
    titles += [f"{task}, {percent(fraction)}" for task, fraction in columns]
    body = [
        [*map(escape, (row.model, row.arm, row.trainable, row.frozen, row.gflops)), *map(_cell, row.cells)]
        for row in rows
    ]
    head = [" & ".join(map(escape, titles)) + r" \\"]
    caption = (
        r"Size of each arm, and its Dice with most training cases (mean $\pm$ SD over runs); wide with many tasks. "
        r"Bold, $^{+}$, $^{-}$ and $^{\dagger}$ as in the tables of Dice."
    )
    return (
        "% from arms.csv and summary.csv\n"
        + _NEEDS
        + _table("ll" + "r" * (len(titles) - 2), head, body, caption)
    )


def _table(columns: str, head: list[str], rows: list[list[str]], caption: str) -> str:
    body = "\n".join(" & ".join(row) + r" \\" for row in rows)
    return "\n".join(
        (
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            r"\small",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            *head,
            r"\midrule",
            body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        )
    )


def _cell(cell: Cell | None) -> str:
    if cell is None or cell.mean == "–":
        return "--"
    mean = rf"\mathbf{{{cell.mean}}}" if cell.best else cell.mean
    spread = "" if cell.sd == "–" else rf" \pm {cell.sd}"
    raised = _SIGNS[cell.verdict] + (r"\dagger" if cell.partial else "")
    return f"${mean}{spread}{'^{' + raised + '}' if raised else ''}$"
