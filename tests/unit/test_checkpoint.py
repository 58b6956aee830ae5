import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from medvisionllama.checkpoint import copy_into, frozen, load_tensors, save_tensors, trainable
from medvisionllama.errors import CheckpointError
from payload import Payload


def _network(width=4):
    torch.manual_seed(width)
    network = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2), nn.Linear(2, 2))
    network[2].requires_grad_(False)
    return network


def _values(network):
    return {name: value.detach().clone() for name, value in network.named_parameters()}


def test_tensors_and_facts_come_back_as_they_were_saved(tmp_path):
    tensors = {
        "half": torch.randn(2, 3).bfloat16(),
        "turned": torch.arange(6.0).view(2, 3).T,
        "step": torch.tensor(7.0),
    }
    facts = {"step": 7, "dice": 0.1 + 0.2, "names": ["Leber", "µ"], "none": None}
    path = tmp_path / "new" / "last.safetensors"
    save_tensors(path, tensors, facts)
    found, told = load_tensors(path)
    assert told == facts
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    assert [item.name for item in path.parent.iterdir()] == ["last.safetensors"]


def test_trainable_and_frozen_share_out_all_parameters():
    network = _network()
    assert set(trainable(network)) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert set(frozen(network)) == {"2.weight", "2.bias"}


def test_saved_weights_go_back_into_another_copy(tmp_path):
    path = tmp_path / "best.safetensors"
    network, other = _network(), _network()
    with torch.no_grad():
        network[0].weight += 1
    save_tensors(path, trainable(network), {})
    copy_into(other, load_tensors(path)[0], where=path)
    assert torch.equal(other[0].weight, network[0].weight)


def test_a_pickle_in_place_of_a_checkpoint_is_refused_and_never_run(tmp_path):
    path, sentinel = tmp_path / "best.safetensors", tmp_path / "ran"
    torch.save({"weights": Payload(sentinel)}, path)
    with pytest.raises(CheckpointError, match=r"best\.safetensors is not a checkpoint of ours"):
        load_tensors(path)
    path.write_bytes(pickle.dumps(Payload(sentinel)))
    with pytest.raises(CheckpointError, match="not a checkpoint of ours"):
        load_tensors(path)
    assert not sentinel.exists()
    pickle.loads(path.read_bytes())
    assert sentinel.exists()  # so the payload would have run


@pytest.mark.parametrize("kept", [0, 4, 20, 200, -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
    path = tmp_path / "best.safetensors"
    save_tensors(path, trainable(_network()), {"step": 1})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="damaged"):
        load_tensors(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"facts": "{"}])
def test_weights_that_somebody_else_saved_are_refused(tmp_path, metadata):
    path = tmp_path / "best.safetensors"
    save_file({"0.weight": torch.zeros(2)}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match="not a checkpoint of ours"):
        load_tensors(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_tensors(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError):
        load_tensors(tmp_path)


@pytest.mark.parametrize("case", ["too few", "too many", "another shape"])
def test_weights_of_another_network_are_refused_and_change_nothing(case):
    network = _network()
    tensors = {name: torch.ones_like(value) for name, value in trainable(network).items()}
    if case == "too few":
        del tensors["1.bias"]
    elif case == "too many":
        tensors["9.weight"] = torch.zeros(1)
    else:
        tensors["1.weight"] = torch.zeros(2, 5)
    before = _values(network)
    with pytest.raises(CheckpointError, match=r"1\.bias|9\.weight|1\.weight has shape \(2, 5\)"):
        copy_into(network, tensors, where=Path("best.safetensors"))
    assert all(torch.equal(value, before[name]) for name, value in network.named_parameters())


def test_a_save_that_fails_keeps_the_last_one_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "best.safetensors"
    save_tensors(path, {"w": torch.zeros(1)}, {"step": 1})

    def fill_the_disk(descriptor):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fill_the_disk)
        with pytest.raises(OSError, match="no space"):
            save_tensors(path, {"w": torch.ones(1)}, {"step": 2})
    assert load_tensors(path)[1] == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]
