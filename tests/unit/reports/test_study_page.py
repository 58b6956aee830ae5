"""The page of a study, on a study of 24 runs with known numbers."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pandas as pd
import pytest

from medvisionllama.reports import study_plots
from medvisionllama.reports.study import Study
from medvisionllama.reports.study_page import write_study
from medvisionllama.reports.study_words import count_words, statement

ARMS = {"none": "no insert", "pretrained": "frozen block", "random": "random block"}
GAIN = {"none": 0.0, "pretrained": 0.0122, "random": -0.03}
TASKS, FRACTIONS, SEEDS = ("Task04", "Task101"), (0.1, 1.0), (0, 1)
VOID = {"meta", "img", "br", "rect", "line", "circle", "path", "text"}


def dice(task, arm, fraction, seed, patient):
    return round(
        0.7 + 0.05 * (task == "Task101") + 0.1 * fraction + GAIN[arm] + 0.002 * seed + 0.01 * patient, 6
    )


def planned():
    for task in TASKS:
        for fraction in FRACTIONS:
            for arm in ARMS:
                for seed in SEEDS:
                    keys = {
                        "task": task,
                        "model": "small",
                        "arm": arm,
                        "fraction": fraction,
                        "fold": 0,
                        "seed": seed,
                    }
                    yield {"run_id": f"{task}-small-{arm}-{fraction:g}-{seed}", **keys}


def comparison(task, arm, fraction, **changes):
    row = {
        "task": task,
        "model": "small",
        "fraction": fraction,
        "metric": "dice",
        "arm": arm,
        "reference": "none",
    }
    row |= {"num_patients": 20, "num_runs": 2, "mean": 0.8135, "reference_mean": 0.801, "difference": 0.0124}
    row |= {"low": 0.0041, "high": 0.0214, "seed_sd": 0.0032, "p": 0.0021, "p_holm": 0.0084, "effect": 0.71}
    row |= {"dz": 0.55, "patients_needed": 41.0, "wins": 16, "losses": 4, "ties": 0, "seed_p": 0.012}
    return {**row, **changes}


OPEN = {
    "difference": 0.0021,
    "low": -0.0012,
    "high": 0.0053,
    "p": 0.11,
    "p_holm": 0.31,
    "patients_needed": 85.0,
}


def whole_study():
    runs, cases, curves = [], [], []
    for run in planned():
        key = (run["task"], run["arm"], run["fraction"], run["seed"])
        facts = {"splits_sha256": "ab" * 32, "train_cases": int(40 * run["fraction"]), "test_cases": 3}
        facts |= {"steps": 300, "seconds": 360.0, "evaluation_seconds": 36.0, "validation_dice": 0.777}
        facts |= {
            "test_dice": 0.8,
            "trainable": 1_234_567,
            "frozen": 3_540_000 if run["arm"] != "none" else 0,
        }
        facts |= {
            "gflops": 12.3,
            "gate_rms": None,
            "attempts": 1,
            "error": "",
            "machine": "2 cores",
            "variant_of": "",
        }
        runs.append({**run, "state": "done", **facts})
        for patient in range(3):
            names = {
                "splits_sha256": "ab" * 32,
                "case_id": f"case_{patient}",
                "patient_id": f"patient_{patient}",
            }
            for name, offset in (("head", 0.01), ("tail", -0.01), ("foreground", 0.2)):
                cases.append({**run, **names, "class": name, "dice": dice(*key, patient) + offset})
        curves += [
            {
                **run,
                "step": step,
                "seconds": step,
                "loss": 1 / step,
                "dice": 0.7 - 50 / step + 0.01 * run["seed"],
            }
            for step in (100, 200, 300)
        ]
    comparisons = [
        comparison(task, arm, fraction, **({} if (task, fraction) == ("Task04", 0.1) else OPEN))
        for task in TASKS
        for fraction in FRACTIONS
        for arm in ("pretrained", "random")
    ]
    summary = []
    for task in TASKS:
        for fraction in FRACTIONS:
            for arm in ARMS:
                mean = sum(dice(task, arm, fraction, seed, p) for seed in SEEDS for p in range(3)) / 6
                for metric, value in (("dice", mean), ("hd95_mm", 10 * (1 - mean))):
                    row = {"task": task, "model": "small", "arm": arm, "fraction": fraction, "metric": metric}
                    row |= {"mean": value, "low": value - 0.0208, "high": value + 0.0304, "seed_sd": 0.0014}
                    summary.append(
                        {
                            **row,
                            "num_patients": 3,
                            "num_runs": 2,
                            "median": value,
                            "q1": value - 0.0117,
                            "q3": value + 0.0113,
                        }
                    )
    return Study(
        name="Does a block help?",
        about="Two tasks, three arms.",
        matrix="tasks: [Task04, Task101]",
        reference="none",
        runs=pd.DataFrame(runs),
        cases=pd.DataFrame(cases),
        curves=pd.DataFrame(curves),
        comparisons=pd.DataFrame(comparisons),
        summary=pd.DataFrame(summary),
        few_shot=pd.DataFrame(summary).query("metric == 'dice'"),
        arms=ARMS,
        ranks=pd.DataFrame({"arm": ["pretrained", "none", "random"], "rank": [1.0, 2.0, 3.0]}),
        critical_difference=1.66,
        compute={"core-hours": "4.8", "machine": "2 cores"},
        links={run["run_id"]: f"../runs/{run['run_id']}/report.html" for run in planned()},
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page of the whole study."""
    return write_study(whole_study(), tmp_path_factory.mktemp("results"))


@pytest.fixture
def study():
    """To be changed; without learning curves, which take longest to draw."""
    return replace(whole_study(), curves=pd.DataFrame())


class Strict(HTMLParser):
    """Refuses tags that do not close in order, and keeps tables, titles and addresses."""

    def __init__(self):
        super().__init__()
        self.open, self.rows, self.addresses, self.titles = [], [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.addresses += [attrs[name] for name in ("href", "src") if name in attrs]
        if tag == "tr":
            self.rows.append((attrs.get("title"), []))
        if tag in ("td", "th"):
            self.rows[-1][1].append([attrs.get("title"), ""])
        if tag == "th":
            assert "scope" in attrs
        if tag == "img":
            assert attrs["alt"]
        if "title" in attrs:
            self.titles.append(attrs["title"])
        if tag not in VOID - {"text"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID, tag

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.rows[-1][1][-1][1] += data


def parse(page):
    parser = Strict()
    parser.feed(page.read_text())
    parser.close()
    assert not parser.open
    return parser


def find(folder, key):
    """The one row of a CSV file that a title names."""
    name, _, rest = key.partition(": ")
    table = pd.read_csv(folder / name, dtype=str, keep_default_na=False)
    for pair in rest.partition(". 95 %")[0].split(", "):
        column, _, value = pair.partition("=")
        table = table[table[column] == value]
    assert len(table), key
    return table


def rounded(values):
    """Every way a page may round a number."""
    found = set()
    for value in values:
        try:
            number = float(value)
        except ValueError:
            continue
        found |= {f"{round(number, digits) + 0.0:.{digits}f}" for digits in range(5)} | {
            f"{number:.2g}",
            f"{number:,.0f}",
        }
    return {text.lstrip("+-") for text in found}


def numbers(text):
    return [number.rstrip(",.") for number in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]


def test_every_number_of_a_table_is_in_the_row_that_its_cell_names(written):
    parser = parse(written)
    checked = 0
    for row_title, cells in parser.rows:
        for cell_title, text in cells:
            title = cell_title or row_title
            if title is None or ".csv" not in title or "Task" in text or "block" in text or "%" in text:
                continue
            key = title.partition(". 95 %")[0]
            values = rounded(find(written.parent, key).to_numpy().ravel())
            for number in numbers(text):
                if "abab" not in text:
                    assert number in values, (title, text)
                    checked += 1
    assert checked > 150


def test_every_number_of_a_sentence_is_in_the_row_that_it_names(written):
    page = written.read_text()
    lines = re.findall(r'<li class="statement" title="([^"]+)"><b>[^<]+</b>: ([^<]+)</li>', page)
    assert len(lines) == 8
    for title, text in lines:
        values = rounded(find(written.parent, title).to_numpy().ravel()) | {"0.01", "0"}
        assert set(numbers(text)) <= values, text


def test_the_answer_says_what_is_shown_and_no_more(written):
    page = written.read_text()
    assert (
        "Of 4 comparisons by Dice, 1 show pretrained to be better than none, 0 show it to be worse, and 3"
        in page
    )
    assert (
        "difference +0.012 (0.004 to 0.021), p_holm 0.0084, p over runs 0.012, 20 patients, 2 runs: better than none"
        in page
    )
    assert (
        "difference +0.002 (-0.001 to 0.005), p_holm 0.31, p over runs 0.012, 20 patients, 2 runs: no difference shown; "
        "85 patients would be needed to detect 0.01" in page
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {**OPEN, "num_patients": 5, "wins": 5, "losses": 0},
            "5 patients that differ are too few for any p below 0.05 (the smallest this test can give is 0.0625)",
        ),
        (
            {**OPEN, "num_patients": 9, "wins": 9, "losses": 0, "family_size": 40},
            "p of 9 patients is never below 0.0039, which Holm's correction over 40 comparisons may raise to 0.16",
        ),
        ({**OPEN, "low": 0.0001}, "is not corrected for the number of comparisons"),
        (
            {**OPEN, "patients_needed": 12.0, "num_runs": 5},
            "enough patients to detect 0.01, were this the only comparison (12 needed)",
        ),
        (
            {**OPEN, "patients_needed": 12.0},
            "enough patients to detect 0.01 (12 needed), but 2 trainings that vary by 0.003 (SD) cannot show it",
        ),
        (
            {**OPEN, "patients_needed": 12.0, "num_runs": 1, "seed_sd": float("nan"), "seed_p": float("nan")},
            "enough patients to detect 0.01 (12 needed), but one training each cannot show it",
        ),
        ({"seed_sd": 0.02}, "better than none; from run to run it varies by more than itself (SD 0.020)"),
        (
            {"num_runs": 1, "seed_sd": float("nan"), "seed_p": float("nan")},
            "no difference shown; the patients of these trainings differ, but one training each says nothing",
        ),
        (
            {"seed_p": 0.2},
            "no difference shown; the patients of these trainings differ, but 2 trainings are too few, or vary too",
        ),
        (
            {"effect": -0.8},
            "no difference shown; the patients of these trainings differ, but most of them go one way",
        ),
        (
            {**OPEN, "num_patients": 30, "num_runs": 5, "seed_p": 0.3},
            "the interval leaves no room for a mean difference of 0.01 either way",
        ),
        (
            {**OPEN, "num_patients": 30, "seed_p": 0.3},
            "mean difference of 0.01 either way, for these trainings; others may differ by more",
        ),
        ({**OPEN, "num_patients": 30, "wins": 0, "losses": 0}, "no difference shown; no patient differs"),
        ({"difference": -0.0125, "low": -0.02, "high": -0.004, "effect": -0.7}, "worse than none"),
        (
            {"metric": "hd95_mm", "difference": -0.5, "effect": -0.7},
            "difference -0.50 (0.00 to 0.02), p_holm 0.0084, p over runs 0.012, 20 patients, 2 runs: better",
        ),
        ({"num_patients": 0, "num_runs": 0}, "not compared: no pair of runs is done"),
        ({"left_out": 3}, "3 more planned pairs of runs are not done"),
    ],
)
def test_a_comparison_in_words(changes, words):
    assert words in statement(comparison("Task04", "pretrained", 0.1, **changes)).text


def test_what_no_run_has_answered_is_not_counted_as_no_difference():
    none = {"num_patients": 0, "num_runs": 0, "p_holm": float("nan"), "seed_p": float("nan")}
    missing, better, still_open = (
        statement(comparison(task, "pretrained", 0.1, **changes))
        for task, changes in (("a", none), ("b", {}), ("c", OPEN))
    )
    nothing = "There is no answer yet: no comparison of pretrained with none could be made."
    assert count_words([missing], "pretrained", "none") == nothing
    assert count_words([missing, missing], "pretrained", "none") == nothing
    more = " 1 more could not be made: no pair of runs is done."
    shown = count_words([missing, better], "pretrained", "none")
    assert shown == f"In the one comparison by Dice, pretrained is shown to be better than none.{more}"
    shown = count_words([better, missing, still_open], "pretrained", "none")
    assert shown.startswith("Of 2 comparisons by Dice, 1 show pretrained to be better than none, 0 show it")
    assert shown.endswith(f"and 1 show no difference.{more}")


def test_fewer_patients_than_six_never_show_a_difference():
    row = comparison("Task04", "pretrained", 0.1, **OPEN | {"num_patients": 6, "wins": 6, "losses": 0})
    assert "too few" not in statement(row).text


def test_a_forest_shows_difference_and_interval_in_numbers_and_in_place(written):
    page = written.read_text()
    row = page[page.index('class="forest"') :]
    row = row[
        row.index("comparisons.csv: task=Task04, model=small, fraction=0.1, metric=dice, arm=pretrained") :
    ]
    row = row[: row.index("</tr>")]
    assert "+0.012" in row
    assert "<td>0.004 to 0.021</td>" in row
    left, right = (
        float(re.search(rf'<line {x}="([0-9.]+)" [^>]*stroke-width', row)[1])
        for x in ("x1", 'x1="[0-9.]+" x2')
    )
    middle = float(re.search(r'cx="([0-9.]+)"', row)[1])
    zero = float(re.search(r'x1="([0-9.]+)"[^>]*stroke="#1c2430"/>', row)[1])
    assert zero < left < middle < right
    assert (middle - zero) / (left - zero) == pytest.approx(0.0124 / 0.0041, rel=0.02)


def test_compute_is_added_up_by_arm(written):
    table = pd.read_csv(written.parent / "arms.csv").set_index("arm")
    # 8 runs of 360 s and 36 s.
    assert table.loc["none", ["training_hours", "evaluation_hours"]].tolist() == pytest.approx([0.8, 0.08])
    assert table.loc["none", ["planned", "done", "failed", "frozen"]].tolist() == [8, 8, 0, 0]


def test_the_best_arm_is_bold_and_signs_follow_holm(written):
    page = written.read_text()
    mean = sum(dice("Task04", "pretrained", 0.1, seed, p) for seed in SEEDS for p in range(3)) / 6
    table = page[page.index('id="tables"') :]
    cell = table[
        table.index("summary.csv: task=Task04, model=small, fraction=0.1, metric=dice, arm=pretrained") :
    ]
    assert f"<b>{mean:.3f}</b>" in cell[: cell.index("</td>")]
    assert "▲" in cell[: cell.index("</td>")]
    # Of the distance, the lowest is best.
    lowest = f"<b>{10 * (1 - mean):.2f}</b>"
    assert lowest in table


def test_an_arm_with_fewer_runs_is_marked_and_not_bold(study, tmp_path):
    page = write_study(without_runs(study, pretrained=[1]), tmp_path).read_text()
    assert "†" in first_cell(page, "pretrained")
    assert "<b>" not in first_cell(page, "pretrained")
    assert "†" not in first_cell(page, "none")


def test_arms_with_as_many_other_runs_are_not_ranked_by_bold(study, tmp_path):
    page = write_study(without_runs(study, none=[0], pretrained=[1]), tmp_path).read_text()
    for arm in ("none", "pretrained"):
        assert "†" in first_cell(page, arm)
        assert "<b>" not in first_cell(page, arm)
    assert "<b>" in first_cell(page, "random")


def without_runs(study, **failed):
    runs = study.runs.copy()
    for arm, seeds in failed.items():
        runs.loc[(runs["arm"] == arm) & runs["seed"].isin(seeds), "state"] = "failed"
    return replace(study, runs=runs)


def first_cell(page: str, arm: str) -> str:
    table = page[page.index('id="tables"') :]
    return table[table.index(f"metric=dice, arm={arm}") :].partition("</td>")[0]


def test_patients_are_means_over_classes_and_runs_without_the_merged_foreground(written):
    table = pd.read_csv(written.parent / "patients.csv").set_index(["task", "fraction", "arm", "patient_id"])
    row = table.loc[("Task04", 0.1, "pretrained", "patient_2")]
    # 0.7 + 0.01 + 0.0122 + 0.02 and seeds 0 and 1 with 0 and 0.002; classes 0.01 up and down.
    assert row["dice"] == pytest.approx(0.7432)
    assert row["reference_dice"] == pytest.approx(0.731)
    assert row["num_runs"] == 2
    assert len(table) == 2 * 2 * 2 * 3


def test_dots_lead_to_the_pages_of_runs(written):
    page = written.read_text()
    dot = re.search(r'<a href="([^"]+)" aria-label="(patient_2: pretrained[^"]+)">', page)
    assert dot[1].startswith("../runs/Task04-small-pretrained-0.1-")
    assert dot[2] == "patient_2: pretrained 0.743, none 0.731, difference +0.012, runs: 2"


def test_failed_runs_are_listed_with_their_last_line(study, tmp_path):
    runs = study.runs.copy()
    runs.loc[3, ["state", "error", "attempts"]] = ["failed", "RuntimeError: <out> of memory", 3]
    runs.loc[4, "state"] = "planned"
    page = write_study(replace(study, runs=runs), tmp_path).read_text()
    assert "Failed runs (1)" in page
    assert "RuntimeError: &lt;out&gt; of memory" in page
    assert "Not all runs are done (1 planned)" in page
    assert "arms have different numbers of runs" in page


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"data_sha256": "other"}, "In 1 of 8 repetitions the arms were not trained on the same files"),
        ({"machine": "another", "steps": 7}, "In 1 of 8 repetitions the arms ran on different machines"),
        ({"machine": "another"}, "In 1 of 8 repetitions the arms made equal steps on different machines"),
        ({"steps": 7}, None),
    ],
)
def test_arms_of_other_files_or_clocks_are_said(study, tmp_path, changed, said):
    runs = study.runs.assign(data_sha256="one")
    runs.loc[0, list(changed)] = list(changed.values())
    page = write_study(replace(study, runs=runs), tmp_path).read_text()
    assert said is None or said in page
    assert page.count(" repetitions the arms ") == (said is not None)


def test_splits_that_differ_within_a_task_are_said(study, tmp_path):
    runs = study.runs.copy()
    runs.loc[0, "splits_sha256"] = "cd" * 32
    page = write_study(replace(study, runs=runs), tmp_path).read_text()
    assert "Task04, fold 0, seed 0: the runs were not all made with the same split." in page


def test_the_page_needs_nothing_from_outside(written):
    parser = parse(written)
    outside = [
        address
        for address in parser.addresses
        if not address.startswith(("data:image/png;base64,", "#", "../runs/"))
        and not (written.parent / address).is_file()
    ]
    assert outside == []
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[^\"]+", "", written.read_text()))
    assert not list(written.parent.glob(".partial*"))


def test_names_with_special_characters_are_escaped_in_html_and_latex(study, tmp_path):
    arm = '<b>50%_R&D#1</b>{x}\\"'
    changed = {
        name: getattr(study, name).replace({"arm": {"pretrained": arm}})
        for name in ("runs", "cases", "curves", "comparisons", "summary", "few_shot", "ranks")
    }
    arms = {arm if name == "pretrained" else name: text for name, text in ARMS.items()}
    page = write_study(replace(study, **changed, arms=arms, links={}), tmp_path)
    parse(page)
    assert "<b>50%" not in page.read_text()
    assert "&lt;b&gt;50%_R&amp;D#1" in page.read_text()
    text = (tmp_path / "table-small-dice.tex").read_text()
    assert r"$<$b$>$50\%\_R\&D\#1$<$/b$>$\{x\}\textbackslash{}" in text
    check_latex(text)


@pytest.mark.parametrize(
    ("tolerances", "words"), [({}, "1 mm"), ({"Task101": 3.0}, "Task04 1 mm, Task101 3 mm")]
)
def test_surface_dice_says_its_tolerance_and_hd95_its_rule(study, tmp_path, tolerances, words):
    tolerance = study.cases["task"].map(tolerances).fillna(1.0)
    summary = study.summary.replace({"metric": {"hd95_mm": "nsd"}})
    changed = replace(
        study,
        cases=study.cases.assign(tolerance_mm=tolerance),
        summary=pd.concat([study.summary, summary]).drop_duplicates(
            ["task", "model", "arm", "fraction", "metric"]
        ),
    )
    page = write_study(changed, tmp_path)
    assert f"within the tolerance of {words} (1 is perfect)" in page.read_text()
    assert f"Tolerance: {words}." in (tmp_path / "table-small-nsd.tex").read_text()
    assert "counts as the diagonal of the scan." in (tmp_path / "table-small-hd95-mm.tex").read_text()


def check_latex(text):
    plain = re.sub(r"\\[&%$#_{}]", "", text.replace(r"\\", "\n"))
    depth = 0
    for character in plain:
        depth += (character == "{") - (character == "}")
        assert depth >= 0
    assert depth == 0
    assert plain.count("$") % 2 == 0
    for body in re.findall(r"\\begin\{tabular\}(.*?)\\end\{tabular\}", text, re.DOTALL):
        columns = len(re.match(r"\{([lcr]+)\}", body)[1])
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(rows) > 2
        for row in rows:
            spans = [int(number) - 1 for number in re.findall(r"\\multicolumn\{(\d+)\}", row)]
            assert len(re.findall(r"(?<!\\)&", row)) + sum(spans) == columns - 1, row


def test_latex_tables_are_regular_and_no_wider_than_a_page(study, tmp_path):
    summary = pd.concat(
        [study.summary, *(study.summary.replace({"task": {"Task04": f"Task_{n}"}}) for n in range(5))]
    ).drop_duplicates(["task", "arm", "fraction", "metric"])
    write_study(replace(study, summary=summary), tmp_path)
    names = sorted(path.name for path in tmp_path.glob("*.tex"))
    assert names == ["ablation.tex", "table-small-dice.tex", "table-small-hd95-mm.tex"]
    for name in names:
        check_latex((tmp_path / name).read_text())
    # 7 tasks at 2 fractions are 14 columns: 6 + 6 + 2.
    assert (tmp_path / "table-small-dice.tex").read_text().count(r"\begin{tabular}") == 3
    assert r"\mathbf{0.733} \pm 0.001^{+}" in (tmp_path / "table-small-dice.tex").read_text()
    assert r"1,234,567" in (tmp_path / "ablation.tex").read_text()


def test_without_curves_links_ranks_and_a_second_task_the_page_says_so(study, tmp_path):
    def one(frame):
        return frame[(frame["task"] == "Task04") & (frame["fraction"] == 1.0)]

    small = replace(
        study,
        runs=one(study.runs),
        cases=one(study.cases),
        comparisons=one(study.comparisons),
        summary=one(study.summary),
        few_shot=one(study.few_shot),
        curves=pd.DataFrame(),
        ranks=None,
        critical_difference=None,
        links={},
    )
    page = write_study(small, tmp_path)
    parse(page)
    text = page.read_text()
    assert "No run has written a learning curve." in text
    assert "No task was measured at more than one fraction in runs that all arms have." in text
    assert "No critical-difference diagram" in text
    assert "In the one comparison by Dice, no difference between pretrained and none is shown." in text
    assert "../runs" not in text


def test_without_a_reference_run_that_is_done_nothing_is_compared_and_the_page_says_so(study, tmp_path):
    runs = study.runs.copy()
    runs.loc[runs["arm"] == "none", ["state", "test_dice"]] = ["planned", float("nan")]
    page = write_study(
        replace(
            study,
            runs=runs,
            cases=study.cases[study.cases["arm"] != "none"],
            comparisons=pd.DataFrame(),
            summary=study.summary[study.summary["arm"] != "none"],
            few_shot=study.few_shot[study.few_shot["arm"] != "none"],
        ),
        tmp_path,
    )
    parse(page)
    text = page.read_text()
    assert "No run of the reference arm none is done, so nothing is compared with it." in text
    assert "There is no answer yet" in text
    assert "No patient was tested in both none and another arm." in text


def test_a_study_that_has_not_begun_has_a_page(study, tmp_path):
    empty = dict.fromkeys(("cases", "curves", "comparisons", "summary", "few_shot"), pd.DataFrame())
    runs = study.runs.assign(state="planned", seconds="", trainable="", test_dice="", splits_sha256="")
    page = write_study(replace(study, runs=runs, **empty, ranks=None), tmp_path)
    parse(page)
    assert "No run is done, so there is nothing to compare." in page.read_text()


def test_models_whose_names_differ_in_odd_characters_get_files_of_their_own(study, tmp_path):
    other = study.summary.assign(model="a b")
    summary = pd.concat([other, study.summary.assign(model="a/b")])
    write_study(replace(study, summary=summary), tmp_path)
    assert r"model a/b" in (tmp_path / "table-a-b-dice-2.tex").read_text()
    assert r"model a b" in (tmp_path / "table-a-b-dice.tex").read_text()


@pytest.mark.parametrize("tasks", [TASKS[:1], TASKS], ids=["one panel", "two panels"])
def test_a_legend_of_many_long_names_is_whole_and_the_axes_keep_their_height(study, monkeypatch, tasks):
    figures = []
    monkeypatch.setattr(study_plots, "png", figures.append)
    few = replace(study, few_shot=study.few_shot[study.few_shot["task"].isin(tasks)])
    study_plots.few_shot(few, "small")
    study_plots.few_shot(with_long_names(few, 12), "small")
    heights = []
    for figure in figures:
        figure.draw_without_rendering()
        names = figure.legends[0].get_window_extent()
        assert 0 <= names.x0 < names.x1 <= figure.bbox.width
        assert 0 <= names.y0 < names.y1 < figure.axes[0].bbox.y0
        heights.append(figure.axes[0].bbox.height)
    assert [len(figure.legends[0].get_texts()) for figure in figures] == [3, 12]
    assert heights[1] > 0.9 * heights[0]


def with_long_names(study, number):
    """So many arms, each with what `pretrained` measured and a name as long as legends show."""
    arms = {f"as long as legends show it, {place:02}": "" for place in range(number)}
    frames = {name: getattr(study, name) for name in ("runs", "summary", "few_shot")}
    for name, frame in frames.items():
        one = frame[frame["arm"] == "pretrained"]
        frames[name] = pd.concat([one.assign(arm=arm) for arm in arms])
    return replace(study, **frames, arms=arms)
