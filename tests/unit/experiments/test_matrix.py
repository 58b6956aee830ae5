"""A matrix file becomes runs whose ids are the same everywhere and say what defines them."""

from pathlib import Path

import pytest

from medvisionllama.errors import ConfigError
from medvisionllama.experiments.matrix import expand, read_matrix

from .conftest import MINIMAL, matrix

SHIPPED = sorted((Path(__file__).parents[3] / "configs" / "matrix").glob("*.yaml"))


def ids(**changes):
    return [run.run_id for run in expand(matrix(**changes))]


def test_the_id_of_a_run_is_the_same_on_every_machine():
    # Written down: if this test fails, finished runs everywhere would be repeated.
    assert ids() == ["a-small-none-100pc-f0-s0-46136b7a", "a-small-block-100pc-f0-s0-555f7911"]


def test_every_axis_is_multiplied_and_seeds_come_last():
    runs = expand(
        matrix(
            tasks={"a": {"data": "A"}, "b": {"data": "B"}},
            models={"small": {}, "vit": {"preset": "paper"}},
            fractions=[0.1, 1.0],
            folds=[0, 3],
            seeds=[5, 7],
        )
    )
    assert len(runs) == len({run.run_id for run in runs}) == 2 * 2 * 2 * 2 * 2 * 2
    assert [run.seed for run in runs] == [5] * 32 + [7] * 32
    assert runs[0].settings["data.fraction"] == 0.1
    assert {run.settings["data.fold"] for run in runs} == {0, 3}
    assert {run.preset for run in runs} == {"small", "paper"}


def test_a_setting_that_changes_results_changes_the_id_and_one_that_does_not_keeps_it():
    plain = ids()
    assert set(ids(set={"train.max_steps": 6})).isdisjoint(plain)
    assert ids(set={"train.max_steps": 5, "train.save_seconds": 1, "train.device": "cpu"}) == plain
    assert ids(about="other words", reference="block") == plain


def test_one_arm_can_change_without_the_ids_of_the_others():
    changed = ids(arms={**MINIMAL["arms"], "block": {"set": {"network.depth": 4, "network.insert_after": 2}}})
    assert changed[0] == ids()[0]
    assert changed[1] != ids()[1]


def test_arms_model_and_task_set_over_what_all_runs_set():
    first, *_ = expand(
        matrix(
            set={"train.max_steps": 1, "network.width": 96, "network.depth": 8, "train.batch_size": 4},
            models={"small": {"set": {"network.width": 48, "network.depth": 4}}},
            tasks={"a": {"data": "A", "set": {"network.depth": 5}}},
            arms={"none": {"set": {"network.insert": "none", "train.batch_size": 3}}},
        )
    )
    config = first.config(data=Path("A"))
    assert (config.network.width, config.network.depth, config.train.batch_size) == (48, 5, 3)


def test_a_limit_in_the_matrix_replaces_those_of_the_preset():
    run, *_ = expand(matrix(models={"vit": {"preset": "paper"}}))
    train = run.config(data=Path("A")).train
    assert (train.max_steps, train.epochs, train.max_minutes) == (5, None, None)
    run, *_ = expand(matrix(set={}))
    assert run.config(data=Path("A")).train.max_minutes == 20


@pytest.mark.parametrize(
    ("setting", "plain", "asked"), [("train.members", 1, 2), ("inference.turn", False, True)]
)
def test_what_averages_is_left_out_unless_the_matrix_says_otherwise(setting, plain, asked):
    section, key = setting.split(".")
    run, *_ = expand(matrix(set={}))
    assert getattr(getattr(run.config(data=Path("A")), section), key) == plain
    other, *_ = expand(matrix(set={setting: asked}))
    assert getattr(getattr(other.config(data=Path("A")), section), key) == asked
    assert other.run_id != run.run_id


def test_several_values_of_a_setting_make_an_arm_each():
    each = {"network.block.weights": ["random", "permuted"], "network.block.lora_rank": [2, 4]}
    runs = expand(matrix(arms={**MINIMAL["arms"], "x": {"each": each}}))
    assert [run.arm for run in runs][2:] == ["x-random-2", "x-random-4", "x-permuted-2", "x-permuted-4"]
    block = runs[3].config(data=Path("A")).network.block
    assert (block.weights, block.lora_rank) == ("random", 4)


def test_a_range_of_layers_is_none_of_minutes(write_matrix):
    path = write_matrix(
        arms={"none": {}, "last": {"set": {"network.block.layers": "28:30"}}}, reference="none"
    )
    path.write_text(path.read_text().replace("'28:30'", "28:30"))
    (last,) = (run for run in expand(read_matrix(path)) if run.arm == "last")
    assert last.config(data=Path("x")).network.block.layers == (28, 29)


def test_arms_can_be_limited_to_models_and_fractions():
    arms = {
        **MINIMAL["arms"],
        "no-tokens": {"set": {"network.tokens": False}, "models": ["small"], "fractions": [0.1]},
    }
    runs = expand(matrix(arms=arms, models={"small": {}, "vit": {"preset": "paper"}}, fractions=[0.1, 1.0]))
    assert [(run.model, run.fraction) for run in runs if run.arm == "no-tokens"] == [("small", 0.1)]


def test_a_split_for_each_seed_is_the_seed():
    runs = expand(matrix(seeds=[3, 4], split_per_seed=True))
    assert [run.settings["data.split_seed"] for run in runs] == [3, 3, 4, 4]
    assert all("data.split_seed" not in run.settings for run in expand(matrix()))


def test_a_task_may_train_on_so_many_cases_and_use_the_others_without_labels():
    arms = {**MINIMAL["arms"], "self": {"set": {"unlabelled.scans": "unused"}}}
    tasks = {
        "a": {"data": "A", "set": {"data.num_cases": 4}},
        "b": {"data": "A", "set": {"data.num_cases": 8}},
    }
    runs = expand(matrix(arms=arms, tasks=tasks))
    found = [run.config(data=Path("x")).data for run in runs]
    assert [(data.num_cases, data.fraction) for data in found] == [(4, 1.0)] * 3 + [(8, 1.0)] * 3
    assert runs[0].run_id.startswith("a-small-none-4cases-f0-s0-")


def test_a_matched_arm_knows_the_settings_of_its_target():
    arms = {**MINIMAL["arms"], "mlp": {"match": {"arm": "block", "by": "trainable"}}}
    *_, run = expand(matrix(arms=arms, seeds=[9]))
    assert run.match is not None
    assert run.match_settings["train.seed"] == 9
    # Another target is another run.
    assert (
        run.run_id
        != expand(matrix(arms={**arms, "block": {"set": {"network.depth": 4}}}, seeds=[9]))[-1].run_id
    )


BROKEN = {
    "an unknown key": ({"tusks": 1}, "tusks"),
    "no arm of that name": ({"reference": "nobody"}, "none, block"),
    "an unknown setting": ({"set": {"network.widht": 3}}, "did you mean network.width?"),
    "a value that is not allowed": ({"arms": {"none": {"set": {"network.insert": "glue"}}}}, "arm none"),
    "settings against each other": ({"set": {"network.width": 50, "network.num_heads": 4}}, "num_heads"),
    "an axis inside settings": ({"set": {"train.seed": 1}}, "axis"),
    "a fraction above one": ({"fractions": [1.5]}, "fractions"),
    "a seed twice": ({"seeds": [1, 1]}, "twice"),
    "no data": ({"tasks": {"a": {}}}, "phantoms"),
    "data and phantoms": ({"tasks": {"a": {"data": "A", "phantoms": 5}}}, "phantoms"),
    "a name that is no file name": ({"tasks": {"../a": {"data": "A"}}}, "is no name"),
    "a model that is not there": ({"arms": {"none": {"models": ["big"]}}}, "big"),
    "a match with nothing": ({"arms": {"none": {"match": {"arm": "x", "by": "total"}}}}, "'x'"),
    "a match with a matched arm": (
        {"arms": {"none": {}, "m": {"match": {"arm": "m", "by": "total"}}}},
        "no arm of a size of its own",
    ),
    "an unknown preset": ({"models": {"small": {"preset": "tiny"}}}, "tiny"),
    "a fraction that the matrix has not": ({"arms": {"none": {"fractions": [0.3]}}}, "0.3"),
    "no model at all": ({"arms": {"none": {"models": []}}}, "models"),
    "a setting without a value": ({"arms": {"none": {}, "x": {"each": {"train.batch_size": []}}}}, "each"),
    "a fold that does not exist": ({"folds": [1, 5]}, "fold 5 does not exist"),
    "what a fraction leaves over, of all cases": (
        {"arms": {"none": {}, "self": {"set": {"unlabelled.scans": "unused"}}}, "fractions": [0.1, 1.0]},
        "give the arm `fractions` below 1",
    ),
    "a number of cases beside fractions": (
        {"tasks": {"a": {"data": "A", "set": {"data.num_cases": 4}}}, "fractions": [0.1]},
        "data.num_cases=4 and fractions (0.1,) both say how much trains",
    ),
    "a number of cases of one arm": (
        {"arms": {"none": {}, "few": {"set": {"data.num_cases": 4}}}},
        "equal training cases",
    ),
    "splits beside a split for each seed": (
        {"split_per_seed": True, "set": {"data.splits": "s.json"}},
        "split_per_seed draws the splits",
    ),
    "a seed of the split beside a split for each seed": (
        {"split_per_seed": True, "set": {"data.split_seed": 5}},
        "split_per_seed draws the splits",
    ),
    "a block left out where there is none": (
        {"arms": {"none": {"set": {"network.insert": "none"}, "also": ["block_removed"]}}},
        "no block",
    ),
    "an arm that changes nothing": (
        {
            "arms": {
                "none": {"set": {"network.insert": "none"}},
                "plain": {"set": {"network.depth": 6}},
                "x": {},
            }
        },
        "the same training as the arm plain",
    ),
    "a block's weights where there is no block": (
        {
            "arms": {
                "none": {"set": {"network.tokens": False}},
                "random": {"set": {"network.tokens": False, "network.block.weights": "random"}},
            }
        },
        "the same training as the arm none",
    ),
    "a variant twice": (
        {"arms": {"none": {}, "block": {"also": ["block_removed"] * 2}}},
        "block-block-removed",
    ),
    "a variant with the name of an arm": (
        {"arms": {"none": {}, "block": {"also": ["block_removed"]}, "block-block-removed": {}}},
        "block-block-removed",
    ),
    "two arms of one name": (
        {"arms": {"none": {}, "x": {"each": {"train.batch_size": [1]}}, "x-1": {}}},
        "x-1",
    ),
}


@pytest.mark.parametrize(("changes", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_matrix_is_refused_in_one_line(changes, said, write_matrix):
    with pytest.raises(ConfigError) as error:
        expand(read_matrix(write_matrix(**changes)))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[1, 2]", "a: b: c", ""], ids=["a list", "no YAML", "empty"])
def test_a_file_that_is_no_matrix_is_refused(text, tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"m\.yaml"):
        read_matrix(path)


def test_two_arms_of_one_name_are_refused(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text("name: m\narms:\n  block: {}\n  block: {network.insert: none}\n")
    with pytest.raises(ConfigError, match=r"m\.yaml.*'block' stands here a second time.*line 4") as error:
        read_matrix(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_matrix_gives_runs(path):
    found = read_matrix(path)
    runs = expand(found)
    assert runs
    assert len({run.run_id for run in runs}) == len(runs)
    assert all(arm.spec.about for arm in found.expanded_arms()), "each arm says what it isolates"


def test_the_paper_matrix_holds_the_published_study():
    runs = expand(read_matrix(next(path for path in SHIPPED if path.stem == "paper")))
    assert len({run.task for run in runs}) == 10
    assert {run.fraction for run in runs} == {0.1, 0.3, 1.0}
    divisions = {run.config(data=Path("x")).data.split_seed for run in runs}
    assert divisions == {run.seed for run in runs} == set(range(5))
    arms = {run.arm for run in runs}
    ranks = {run.arm: run.config(data=Path("x")).network for run in runs}
    for rank in (2, 4, 8, 16):
        network = ranks[f"medvisionllama-{rank}"]
        assert (network.mapper_rank, network.block.lora_rank) == (rank, rank)
    assert {
        "vit-baseline",
        "vit-depth",
        "vit-mlp",
        "frozen-without-lora",
        "biogpt",
        "biobert",
        "clinicalbert",
    } <= arms
