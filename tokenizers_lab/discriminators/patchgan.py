"""PatchGAN: judges overlapping patches of an image (Isola et al. 2017), as in taming-transformers."""

from torch import Tensor, nn


class PatchGAN(nn.Module):
    """`layers` halvings of the image, then one more convolution, each with batch norm and LeakyReLU, then one logit a patch.

    Batch statistics are of the process's own batch; they are not shared over ranks.
    """

    def __init__(self, channels: int = 3, width: int = 64, layers: int = 3):
        super().__init__()
        widths = [width * min(2**n, 8) for n in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for n in range(1, layers + 1):
            stride = 2 if n < layers else 1
            parts += [
                nn.Conv2d(widths[n - 1], widths[n], 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[n]),
                nn.LeakyReLU(0.2),
            ]
        parts.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.main = nn.Sequential(*parts)

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, channels, H, W). Returns logits (B, 1, h, w), larger for what looks real."""
        return self.main(images)
