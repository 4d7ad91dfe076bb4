"""Networks whose features sets of images are compared by, and how images enter them.

`inception` is FID's network with torch-fidelity's weights: ADM's protocol. `random` is the same network with seeded random
weights, `teacher` is EfficientNet-Lite0: stand-ins that need no download. Their results are named after them, never FID.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pickle import UnpicklingError
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity import feature_extractor_inceptionv3 as inception
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from tokenizers_lab.assets import find, get_asset
from tokenizers_lab.draw import stable_seed
from tokenizers_lab.errors import CheckpointError, ConfigError, InputError

from .deterministic import exact_convolutions, map_in_order

Rounding = Literal["nearest", "truncate"]
SIZE, CLASSES, SPATIAL_CHANNELS = 299, 1008, 7
GPU_CHUNK = 32         # images of one forward on a GPU; the last chunk is filled up, so that its shape never changes
TF1_RESIZE = "TensorFlow 1 bilinear to 299 (no half-pixel centres, no antialias)"
STAND_IN_NAMES = {     # what a metric is called when its network is not FID's
    "rfid": "frechet", "fid": "frechet", "sfid": "frechet_spatial", "kid": "kernel_distance", "is": "class_score",
    "precision": "precision", "recall": "recall",
}


@dataclass
class Features:
    """What a network gives for images, float32 on the CPU."""

    pool: Tensor                     # (B, D) pooled features: FID, KID, precision, recall
    spatial: Tensor | None = None    # (B, 2023) of an early layer: sFID
    logits: Tensor | None = None     # (B, K) class logits: Inception Score

    def parts(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    @staticmethod
    def join(pieces: Sequence["Features"]) -> "Features":
        """All images of the pieces, in order. Raises InputError for none."""
        if not pieces:
            raise InputError("there are no features to join")
        return Features(**{name: torch.cat([getattr(piece, name) for piece in pieces]) for name in pieces[0].parts()})


def to_uint8(images: Tensor, rounding: Rounding = "nearest") -> Tensor:
    """uint8 (B, 3, H, W) as an image file would hold it, from float in [0, 1] (clamped). uint8 passes as it is.

    nearest: 255 x rounded (halves to even); truncate: its whole part. Raises InputError on other shapes, types, NaN.
    """
    if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise InputError(f"features need RGB images (B, 3, H, W), not {tuple(images.shape)}: convert grey images first")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise InputError(f"features need images as float in [0, 1] or uint8, not {images.dtype}: divide 16-bit images by 65535")
    if not images.isfinite().all():
        raise InputError("images for features have NaN or infinite pixels")
    if rounding not in ("nearest", "truncate"):
        raise InputError(f"there is no rounding '{rounding}'; known: nearest, truncate")
    scaled = images.float().clamp(0, 1) * 255
    return (scaled.round() if rounding == "nearest" else scaled.floor()).to(torch.uint8)


class InceptionV3(nn.Module):
    """The 2015 Inception network, built of torch-fidelity's blocks under its names: pool, spatial and logits in one pass."""

    def __init__(self) -> None:
        super().__init__()
        conv = inception.BasicConv2d
        self.Conv2d_1a_3x3 = conv(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = conv(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = conv(32, 64, kernel_size=3, padding=1)
        self.Conv2d_3b_1x1 = conv(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = conv(80, 192, kernel_size=3)
        self.Mixed_5b = inception.InceptionA(192, pool_features=32)
        self.Mixed_5c = inception.InceptionA(256, pool_features=64)
        self.Mixed_5d = inception.InceptionA(288, pool_features=64)
        self.Mixed_6a = inception.InceptionB(288)
        self.Mixed_6b = inception.InceptionC(768, channels_7x7=128)
        self.Mixed_6c = inception.InceptionC(768, channels_7x7=160)
        self.Mixed_6d = inception.InceptionC(768, channels_7x7=160)
        self.Mixed_6e = inception.InceptionC(768, channels_7x7=192)
        self.Mixed_7a = inception.InceptionD(768)
        self.Mixed_7b = inception.InceptionE_1(1280)
        self.Mixed_7c = inception.InceptionE_2(2048)
        self.fc = nn.Linear(2048, CLASSES)

    def forward(self, images: Tensor) -> Features:
        """Features of uint8 images (B, 3, H, W) of any size."""
        x = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(SIZE, SIZE), align_corners=False)
        x = (x - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)                                            # (B, 192, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))))
        # sFID's layer is TensorFlow's mixed_6/conv, the 1×1 branch of this block; others take 6e, wrongly
        spatial = self.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS]                   # (B, 7, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))))
        pool = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return Features(pool, spatial.permute(0, 2, 3, 1).flatten(1), pool.mm(self.fc.weight.T))   # no bias, as ADM


class FeatureExtractor(nn.Module):
    """A frozen network with a name; the features of an image depend on that image alone."""

    def __init__(self, network: nn.Module, kind: str, identifier: str, resize: str, provenance: str, rounding: Rounding):
        """network: uint8 images (B, 3, H, W) -> Features. kind: inception, random, teacher, or given (the user's own weights)."""
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.kind, self.identifier, self.resize = kind, identifier, resize
        self.provenance, self.rounding = provenance, rounding

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """An extractor stays in eval mode."""
        return super().train(False)

    @property
    def is_inception(self) -> bool:
        """Whether the network is FID's, so that its results may be called FID."""
        return self.kind == "inception"

    def metric_name(self, metric: str) -> str:
        """`rfid` for FID's network; `frechet_random` or `frechet_teacher` for a stand-in."""
        return metric if self.is_inception else f"{STAND_IN_NAMES[metric]}_{self.kind}"

    def protocol(self) -> dict[str, Any]:
        """What determines the features, as JSON data."""
        return {"extractor": self.identifier, "resize": self.resize, "rounding": f"uint8, {self.rounding}"}

    def forward(self, images: Tensor) -> Features:
        """Features of float images in [0, 1] or uint8 (B, 3, H, W), float32 on the CPU. Raises InputError on bad images.

        On the CPU each image is one forward on one thread; on a GPU forwards have one fixed shape, without TF32. So neither
        the batch nor the number of threads changes a bit (a GPU's kernels are taken as they are).
        """
        images = to_uint8(images, self.rounding)
        device = next(self.network.parameters()).device
        if device.type == "cpu":
            return Features.join(list(map_in_order(self._run, images.cpu().split(1))))
        pieces = [self._run_filled(chunk.to(device)) for chunk in images.split(GPU_CHUNK)]
        return Features.join(pieces)

    def _run(self, images: Tensor) -> Features:
        with torch.inference_mode():      # thread-local: it must be entered here
            found = self.network(images)
        return Features(**{name: tensor.float().cpu().clone() for name, tensor in found.parts().items()})

    def _run_filled(self, images: Tensor) -> Features:
        count = len(images)
        filled = torch.cat([images, images.new_zeros(GPU_CHUNK - count, *images.shape[1:])])
        with exact_convolutions():
            found = self._run(filled)
        return Features(**{name: tensor[:count] for name, tensor in found.parts().items()})


def build_extractor(
    kind: str = "inception", path: str | None = None, device: torch.device | str = "cpu", seed: int = 0,
    rounding: Rounding = "nearest",
) -> FeatureExtractor:
    """The extractor of that kind: inception, random or teacher.

    path: Inception weights in torch-fidelity's format; none: from the assets table. Other weights than the published file
    (by SHA-256) give kind `given`, whose results are not called FID. seed: of the random weights.
    Raises WeightsMissing if the network is not here and cannot be fetched, CheckpointError if the file is another network's,
    ConfigError on an unknown kind.
    """
    if kind == "inception":
        extractor = _inception(path, rounding)
    elif kind == "random":
        provenance = f"inception-v3 with random weights, seed {seed}"
        extractor = FeatureExtractor(random_inception(seed), "random", provenance, TF1_RESIZE, provenance, rounding)
    elif kind == "teacher":
        extractor = _teacher(rounding)
    else:
        raise ConfigError(f"there are no features '{kind}'; known: inception, random, teacher")
    return extractor.to(device)


def random_inception(seed: int = 0) -> InceptionV3:
    """The network with weights N(0, 2 / fan-in), seeded for each tensor by its name; the same on every machine."""
    with torch.device("meta"):
        network = InceptionV3()
    network = network.to_empty(device="cpu")
    for name, tensor in network.state_dict().items():
        if tensor.dim() >= 2:
            generator = torch.Generator().manual_seed(stable_seed(seed, "inception", name))
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        else:      # batch norms pass their input on; biases are 0
            tensor.fill_(1 if name.endswith((".bn.weight", ".running_var")) else 0)
    return network


def _inception(path: str | None, rounding: Rounding) -> FeatureExtractor:
    found = find("inception-fid", path)
    try:
        state = torch.load(found.path, map_location="cpu", weights_only=True)
        with torch.device("meta"):
            network = InceptionV3()
        network.load_state_dict(state, assign=True)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, OSError, EOFError, UnpicklingError) as error:
        # torch's own words for a pickle advise to load it unsafely
        reason = "it is no plain state dict" if isinstance(error, UnpicklingError) else str(error).splitlines()[0]
        raise CheckpointError(f"{found.path} does not hold torch-fidelity's Inception weights: {reason}") from error
    kind = "inception" if found.sha256 == get_asset("inception-fid").sha256 else "given"
    return FeatureExtractor(network.float(), kind, f"inception-v3 {found.sha256}", TF1_RESIZE, found.source, rounding)


class _TeacherFeatures(nn.Module):
    """EfficientNet-Lite0's last stage, averaged over positions, and its class logits."""

    def __init__(self, teacher: Any):
        super().__init__()
        self.teacher = teacher

    def forward(self, images: Tensor) -> Features:
        x = images.float() / 255
        values = self.teacher.preprocess(x)
        return Features(self.teacher.hidden(values)[:, self.teacher.prefix :].mean(dim=1), logits=self.teacher.logits(x))


@dataclass
class _TeacherChoice:
    backend: str = "asset"
    source: str = "efficientnet-lite0"
    input_size: int = 0
    config: dict[str, Any] = field(default_factory=dict)


def _teacher(rounding: Rounding) -> FeatureExtractor:
    from tokenizers_lab.teachers.vision import build_vision_teacher

    teacher = build_vision_teacher(_TeacherChoice(), grid=1)
    digest = hashlib.sha256()
    for name, tensor in sorted(teacher.network.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    size = "×".join(map(str, teacher.network_size((0, 0), None)))
    return FeatureExtractor(
        _TeacherFeatures(teacher), "teacher", f"efficientnet-lite0 {digest.hexdigest()}", f"the teacher's own, to {size}",
        teacher.provenance, rounding,
    )
