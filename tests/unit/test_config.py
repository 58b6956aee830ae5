from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from medvisionllama.config import PRESETS, load_config, read_config, write_config
from medvisionllama.errors import ConfigError
from medvisionllama.training.optim import plateau_drops


def refusal(*overrides: str, preset: str = "small") -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(preset, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_and_survives_its_file(preset, tmp_path):
    config = load_config(preset)
    write_config(config, tmp_path / "config.yaml")
    assert config.preset == preset
    assert read_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("layers=-1", (-1,)),
        ("layers=0,1", (0, 1)),
        ("layers=28:30", (28, 29)),
        ("layers=0,28:30", (0, 28, 29)),
        ("layers=[-2, -1]", (-2, -1)),
        ("lora_targets=q_proj,v_proj", ("q_proj", "v_proj")),
        ("lora_targets=q_proj", ("q_proj",)),
        ("lora_targets=[]", ()),
        ("prompt=left #ventricle", "left #ventricle"),
        ("prompt=left: [LV] myocardium", "left: [LV] myocardium"),
        ("prompt=no", "no"),
        ("prompt=", ""),
        ("rotary=3d", "3d"),
        ("rotary=true", True),
    ],
)
def test_words_and_lists_are_typed_as_they_are(text, value):
    rank = ["network.block.lora_rank=2"] if "q_proj" in text else []
    block = load_config("small", [f"network.block.{text}", *rank]).network.block
    assert getattr(block, text.partition("=")[0]) == value


@pytest.mark.parametrize("text", ["", "x", "0:x", "3:3", "0:99999999999", "0:" + "9" * 30])
def test_layers_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match=r"^network\.block\.layers"):
        load_config("small", [f"network.block.layers={text}"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("exclude=001", ("001",)),
        ("exclude=2024-01-05", ("2024-01-05",)),
        ("exclude=no, 1e3,patient 7 #2", ("no", "1e3", "patient 7 #2")),
        ("exclude=[001,002]", ("001", "002")),
        ("exclude=['a,b', \"001\"]", ("a,b", "001")),
        ("exclude=scan[1],it's,", ("scan[1]", "it's")),
        ("modality=1", ("1",)),
        ("modality=null", None),
        ("patient_pattern=[0-9]{3}", "[0-9]{3}"),
        (r"patient_pattern=[A-Z]+_(\d+)", r"[A-Z]+_(\d+)"),
        (r"patient_pattern=(\w+) #x", r"(\w+) #x"),
        ("patient_pattern='^(.{4})'", "^(.{4})"),
        ("patient_pattern=007", "007"),
        ("patient_pattern=null", None),
        ("patient_pattern=", None),
    ],
)
def test_names_and_patterns_are_texts_whatever_they_look_like(text, value):
    data = load_config("small", [f"data.{text}"]).data
    assert getattr(data, text.partition("=")[0]) == value


@pytest.mark.parametrize("value", ["[a", "a,,b", ","])
def test_a_list_of_texts_with_a_gap_is_refused(value):
    assert "not readable" in refusal(f"data.exclude={value}")


def test_other_lists_are_typed_in_the_same_way():
    data = load_config("small", ["data.crop_size=32,40,32", "data.modality=CT", "data.spacing_mm=null"]).data
    assert (data.crop_size, data.modality, data.spacing_mm) == ((32, 40, 32), ("CT",), None)


def test_a_written_file_names_every_setting(tmp_path):
    write_config(load_config("small"), tmp_path / "config.yaml")
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written["network"]["block"]["lora_targets"] == []
    assert written["augment"]["rotation_degrees"] == 20.0


def test_the_paper_preset_has_the_published_sizes():
    config = load_config("paper")
    network, train = config.network, config.train
    assert config.data.crop_size == (128, 128, 128)
    assert (network.patch_size, network.width, network.depth, network.insert_after) == (8, 64, 16, 8)
    assert (train.batch_size, train.epochs, train.learning_rate, train.optimizer) == (4, 200, 2e-3, "adam")


def test_strings_and_mappings_override_alike():
    texts = ["network.insert=none", "train.learning_rate=1e-4", "data.crop_size=[32, 32, 16]"]
    values = {"network.insert": "none", "train.learning_rate": 1e-4, "data.crop_size": (32, 32, 16)}
    assert load_config("small", texts) == load_config("small", values)
    assert load_config("small", texts).train.learning_rate == 1e-4


def test_overrides_of_nested_sections_keep_the_preset_around_them():
    block = load_config("paper", ["network.block.lora_rank=8"]).network.block
    assert (block.lora_rank, block.source) == (8, "llama-3.1-8b")


def test_the_last_override_of_a_key_wins():
    assert load_config("small", ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_nobody_who_is_to_be_left_out_is_forgotten_where_a_key_is_repeated():
    with pytest.raises(ConfigError, match=r"data.exclude is given twice .* --set data.exclude=a,b"):
        load_config("small", ["data.exclude=patient076", "data.exclude=patient012"])
    with pytest.raises(ConfigError, match="given twice"):
        load_config("small", ["data.exclude=a", "data.exclude="])
    assert load_config("small", ["data.exclude=a,b"] * 2).data.exclude == ("a", "b")
    assert load_config("small", ["data.crop_size=8,8,8", "data.crop_size=16,8,8"]).data.crop_size == (
        16,
        8,
        8,
    )


@pytest.mark.parametrize("name", ["2024-01-05", "20240105", "2024-02-30", "my splits #2.json"])
@pytest.mark.parametrize("key", ["data.splits", "train.start_from", "unlabelled.scans"])
def test_names_of_files_are_not_read_as_dates_or_numbers(key, name):
    section, field = key.split(".")
    assert str(getattr(getattr(load_config("small", [f"{key}={name}"]), section), field)) == name


@pytest.mark.parametrize("value", ["2024-02-30", "0x_"])
def test_what_yaml_cannot_read_is_one_line(value):
    with pytest.raises(ConfigError, match="the value is not readable"):
        load_config("small", [f"train.batch_size={value}"])


def test_one_override_needs_no_list():
    assert load_config("small", "train.seed=7") == load_config("small", ["train.seed=7"])


def test_overrides_do_not_leak_into_the_preset():
    load_config("paper", ["network.block.source=other", "data.labels=all"])
    config = load_config("paper")
    assert (config.network.block.source, config.data.labels) == ("llama-3.1-8b", "foreground")


def test_paths_may_be_given_as_paths():
    assert load_config("small", {"data.path": Path("folder")}).data.path == Path("folder")


def test_null_takes_a_setting_back():
    config = load_config("small", ["train.epochs=5", "train.max_minutes=null"])
    assert (config.train.epochs, config.train.max_minutes) == (5, None)


@pytest.mark.parametrize("limit", ["epochs", "max_steps"])
def test_a_limit_that_is_asked_for_takes_the_place_of_the_preset_s_minutes(limit):
    assert load_config("small", {f"train.{limit}": 5}).train.max_minutes is None
    assert load_config("small", [f"train.{limit}=5", "train.max_minutes=3"]).train.max_minutes == 3
    assert load_config("small", {f"train.{limit}": None}).train.max_minutes == 20


@pytest.mark.parametrize("limit", ["epochs", "max_steps"])
def test_who_counts_steps_trains_one_network_unless_more_are_asked_for(limit):
    assert load_config("small").train.members == 2
    assert load_config("small", ["train.max_minutes=3"]).train.members == 2
    assert load_config("small", {f"train.{limit}": 5}).train.members == 1
    assert load_config("small", {f"train.{limit}": 5, "train.members": 3}).train.members == 3


@pytest.mark.parametrize("value", [".inf", ".nan"])
def test_a_number_that_is_none_is_refused(value):
    assert "finite number" in refusal(f"train.max_minutes={value}")


def test_a_configuration_is_frozen():
    with pytest.raises(ValidationError):
        load_config("small").train.seed = 3


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(
        ConfigError, match="unknown preset 'medium'; the presets are: small, large, paper, reference"
    ):
        load_config("medium")


@pytest.mark.parametrize(
    ("override", "near"),
    [("train.learning_rates=1", "train.learning_rate"), ("network.block.sorce=x", "network.block.source")],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(override, near):
    message = refusal(override)
    assert override.split("=")[0] in message
    assert f"did you mean {near}?" in message


@pytest.mark.parametrize("override", ["train=3", "network.block=x", "train.=1", "seed=1"])
def test_a_section_or_half_a_key_is_not_a_setting(override):
    assert "unknown setting" in refusal(override)


def test_an_override_without_equals_sign_is_refused():
    assert "write it as --set section.key=value" in refusal("train.seed")


def test_an_override_that_is_no_yaml_is_refused():
    assert "not readable" in refusal("data.crop_size=[1, 2")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.batch_size", "0"),
        ("train.batch_size", "two"),
        ("train.learning_rate", "-0.1"),
        ("train.optimizer", "sgd"),
        ("data.fraction", "0"),
        ("data.fraction", "1.5"),
        ("data.fold", "-1"),
        ("data.crop_size", "[8, 8]"),
        ("network.dropout", "1.0"),
        ("network.insert", "null"),
        ("inference.overlap", "1.0"),
    ],
)
def test_a_value_outside_its_limits_is_refused_by_name(key, value):
    assert key in refusal(f"{key}={value}")


@pytest.mark.parametrize("given", ["40", "40,40"])
def test_too_few_values_are_told_how_many_are_needed(given):
    message = refusal(f"data.crop_size={given}")
    assert "data.crop_size: holds too few values; write one for each axis" in message


@pytest.mark.parametrize(
    "override",
    [
        "train.seed=-1",
        "data.split_seed=-1",
        "augment.scale=[0, 1]",
        "augment.scale=[1.2, 0.8]",
        "data.spacing_mm=[1, 0, 1]",
        "data.spacing_mm=[1, -1, 1]",
        "network.block.layers=[]",
        "train.learning_rate=.nan",
        "data.normalisation=240:-160",
        "data.normalisation=soft tissue",
        "data.normalisation=0:inf",
        "data.flip_axes=w",
        "data.strides=[[2,2,2],[2,2,2]]",
        "data.strides=[[0,2,2],[2,2,2],[2,2,2]]",
    ],
)
def test_a_value_that_can_only_fail_later_is_refused_now(override):
    assert override.split("=")[0] in refusal(override)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["network.width=10", "network.num_heads=4"], ("width=10", "num_heads=4")),
        (["network.depth=2", "network.insert_after=3"], ("insert_after=3", "depth=2")),
        (["network.insert=mlp", "network.insert_mlp_ratio=0.005"], ("insert_mlp_ratio=0.005", "width=192")),
        (["network.insert_mlp_ratio=2"], ("insert_mlp_ratio", "insert=mlp")),
        (["network.mlp_ratio=0.001"], ("mlp_ratio=0.001", "width=192")),
        (["network.mapper_rank=16"], ("mapper_rank", "mapper=linear")),
        (["network.block.lora_targets=q_proj"], ("lora_targets", "lora_rank")),
        (["network.block.weights=identity", "network.block.rotary=3d"], ("weights=identity", "rotary")),
        (["network.block.weights=identity", "network.block.causal=true"], ("weights=identity", "causal")),
        (["preset=paper"], ("preset", "--preset")),
        (["network.tokens=false", "network.head=linear"], ("tokens=false", "head=linear")),
        (["data.geometry=resize"], ("data.geometry=resize", "data.crop_size")),
        (["network.head=linear", "data.crop_size=[16, 16, 12]"], ("crop_size=(16, 16, 12)", "patch_size=8")),
        (["network.head=linear", "data.strides=[[2,2,2],[2,2,2],[2,2,2]]"], ("data.strides", "head=linear")),
        (["augment.flip=none", "data.flip_axes=x"], ("data.flip_axes", "augment.flip=none")),
        (["augment.enabled=false", "data.flip_axes=x"], ("data.flip_axes", "augment.enabled=false")),
        (["train.max_minutes=null"], ("train.epochs", "train.max_minutes")),
    ],
)
def test_settings_that_contradict_each_other_are_refused_by_name(overrides, words):
    message = refusal(*overrides)
    assert all(word in message for word in words)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml does not exist"):
        read_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"train: [", "not readable YAML"),
        (b"\xff\xfe\x00", "not readable YAML"),
        (b"- a list", "holds no settings"),
        (b"", "holds no settings"),
        (b"train: {epochs: 1, speed: 9}", "train.speed"),
        (b"train: 3", "train"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_by_name(tmp_path, content, words):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.yaml") as caught:
        read_config(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("section", ["null", "3", "[1, 2]"])
def test_an_override_of_a_file_whose_section_is_no_mapping_is_refused(tmp_path, section):
    path = tmp_path / "config.yaml"
    path.write_text(f"train: {section}")
    with pytest.raises(ConfigError, match="train"):
        read_config(path, ["train.batch_size=5"])


def test_overrides_apply_on_top_of_a_file(tmp_path):
    write_config(load_config("paper"), tmp_path / "config.yaml")
    config = read_config(tmp_path / "config.yaml", ["train.epochs=3"])
    assert (config.train.epochs, config.train.batch_size) == (3, 4)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("data.normalisation=-160:40", ("-160:40",)),
        ("data.normalisation=[-160:40]", ("-160:40",)),
        ("data.normalisation=image, 190:20", ValueError),
        ("data.normalisation=['-160:40', image]", ("-160:40", "image")),
        ("data.normalisation=image,20:190.5", ("image", "20:190.5")),
        ("data.flip_axes=x,y", ("x", "y")),
        ("data.flip_axes=[]", ()),
        ("data.strides=[[2,2,1],[2,2,1],[2,2,2]]", ((2, 2, 1), (2, 2, 1), (2, 2, 2))),
        ("network.block.layers=[28:30]", (28, 29)),
    ],
)
def test_lists_windows_and_ranges_are_read_as_typed(text, value):
    if value is ValueError:
        assert "window as -160:240" in refusal(text)
        return
    config = load_config("small", [text])
    section, name = text.split("=")[0].rsplit(".", 1)
    where = config.network.block if section == "network.block" else getattr(config, section)
    assert getattr(where, name) == value


def test_a_window_survives_the_file(tmp_path):
    config = load_config("small", ["data.normalisation=-160:40"])
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("settings", "turns"),
    [
        ({}, True),
        ({"augment.enabled": False}, False),
        ({"augment.rotation_degrees": 0}, False),
        ({"augment.spatial_probability": 0}, False),
        ({"inference.turn": False}, False),
    ],
)
def test_only_a_network_that_has_seen_turned_crops_is_asked_about_turned_scans(settings, turns):
    assert load_config("small", settings).turns_views is turns


def test_a_schedule_that_validations_drive_has_enough_of_them(tmp_path):
    with pytest.raises(ConfigError, match=r"train.num_validations=4 are over before; set at least 5"):
        load_config("small", ["train.schedule=plateau"])
    # What has been trained so is still read.
    write_config(load_config("small"), tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml", ["train.schedule=plateau"]).train.schedule == "plateau"
    config = load_config("small", ["train.schedule=plateau", "train.num_validations=5"])
    assert plateau_drops([0.5] * (config.train.num_validations - 1)) == 1, "one drop before the end"
