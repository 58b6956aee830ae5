import pytest
import torch
from torch import nn

from medvisionllama.config import TrainConfig, load_config
from medvisionllama.networks.factory import build_network
from medvisionllama.training.muon import kernels_before_norms, orthogonalised
from medvisionllama.training.optim import make_optimizer


def _matrix(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _polynomial_of(values):
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return values


@pytest.mark.parametrize("shape", [(16, 54), (54, 16), (8, 8), (192, 5184)])
def test_singular_values_go_through_the_polynomial_and_directions_stay(shape):
    matrix = _matrix(*shape).double()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    expected = left @ torch.diag(_polynomial_of(values / values.norm())) @ right
    torch.testing.assert_close(orthogonalised(matrix), expected, rtol=0, atol=1e-9)


def test_large_and_small_directions_come_out_alike():
    left, _, right = torch.linalg.svd(_matrix(16, 40), full_matrices=False)
    matrix = left @ torch.diag(torch.logspace(0, -2, 16)) @ right
    values = torch.linalg.svdvals(orthogonalised(matrix))
    assert 0.6 < values.min() < values.max() < 1.3


def test_float32_is_exact_enough_where_a_kernel_is_nearly_of_one_rank():
    matrix = _matrix(32, 1) @ _matrix(1, 300, seed=1) + 1e-3 * _matrix(32, 300, seed=2)
    error = orthogonalised(matrix) - orthogonalised(matrix.double()).float()
    assert error.norm() < 1e-3 * orthogonalised(matrix).norm()


def test_no_gradient_moves_nothing():
    assert torch.equal(orthogonalised(torch.zeros(8, 20)), torch.zeros(8, 20))


def _layer(layout=torch.contiguous_format):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 8, 3), nn.Conv3d(8, 12, 3), nn.Conv3d(12, 3, 1)).to(
        memory_format=layout
    )


def _config(**changes):
    return TrainConfig(optimizer="muon", max_steps=1, **changes)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_a_kernel_steps_against_its_orthogonal_momentum_and_the_rest_by_adamw(layout):
    network, twin = _layer(layout), _layer(layout)
    config = _config(learning_rate=0.01, weight_decay=0.5)
    optimizers = (
        make_optimizer(network, config),
        make_optimizer(twin, config.model_copy(update={"optimizer": "adamw"})),
    )
    before = twin[1].weight.detach().clone()
    gradients = {name: _matrix(*p.shape, seed=n) for n, (name, p) in enumerate(network.named_parameters())}
    for model, optimizer in zip((network, twin), optimizers, strict=True):
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone(memory_format=torch.preserve_format)
        optimizer.step()

    # The momentum began at zero: after one step it has a twentieth of the gradient, and of what is ahead of it
    # the direction alone counts.
    update = orthogonalised(gradients["1.weight"].flatten(1)).view(before.shape) * 0.2 * (8 * 27) ** 0.5
    torch.testing.assert_close(network[1].weight.detach(), before * (1 - 0.01 * 0.5) - 0.01 * update)
    assert update.square().mean().sqrt() == pytest.approx(0.2, rel=0.25)
    for name in gradients.keys() - {"1.weight"}:
        assert torch.equal(network.get_parameter(name), twin.get_parameter(name)), name


def test_a_step_looks_ahead_of_the_momentum():
    network = _layer()
    config = _config(learning_rate=0.01, weight_decay=0)
    optimizer = make_optimizer(network, config)
    kernel = network[1].weight
    expected, momentum = kernel.detach().clone(), torch.zeros_like(kernel)
    for seed in range(2):
        kernel.grad = _matrix(*kernel.shape, seed=seed)
        momentum = 0.95 * momentum + 0.05 * kernel.grad
        ahead = 0.95 * momentum + 0.05 * kernel.grad
        expected -= 0.01 * 0.2 * (8 * 27) ** 0.5 * orthogonalised(ahead.flatten(1)).view(kernel.shape)
        optimizer.step()
    torch.testing.assert_close(kernel.detach(), expected)
    torch.testing.assert_close(optimizer.state[kernel]["momentum"], momentum)


def test_kernels_without_a_gradient_stay():
    network = _layer()
    optimizer = make_optimizer(network, _config())
    before = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer.step()
    assert all(map(torch.equal, network.parameters(), before))
    assert len(optimizer.param_groups) == 3


def test_matrices_of_tokens_are_left_to_adamw():
    network = nn.Sequential(nn.Conv3d(8, 8, 3), nn.Linear(16, 16), nn.MultiheadAttention(16, 2))
    kernels = [
        parameter
        for group in make_optimizer(network, _config()).param_groups
        if group["orthogonal"]
        for parameter in group["params"]
    ]
    assert [kernel is network[0].weight for kernel in kernels] == [True]


def _stepped(start, *, num_steps=1, rate=0.01):
    """A kernel before a norm after steps on random gradients."""
    network = nn.Sequential(nn.Conv3d(8, 12, 3, bias=False), nn.InstanceNorm3d(12, affine=True))
    kernel = network[0].weight
    with torch.no_grad():
        kernel.copy_(start)
    optimizer = make_optimizer(network, _config(learning_rate=rate, weight_decay=0.5))
    for seed in range(num_steps):
        kernel.grad = _matrix(*kernel.shape, seed=seed)
        optimizer.step()
    return kernel.detach()


def test_a_kernel_before_a_norm_is_turned_and_keeps_its_size():
    start = _matrix(12, 8, 3, 3, 3, seed=9)
    step = orthogonalised(_matrix(*start.shape).flatten(1)).view(start.shape) * 0.15 * start.norm() / 12**0.5
    assert step.norm() == pytest.approx(0.15 * start.norm(), rel=0.25)
    expected = start - step
    torch.testing.assert_close(_stepped(start), expected * start.norm() / expected.norm())
    assert _stepped(start, num_steps=50).norm() == pytest.approx(start.norm())


def test_it_turns_as_far_however_large_it_began():
    start = _matrix(12, 8, 3, 3, 3, seed=9)
    torch.testing.assert_close(_stepped(6 * start, num_steps=3), 6 * _stepped(start, num_steps=3))


@pytest.mark.parametrize("preset", ["small", "dynunet", "unet", "unet++"])
def test_kernels_before_norms_are_those_of_both_ways_but_not_of_rising_or_of_outputs(preset):
    network = build_network(
        load_config(
            preset, {"network.insert": "none", "network.gate": "none"} if preset == "small" else {}
        ).network,
        num_channels=1,
        num_outputs=3,
        crop_size=(32, 32, 32),
        strides=[(2, 2, 2)] * 3,
    )
    found = {name for name, weight in network.named_parameters() if weight in kernels_before_norms(network)}
    wide = {
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv3d) and max(module.kernel_size) == 3
    }
    assert found == {f"{name}.weight" for name in wide}
    assert len(found) >= 12


def test_kernels_whose_norms_come_before_and_those_that_begin_at_zero_do_not_count():
    shapes = {"num_channels": 1, "num_outputs": 3, "crop_size": (32, 32, 32), "strides": [(2, 2, 2)] * 3}
    assert kernels_before_norms(build_network(load_config("segresnet").network, **shapes)) == set()
    network = nn.Sequential(nn.Conv3d(8, 8, 3, bias=False), nn.Conv3d(8, 8, 3, bias=False))
    nn.init.zeros_(network[1].weight)
    assert kernels_before_norms(network) == {network[0].weight}
