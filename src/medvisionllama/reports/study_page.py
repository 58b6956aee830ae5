"""`write_study`: a study as one page, CSV files that every number on it comes from, and LaTeX tables."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from medvisionllama import __version__
from medvisionllama._files import write_text
from medvisionllama.colours import colour_of
from medvisionllama.reports import study_plots
from medvisionllama.reports.latex import file_name, measure_latex, size_latex
from medvisionllama.reports.pages import render
from medvisionllama.reports.study import Study, arms_table, patients_table, percent, source, whole
from medvisionllama.reports.study_figures import by_arm, forests, link_of, scatters
from medvisionllama.reports.study_tables import measure_tables, size_columns, size_rows
from medvisionllama.reports.study_words import count_words, number, problems, statements

# Beyond this a page is slow to open; all runs are in runs.csv.
_MAX_RUNS = 2000


def write_study(study: Study, folder: Path) -> Path:
    """Write index.html, the CSV files and a .tex file for each table; return the page.

    The page needs no other file, but its links lead to the pages of runs.
    """
    study = whole(study)
    arms, patients = arms_table(study), patients_table(study)
    tables = measure_tables(study)
    columns = size_columns(tables)
    sizes = size_rows(study, arms, tables)
    frames = {
        "runs": study.runs,
        "cases": study.cases,
        "curves": study.curves,
        "comparisons": study.comparisons,
        "summary": study.summary,
        "few_shot": study.few_shot,
        "arms": arms,
        "patients": patients,
    }
    if study.ranks is not None:
        frames["ranks"] = study.ranks.assign(critical_difference=study.critical_difference)
    for name, frame in frames.items():
        write_text(folder / f"{name}.csv", frame.to_csv(index=False))
    latex: dict[str, str] = {}
    for table in tables:
        name = _free(file_name("table", table.model, table.name), latex)
        latex[name] = measure_latex(
            table, reference=study.reference, family=study.family_words, rule=study.rule_of(table.name)
        )
    if sizes:
        latex["ablation.tex"] = size_latex(sizes, columns)
    for name, text in latex.items():
        write_text(folder / name, text)
    _remove_stale(folder, {*(f"{name}.csv" for name in frames), *latex})
    told = statements(study)
    drawn = scatters(study, patients)
    page = render(
        "study.html.j2",
        study=study,
        version=__version__,
        colours={arm: colour_of(place) for place, arm in enumerate(study.arm_names)},
        told=told,
        count_words=count_words,
        problems=problems(study),
        tables=tables,
        sizes=sizes,
        size_columns=columns,
        arms=arms.to_dict(orient="records"),
        forests=forests(study),
        scatters=by_arm(drawn),
        num_patients=len(patients),
        num_drawn=sum(len(item.dots) for item in drawn),
        curves=_pictures(study),
        few_shot=_few_shot(study),
        ranks=study_plots.rank_diagram(study),
        data=_data_rows(study.runs),
        runs=study.runs.head(_MAX_RUNS).to_dict(orient="records"),
        failed=study.state("failed").to_dict(orient="records"),
        states=study.trainings["state"].value_counts().to_dict(),
        num_trainings=len(study.trainings),
        num_patients_tested=len(study.cases[["task", "patient_id"]].drop_duplicates()),
        files=[*(f"{name}.csv" for name in frames), *latex],
        link=lambda run_id: link_of(study, run_id),
        number=number,
        percent=percent,
        source=source,
    )
    index = folder / "index.html"
    write_text(index, page)
    return index


def _remove_stale(folder: Path, written: set[str]) -> None:
    """Delete tables that an earlier page had and this one has not; other files stay."""
    for path in [*folder.glob("table-*.tex"), folder / "ablation.tex", folder / "ranks.csv"]:
        if path.name not in written:
            path.unlink(missing_ok=True)


def _free(name: str, taken: Iterable[str]) -> str:
    """Names that differ in odd characters only must not become one file."""
    base, count = name, 2
    while name in taken:
        name = f"{base.removesuffix('.tex')}-{count}.tex"
        count += 1
    return name


def _pictures(study: Study) -> list[tuple[str, str]]:
    """Title and picture of the learning curves of each task and model."""
    pairs = study.curves[["task", "model"]].drop_duplicates().itertuples(index=False, name=None)
    found = [(f"{task}, {model}", study_plots.learning_curves(study, task, model)) for task, model in pairs]
    return [(title, picture) for title, picture in found if picture]


def _few_shot(study: Study) -> list[tuple[str, str]]:
    found = [(model, study_plots.few_shot(study, model)) for model in dict.fromkeys(study.few_shot["model"])]
    return [(model, picture) for model, picture in found if picture]


def _data_rows(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """What was trained and tested on, by task and fraction."""
    rows = []
    for (task, fraction), group in runs.groupby(["task", "fraction"], sort=False):
        splits = sorted({str(value)[:12] for value in group["splits_sha256"].dropna() if value})
        row = {"task": task, "fraction": fraction, "splits": splits}
        for column in ("train_cases", "test_cases"):
            low, high = number(group[column].min(), 0), number(group[column].max(), 0)
            row[column] = low if low == high else f"{low} to {high}"
        rows.append({**row, "source": source("runs.csv", row, "task", "fraction")})
    return rows
