"""`TokenSegmenter`: embed → encoder → insert → decoder → head. Every model of this project is one of these."""

from collections.abc import Mapping

import torch
from torch import nn

from medvisionllama.llm import FrozenBlock
from medvisionllama.networks.inserts import LLMInsert
from medvisionllama.networks.layers import to_grid, to_tokens
from medvisionllama.types import ImageBatch, LogitBatch, Triple


class TokenSegmenter(nn.Module):
    """Segments a scan through tokens.

    Args:
        embed: image to token grid `[b, d, x, y, z]` (or None) and a list of finer features; has `stride`.
        encoder, insert, decoder: tokens `[b, n, d]` to tokens, of equal shape.
        head: token grid and features to logits and a list of coarser ones, empty but while training.
        memory_format: the layout in which its convolutions are fastest; images are brought into it.
    """

    def __init__(
        self,
        embed: nn.Module,
        encoder: nn.Module,
        insert: nn.Module,
        decoder: nn.Module,
        head: nn.Module,
        *,
        memory_format: torch.memory_format = torch.channels_last_3d,
    ) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(_refuse_another_block)
        self.embed = embed
        self.encoder = encoder
        self.insert = insert
        self.decoder = decoder
        self.head = head
        self.memory_format = memory_format

    @property
    def token_stride(self) -> Triple:
        """Voxels from token to token along x, y, z."""
        stride: Triple = self.embed.stride  # type: ignore[assignment]
        return stride

    @property
    def block(self) -> FrozenBlock | None:
        """The language model's block; None of a network that has none."""
        return self.insert.block if isinstance(self.insert, LLMInsert) else None

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of a prompt that stand before the scan's inside the block."""
        prompt = self.insert.prompt if isinstance(self.insert, LLMInsert) else None
        return 0 if prompt is None else len(prompt)

    @property
    def gate_rms(self) -> float | None:
        """Root mean square of the gate by which the insert's output is multiplied; None where nothing is gated."""
        gate: torch.Tensor | None = getattr(self.insert, "gate", None)
        return None if gate is None else float(gate.detach().float().square().mean().sqrt())

    def forward(self, image: ImageBatch) -> LogitBatch:
        """Return logits `[b, k, x, y, z]` of the image's shape."""
        return self.forward_all(image)[0]

    def forward_all(self, image: ImageBatch) -> tuple[LogitBatch, list[LogitBatch]]:
        """Return the logits and, in training mode, the coarser ones that are supervised too."""
        # Not `contiguous`, which leaves an image of one channel as it is: such a one has both layouts at once, and
        # convolutions go by what its strides suggest.
        image = image.to(memory_format=self.memory_format)
        grid, features = self.embed(image)
        if grid is not None:
            shape = grid.shape[2:]
            tokens = self.decoder(self.insert(self.encoder(to_tokens(grid))))
            grid = to_grid(tokens, shape)
        logits, auxiliary = self.head(grid, features)
        return logits, auxiliary


def _refuse_another_block(
    network: TokenSegmenter, state: Mapping[str, torch.Tensor], prefix: str, *_: object
) -> None:
    """Before any weight is loaded, as the block itself would when half of them are."""
    if network.block is not None:
        network.block.refuse_another(state, f"{prefix}insert.block.")
