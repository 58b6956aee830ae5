"""Controls on a trained run: the same network with one part of it replaced."""

import copy
from dataclasses import replace
from pathlib import Path

from medvisionllama.checkpoint import copy_into, frozen, trainable
from medvisionllama.devices import fast_layout
from medvisionllama.inference.predictor import Member
from medvisionllama.networks.factory import build_block
from medvisionllama.networks.inserts import LLMInsert
from medvisionllama.networks.segmenter import TokenSegmenter


def with_random_block(member: Member) -> Member | None:
    """The same trained network around a block of its family's random weights; None if it has no block to replace.

    Encoder, mappers, gate, decoder and head are shared with the original, and a trained LoRA update of the block is
    kept. The seed is not the run's own, so that a run trained around a random block meets another one.
    """
    network, config = member.network, member.config
    insert = network.insert
    if not isinstance(insert, LLMInsert) or not len(insert.block.layers):
        return None
    settings = config.network.block.model_copy(update={"weights": "random"})
    block = build_block(settings, seed=config.train.seed + 1)
    if frozen(insert.block):
        copy_into(block, trainable(insert.block), where=config.out or Path("the run"))
    twin = copy.copy(insert)
    # A shallow copy shares its table of modules, and the original must keep its block.
    twin._modules = dict(insert._modules)
    twin.block = fast_layout(block).to(member.device)
    other = TokenSegmenter(network.embed, network.encoder, twin, network.decoder, network.head)
    return replace(member, network=other.eval())
