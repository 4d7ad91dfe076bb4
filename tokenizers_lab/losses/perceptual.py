"""Distances between images in the features of frozen networks. All networks stay in eval mode; gradients flow to the images."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenizers_lab.assets import find_state_dict
from tokenizers_lab.errors import ConfigError, InputError
from tokenizers_lab.teachers.preprocess import IMAGENET_MEAN, IMAGENET_STD, normalise, resize

LPIPS_ASSETS = {"vgg": "lpips-vgg16", "alex": "lpips-alexnet"}
LPIPS_VERSION = "0.1"             # of the heads; vgg's are taming-transformers' file, MD5 d507d7349b931f0638a25a48a722f98a
LOGIT_ASSETS = {"convnext_small": "convnext-small"}
LOGIT_SIZE = 224                  # pixels a side given to the classifier


class Frozen(nn.Module):
    """A module that never trains: no gradient to its weights, always in eval mode."""

    provenance: str

    def freeze(self) -> None:
        """Call at the end of __init__."""
        self.requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> "Frozen":
        """Eval mode, whatever is asked."""
        return super().train(False)


class LPIPS(Frozen):
    """Learned perceptual distance (Zhang et al. 2018, arXiv 1801.03924, version 0.1), with the published weights.

    `net`: backbone, vgg (VGG16) or alex (AlexNet), trained on ImageNet. `path`: its weights, none: found or fetched.
    Raises WeightsMissing if they are nowhere, ConfigError on another net.
    """

    def __init__(self, net: str = "vgg", path: str | None = None):
        super().__init__()
        if net not in LPIPS_ASSETS:
            raise ConfigError(f"LPIPS has no backbone '{net}'; known: {', '.join(LPIPS_ASSETS)}")
        state, source = find_state_dict(LPIPS_ASSETS[net], path)
        self.net, self.scaling, self.heads = load_lpips(net, state)
        self.provenance = f"LPIPS v{LPIPS_VERSION} ({net}), backbone {source}"
        self.freeze()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance (B,) of images x and y, (B, 3, H, W) in [0, 1], in float32. Raises InputError if the shapes differ."""
        check_images(x, y)
        with torch.autocast(x.device.type, enabled=False):
            total = x.new_zeros(len(x), dtype=torch.float32)
            for f, g, head in zip(self.backbone(x), self.backbone(y), self.heads):
                total = total + head((unit(f) - unit(g)).square()).mean((1, 2, 3))     # sum over layers of spatial means
            return total

    def backbone(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features (B, c, h, w) of the five layers, from images in [0, 1]."""
        return self.net(self.scaling(2 * images.float() - 1))


class LogitDistance(Frozen):
    """Mean squared difference of a classifier's logits: the second half of RecTok's perceptual loss.

    `network`: convnext_small (torchvision's ConvNeXt-S, ImageNet), or a module with `logits(images)` and `provenance`,
    such as a VisionTeacher with a classifier. `path`: ConvNeXt's weights, none: found or fetched.
    Raises WeightsMissing if they are nowhere, ConfigError on another name.
    """

    def __init__(self, network: str | nn.Module = "convnext_small", path: str | None = None):
        super().__init__()
        if isinstance(network, nn.Module):
            self.network: Any = network
            self.provenance = str(getattr(network, "provenance", "network given by the caller"))
        elif network in LOGIT_ASSETS:
            state, self.provenance = find_state_dict(LOGIT_ASSETS[network], path)
            self.network = Classifier(network, state)
        else:
            raise ConfigError(f"there is no logit network '{network}'; known: {', '.join(LOGIT_ASSETS)}")
        self.freeze()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean over the classes (B,) of the squared difference, for images (B, 3, H, W) in [0, 1], in float32."""
        check_images(x, y)
        with torch.autocast(x.device.type, enabled=False):
            return (self.network.logits(x.float()) - self.network.logits(y.float())).square().mean(1)


class Classifier(nn.Module):
    """A torchvision classifier with the given weights, as its training saw images: 224 pixels, ImageNet mean and std."""

    def __init__(self, name: str, state: dict[str, Tensor]):
        super().__init__()
        import torchvision

        with torch.device("meta"):         # no time lost on an initialisation that is replaced
            self.network = getattr(torchvision.models, name)(weights=None)
        self.network.load_state_dict(state, strict=True, assign=True)

    def logits(self, images: Tensor) -> Tensor:
        """Class logits (B, 1000) of images (B, 3, H, W) in [0, 1], resized to 224 pixels (bilinear, antialias); with gradient."""
        return self.network(normalise(resize(images, (LOGIT_SIZE, LOGIT_SIZE), "bilinear"), IMAGENET_MEAN, IMAGENET_STD))


def load_lpips(net: str, state: dict[str, Tensor]) -> tuple[nn.Module, nn.Module, nn.ModuleList]:
    """(backbone, input scaling, heads) of the lpips package with torchvision's backbone tensors `features.N.*`.

    The package itself would print, draw random weights and unpickle its heads: it builds the networks only.
    """
    import warnings

    import lpips

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")    # the package uses an old argument of torchvision
        model = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    # slice2.3.weight is torchvision's features.3.weight
    names = {name: f"features.{name.partition('.')[2]}" for name in model.net.state_dict()}
    model.net.load_state_dict({name: state[source] for name, source in names.items()}, strict=True, assign=True)
    file = Path(lpips.__file__).parent / "weights" / f"v{LPIPS_VERSION}" / f"{net}.pth"
    weights = torch.load(file, map_location="cpu", weights_only=True)
    heads = nn.ModuleList()
    for i in range(len(model.chns)):
        head: Any = getattr(model, f"lin{i}")
        head.load_state_dict({"model.1.weight": weights[f"lin{i}.model.1.weight"]}, strict=True, assign=True)
        heads.append(head.model[1])        # without the dropout before it
    return model.net, lpips.ScalingLayer(), heads


def unit(features: Tensor) -> Tensor:
    """Features (B, c, h, w) divided by their norm over the channels + 1e-10.

    Where all channels are 0 the gradient is 0 too; the package's square root gives NaN there.
    """
    return features / (features.square().sum(1, keepdim=True).clamp_min(1e-20).sqrt() + 1e-10)


def check_images(x: Tensor, y: Tensor) -> None:
    """Raise InputError unless x and y are float images (B, 3, H, W) of one shape."""
    if x.shape != y.shape or x.dim() != 4 or x.shape[1] != 3 or not (x.is_floating_point() and y.is_floating_point()):
        raise InputError(f"two float tensors (B, 3, H, W) of one shape are needed, not {tuple(x.shape)} and {tuple(y.shape)}")
