import pytest
import torch
from torch import nn

from medvisionllama.checkpoint import load_tensors, save_tensors, trainable
from medvisionllama.config import TrainConfig
from medvisionllama.errors import CheckpointError
from medvisionllama.training.muon import Muon
from medvisionllama.training.optim import (
    AveragedWeights,
    learning_rate,
    make_optimizer,
    optimizer_tensors,
    plateau_drops,
    restore_optimizer,
    set_learning_rate,
)


def _config(**changes):
    return TrainConfig(**{"epochs": 1, "learning_rate": 0.1, "warmup_steps": 0, **changes})


class _Insert(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(8))


class _Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv3d(2, 8, 3, padding=1)
        self.deeper = nn.Conv3d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.InstanceNorm3d(8, affine=True)
        self.insert = _Insert()
        self.fixed = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, image):
        grid = self.norm(self.deeper(self.conv(image))).movedim(1, -1)
        return grid + self.insert.gate * self.fixed(grid)


def _step(network, optimizer, seed):
    image = torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
    (network(image) - 1).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    ("schedule", "progress", "expected"),
    [
        ("constant", 0.7, 0.1),
        ("cosine", 0.0, 0.1),
        ("cosine", 0.25, 0.1 * 0.853553),
        ("cosine", 0.5, 0.05),
        ("cosine", 1.0, 0.0),
        ("cosine", 1.3, 0.0),
        ("polynomial", 0.0, 0.1),
        ("polynomial", 0.5, 0.1 * 0.535887),
        ("polynomial", 1.0, 0.0),
        ("plateau", 0.9, 0.1),
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule, progress, expected):
    rate = learning_rate(_config(schedule=schedule), progress=progress, step=500)
    assert rate == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.01), (4, 0.05), (9, 0.1), (10, 0.1), (5000, 0.1)])
def test_the_learning_rate_warms_up_step_by_step(step, expected):
    config = _config(schedule="constant", warmup_steps=10)
    assert learning_rate(config, progress=0.0, step=step) == pytest.approx(expected)


def test_each_plateau_halves_the_learning_rate():
    config = _config(schedule="plateau")
    rates = [learning_rate(config, progress=0.5, step=9, plateau_drops=drops) for drops in range(3)]
    assert rates == pytest.approx([0.1, 0.05, 0.025])


@pytest.mark.parametrize(
    ("dices", "expected"),
    [
        ([], 0),
        ([0.1, 0.2, 0.3, 0.4], 0),
        ([0.5, 0.4, 0.4], 0),
        ([0.5, 0.4, 0.4, 0.4], 1),
        ([0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], 2),
        ([0.5, 0.4, 0.4, 0.6, 0.5, 0.5], 0),
    ],
)
def test_three_validations_without_a_new_best_are_a_plateau(dices, expected):
    assert plateau_drops(dices) == expected


def test_only_matrices_decay_only_gates_are_scaled_and_frozen_weights_are_left_out():
    network = _Network()
    optimizer = make_optimizer(network, _config(weight_decay=0.5, gate_learning_rate_scale=3.0))
    set_learning_rate(optimizer, 0.2)
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found[id(parameter)] = (group["weight_decay"], pytest.approx(group["lr"]))
    names = {name: found[id(parameter)] for name, parameter in trainable(network).items()}
    assert names == {
        "conv.weight": (0.5, 0.2),
        "conv.bias": (0.0, 0.2),
        "deeper.weight": (0.5, 0.2),
        "norm.weight": (0.0, 0.2),
        "norm.bias": (0.0, 0.2),
        "insert.gate": (0.0, pytest.approx(0.6)),
    }
    assert len(found) == len(names)


@pytest.mark.parametrize(
    ("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("muon", Muon)]
)
def test_the_optimiser_is_the_one_named(name, kind):
    assert type(make_optimizer(_Network(), _config(optimizer=name))) is kind


def test_swapping_averaged_weights_twice_changes_nothing():
    network = _Network()
    average = AveragedWeights(trainable(network), decay=0.9)
    _step(network, make_optimizer(network, _config()), seed=0)
    average.update(0)
    current = {name: value.detach().clone() for name, value in network.named_parameters()}
    kept = {name: value.clone() for name, value in average.values.items()}
    average.swap()
    for name in trainable(network):
        assert torch.equal(network.get_parameter(name), kept[name])
        assert not torch.equal(kept[name], current[name])
    average.swap()
    assert all(torch.equal(value, current[name]) for name, value in network.named_parameters())
    assert all(torch.equal(value, kept[name]) for name, value in average.values.items())


def test_averaged_weights_move_fast_at_first_and_by_the_decay_later():
    weight = nn.Parameter(torch.tensor([1.0]))
    average = AveragedWeights({"w": weight}, decay=0.99)
    with torch.no_grad():
        weight.fill_(2.0)
    average.update(0)
    assert average.values["w"].item() == pytest.approx(1 + 0.9)  # decay (1 + 0) / (10 + 0)
    with torch.no_grad():
        weight.fill_(3.0)
    average.update(100_000)
    assert average.values["w"].item() == pytest.approx(1.9 + 0.01 * 1.1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("kind", ["adam", "adamw", "muon"])
def test_a_restored_optimiser_goes_on_bit_for_bit(tmp_path, layout, kind):
    config = _config(optimizer=kind)

    def start():
        network = _Network().to(memory_format=layout)
        return network, make_optimizer(network, config)

    network, optimizer = start()
    for seed in range(3):
        _step(network, optimizer, seed)
    path = tmp_path / "state.safetensors"
    save_tensors(path, optimizer_tensors(optimizer, trainable(network)), {})

    resumed, restored = start()
    resumed.load_state_dict(network.state_dict())
    restore_optimizer(restored, trainable(resumed), load_tensors(path)[0])
    for seed in range(3, 6):
        _step(network, optimizer, seed)
        _step(resumed, restored, seed)
    for name, parameter in network.named_parameters():
        assert torch.equal(resumed.get_parameter(name), parameter), name


def test_a_save_whose_weights_were_trained_otherwise_is_refused():
    network = nn.Sequential(nn.Conv3d(8, 8, 3), nn.Linear(8, 8))
    parameters = dict(network.named_parameters())
    optimizer = make_optimizer(network, TrainConfig(optimizer="muon", max_steps=1))
    # As when the matrices of tokens were Muon's too.
    saved = {"1.weight::momentum": torch.zeros(8, 8)}
    with pytest.raises(CheckpointError, match="start a new run"):
        restore_optimizer(optimizer, parameters, saved)
