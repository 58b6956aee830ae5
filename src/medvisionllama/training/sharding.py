"""The frozen block divided among processes (FSDP), everything trained whole in each of them (DDP).

What is trained stays an ordinary tensor, so that averaged weights, optimiser, saving and resuming know nothing of
shards. A layer is gathered where it is needed, forwards and backwards, and let go again; being frozen it has no
gradient to give back. Every forward pass is then a collective: all processes must run equally many.
"""

import torch
from torch.nn.parallel import DistributedDataParallel

from medvisionllama.checkpoint import frozen
from medvisionllama.training.losses import SupervisedSegmenter
from medvisionllama.training.processes import Processes


def prepare_sharded(model: SupervisedSegmenter, processes: Processes) -> DistributedDataParallel:
    """Divide the block, and wrap the model as Accelerate would, which refuses to wrap shards on GPUs."""
    shard_frozen_block(model, processes)
    # The rest of it: the shards are there already.
    model.to(processes.accelerator.device)
    # As if for evaluation it is given its precision, and not wrapped.
    return DistributedDataParallel(processes.accelerator.prepare_model(model, evaluation_mode=True))


def shard_frozen_block(model: SupervisedSegmenter, processes: Processes) -> None:
    """Keep a share of each layer's frozen weights in each process, in place, before DDP wraps the model."""
    # Half a second or more, which runs that share nothing need not wait for.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    block = model.network.block
    assert block is not None, "train.shard_block needs one, as the configuration has checked"
    device: torch.device = processes.accelerator.device
    mesh = init_device_mesh(device.type, (processes.num,))
    for layer in block.layers:
        trained = {parameter for parameter in layer.parameters() if parameter.requires_grad}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    # DDP must neither send nor compare the shards.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(frozen(model)))
