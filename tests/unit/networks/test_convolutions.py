import pytest
import torch
from torch import nn

from medvisionllama.networks.layers import Conv3d, ConvBlock, InstanceNorm3d, Rise, use_our_layers


def weight_gradient(convolution: nn.Conv3d, image: torch.Tensor, *, bf16: bool) -> torch.Tensor:
    convolution.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        made = convolution(image)
    made.float().backward(torch.randn(made.shape, generator=torch.Generator().manual_seed(1)))
    return convolution.weight.grad.clone()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(2, 2, 2), (2, 2, 1), (2, 6, 6), (5, 5, 1), (1, 1, 1), (4, 4, 4)])
def test_weight_gradients_in_bf16_are_those_of_float32(shape, stride):
    # PyTorch's own are garbage here on CPUs with AVX512-BF16; on others this passes without our convolution too.
    torch.manual_seed(0)
    convolution = Conv3d(64, 64, 3, padding=1, stride=stride, bias=False)
    image = torch.randn(2, 64, *shape)
    exact = weight_gradient(convolution, image, bf16=False)
    for _ in range(3):
        made = weight_gradient(convolution, image, bf16=True)
        assert (made - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("stride", [(2, 2, 2), (2, 2, 1), (2, 1, 4), (1, 1, 1)])
def test_rising_is_the_transposed_convolution(stride):
    torch.manual_seed(0)
    ours, theirs = Rise(5, 3, stride), nn.ConvTranspose3d(5, 3, stride, stride=stride)
    theirs.load_state_dict(ours.state_dict())
    image = torch.randn(2, 5, 4, 3, 2)
    made = []
    for module in (ours, theirs):
        given = image.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            risen = module(given)
        risen.float().square().sum().backward()
        made.append((risen, given.grad, module.weight.grad, module.bias.grad))
    assert made[0][0].is_contiguous(memory_format=torch.channels_last_3d)
    for mine, other in zip(*made, strict=True):
        assert (mine - other).norm() < 0.01 * other.norm()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_a_block_hands_on_the_layout_it_was_given(layout):
    torch.manual_seed(0)
    block = ConvBlock(3, 4).to(memory_format=layout)
    image = torch.randn(2, 3, 5, 4, 3).to(memory_format=layout)
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            made, conv = block(image), block.conv(image)
            normed = nn.functional.instance_norm(conv, weight=block.norm.weight, bias=block.norm.bias)
            plain = nn.functional.leaky_relu(normed, 0.01)
        # Convolutions keep the layout in bf16 only where the processor has it.
        kept = conv.is_contiguous(memory_format=layout)
        assert kept or bf16
        assert made.is_contiguous(memory_format=layout) or not kept
        assert torch.equal(made, plain)


def test_a_foreign_network_keeps_its_weights():
    network = nn.Sequential(
        nn.Conv3d(1, 2, 3), nn.InstanceNorm3d(2, affine=True), nn.ConvTranspose3d(2, 1, 2)
    )
    before = {name: value.clone() for name, value in network.state_dict().items()}
    use_our_layers(network)
    assert [type(module) for module in network] == [Conv3d, InstanceNorm3d, nn.ConvTranspose3d]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
