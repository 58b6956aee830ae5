import pytest
import torch
from accelerate import Accelerator

from medvisionllama.config import load_config
from medvisionllama.errors import ConfigError
from medvisionllama.networks.factory import build_network
from medvisionllama.training.losses import SupervisedSegmenter, dice_ce_loss, targets
from medvisionllama.training.processes import Processes, check_launcher, launched_in_vain

SMALL = {
    "network.stem_channels": [2, 3, 4],
    "network.width": 12,
    "network.depth": 2,
    "network.insert_after": 1,
    "network.num_heads": 2,
    "network.block.source": "smollm2-135m",
    "network.block.weights": "random",
}
ARMS = {
    "gate": {"network.gate": "zero"},
    "no gate": {"network.gate": "none"},
    "first": {"network.insert_after": 0},
    "last": {"network.insert_after": 2},
    "positions after": {"network.positions": "after_insert"},
    "none": {"network.insert": "none"},
    "mlp": {"network.insert": "mlp"},
    "no tokens": {"network.tokens": False},
    "no auxiliary loss": {"train.auxiliary_weight": 0},
    "linear head": {"network.head": "linear", "network.patch_size": 4},
    "upsample head": {"network.head": "upsample", "network.patch_size": 4},
    "lora mapper": {"network.mapper": "lora"},
    "linear+lora mapper": {"network.mapper": "linear+lora"},
    "lora block": {"network.block.lora_rank": 2, "network.block.lora_targets": ["q_proj", "down_proj"]},
    "unfrozen block": {"network.block.frozen": False},
    "unfrozen without norm": {"network.block.frozen": False, "network.block.final_norm": False},
    "identity": {"network.block.weights": "identity"},
}


@pytest.mark.parametrize("arm", ARMS)
def test_every_trained_weight_has_a_gradient_or_processes_would_wait_for_it(arm):
    config = load_config("small", {**SMALL, **ARMS[arm]})
    network = build_network(
        config.network, num_channels=1, num_outputs=3, crop_size=(8, 8, 8), strides=((2, 2, 2),) * 3
    )
    model = SupervisedSegmenter(network, num_outputs=3, auxiliary_weight=config.train.auxiliary_weight)
    model.train()
    model(torch.randn(2, 1, 8, 8, 8), torch.randint(0, 3, (2, 8, 8, 8))).backward()
    without = [
        name for name, value in network.named_parameters() if value.requires_grad and value.grad is None
    ]
    assert not without


def test_the_loss_of_a_batch_is_the_mean_of_its_shares_given_sums_over_the_batch():
    logits = torch.randn(4, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    target = targets(torch.randint(0, 3, (4, 4, 4, 4), generator=torch.Generator().manual_seed(1)), 3)
    sums = []
    dice_ce_loss(logits, target, whole_batch=lambda given: sums.append(given) or given)
    shares = [
        dice_ce_loss(logits[part], target[part], whole_batch=lambda given: sums[0])
        for part in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(sum(shares) / 2, dice_ce_loss(logits, target))
    apart = [dice_ce_loss(logits[part], target[part]) for part in (slice(0, 2), slice(2, 4))]
    assert abs(float(sum(apart) / 2 - dice_ce_loss(logits, target))) > 1e-5


def test_one_process_agrees_with_itself():
    processes = Processes(Accelerator(cpu=True))
    assert processes.is_main
    assert (processes.first(3.5), float(processes.mean(torch.tensor(3.5)))) == (3.5, 3.5)
    assert processes.any(True)
    assert not processes.any(False)
    with processes.machine_first() as is_first:
        assert is_first


@pytest.mark.parametrize("option", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_launchers_that_divide_trained_weights_are_refused(option, monkeypatch):
    check_launcher()
    monkeypatch.setenv(f"ACCELERATE_USE_{option}", "true")
    with pytest.raises(ConfigError, match=rf"--use_{option.lower()} .*--multi_gpu.*train.shard_block=true"):
        check_launcher()


def test_accelerates_cpu_launch_of_one_process_is_noticed(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert not launched_in_vain()
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert launched_in_vain()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not launched_in_vain()


@pytest.mark.parametrize(
    "arm",
    [
        {"insert": "none"},
        {"insert": "mlp"},
        {"tokens": False},
        {"block.frozen": False},
        {"block.weights": "identity"},
    ],
)
def test_sharding_without_a_frozen_block_is_refused(arm):
    chosen = {f"network.{key}": value for key, value in arm.items()}
    with pytest.raises(ConfigError, match="shard_block=true has no effect without a frozen block"):
        load_config("small", {**chosen, "train.shard_block": True})
