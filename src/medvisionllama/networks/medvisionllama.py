"""`MedVisionLlama`: the published network as one constructor."""

from torch import Tensor

from medvisionllama.llm import FrozenBlock
from medvisionllama.networks.embeds import PatchEmbed
from medvisionllama.networks.heads import LinearHead
from medvisionllama.networks.inserts import LLMInsert
from medvisionllama.networks.segmenter import TokenSegmenter
from medvisionllama.networks.vit import VisionTransformer, grid_after
from medvisionllama.types import ImageBatch, LogitBatch, MapperKind, Triple


class MedVisionLlama(TokenSegmenter):
    """A ViT segmenter around one frozen block of a language model (arXiv 2410.02458, section 3).

    Image `[b, c, x, y, z]` in, logits `[b, num_outputs, x, y, z]` out. The sizes are the reference code's.

    Args:
        image_size: voxels in x, y, z, each a multiple of `patch_size`.
        block: by default the catalogue's `smollm2-135m`, fetched once, with LoRA of rank `mapper_rank`; published:
            `FrozenBlock.from_pretrained("llama-3.1-8b", lora_rank=4)`.
        depth: transformer blocks, `insert_after` of them before the language model's.
        prompt: rows of `medvisionllama.llm.embed_prompt`, set before the tokens inside the block.
        seed: of mappers and LoRA, which `torch.manual_seed` does not reach; repetitions give each its own.

    Raises:
        ValueError: an image size that the patches do not tile; in a call, an image of another size.
        BlockError: the default block cannot be fetched.

    >>> from medvisionllama.llm import FrozenBlock
    >>> block = FrozenBlock.from_pretrained("smollm2-135m", weights="random")
    >>> model = MedVisionLlama(image_size=(32, 32, 16), num_outputs=3, block=block, depth=2, insert_after=1)
    >>> import torch; model(torch.zeros(1, 1, 32, 32, 16)).shape
    torch.Size([1, 3, 32, 32, 16])
    """

    def __init__(
        self,
        *,
        image_size: Triple = (128, 128, 128),
        num_channels: int = 1,
        num_outputs: int = 1,
        block: FrozenBlock | None = None,
        patch_size: int = 8,
        width: int = 64,
        depth: int = 16,
        insert_after: int = 8,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        dropout: float = 0.2,
        mapper: MapperKind = "linear+lora",
        mapper_rank: int = 4,
        gated: bool = False,
        prompt: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        if any(size % patch_size for size in image_size):
            raise ValueError(f"image_size={image_size} is not a multiple of patch_size={patch_size}")
        if not 0 <= insert_after <= depth:
            raise ValueError(f"insert_after={insert_after} is not from 0 to depth={depth}")
        block = block or FrozenBlock.from_pretrained(lora_rank=mapper_rank, seed=seed)
        grid = grid_after(image_size, (patch_size,) * 3)

        def transformer(depth: int, positions: Triple | None) -> VisionTransformer:
            return VisionTransformer(
                depth,
                width=width,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                attention_dropout=0.0,
                positions=positions,
            )

        super().__init__(
            embed=PatchEmbed(num_channels, width, patch_size=patch_size),
            encoder=transformer(insert_after, grid),
            insert=LLMInsert(
                width,
                block,
                mapper=mapper,
                rank=mapper_rank,
                gated=gated,
                seed=seed,
                grid=grid,
                prompt=prompt,
            ),
            decoder=transformer(depth - insert_after, None),
            head=LinearHead(width, num_outputs, patch_size=patch_size),
        )
        self.image_size = image_size

    def forward_all(self, image: ImageBatch) -> tuple[LogitBatch, list[LogitBatch]]:
        """Return the logits, and no coarser ones; images of another size have other positions."""
        if tuple(image.shape[2:]) != tuple(self.image_size):
            x, y, z = self.image_size
            raise ValueError(f"image has shape {tuple(image.shape)}, the network needs [b, c, {x}, {y}, {z}]")
        return super().forward_all(image)
