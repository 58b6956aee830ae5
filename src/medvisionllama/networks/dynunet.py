"""MONAI's DynUNet with the decoder and the supervision of nnU-Net v2; importing it brings MONAI.

MONAI's own has the kernels of nnU-Net's first version: each stage on the way up has that of the stage below, three
voxels across slices where they are still far apart. And it brings coarser logits to full resolution, where a loss
costs as much as that of the finest.
"""

from monai.networks.blocks.dynunet_block import UnetUpBlock
from monai.networks.nets import DynUNet
from torch import Tensor, nn

from medvisionllama.types import ImageBatch


class DynUNetV2(DynUNet):
    """The same arguments, parameters' names and logits; while training, a list of logits, finest first."""

    def get_upsamples(self) -> nn.ModuleList:
        """Stages on the way up, deepest first, each with the kernel of the stage at its own resolution."""
        modules: nn.ModuleList = self.get_module_list(
            self.filters[1:][::-1],
            self.filters[:-1][::-1],
            self.kernel_size[:-1][::-1],
            self.strides[1:][::-1],
            UnetUpBlock,
            self.upsample_kernel_size[::-1],
            trans_bias=self.trans_bias,
        )
        return modules

    def forward(self, image: ImageBatch) -> Tensor | list[Tensor]:
        logits: Tensor = self.output_block(self.skip_layers(image))
        return [logits, *self.heads] if self.training and self.deep_supervision else logits
