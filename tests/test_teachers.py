"""Vision teachers: the published preprocessing, every backend with tiny networks, and real EfficientNet-Lite0."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor
from transformers import (
    AutoConfig,
    AutoModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTImageProcessor,
    DINOv3ViTModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tokenizers_lab.data.decode import read_image
from tokenizers_lab.data.sources import sample_path
from tokenizers_lab.errors import CheckpointError, ConfigError, InputError, WeightsMissing
from tokenizers_lab.losses.perceptual import LogitDistance
from tokenizers_lab.teachers.preprocess import PREPROCESSING, pixel_values
from tokenizers_lab.teachers.vision import VisionTeacher, build_vision_teacher

PARITY = Path(__file__).parent / "parity" / "rectok"
TINY = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
RANDOM_DINO = {"model_type": "dinov3_vit", "patch_size": "8", **{name: str(value) for name, value in TINY.items()}}


@dataclass
class Teacher:
    """The fields that a teacher's config has."""

    backend: str
    source: str = ""
    input_size: int = 0
    config: dict[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def lite0():
    """Builds Lite0 with real weights at an input size, for a grid; skipped where they cannot be had."""
    def build(input_size: int = 0, grid=None) -> VisionTeacher:
        try:
            return build_vision_teacher(Teacher("asset", "efficientnet-lite0", input_size), grid)
        except WeightsMissing as missing:
            pytest.skip(str(missing))

    return build


def seeded(build, *args, **options) -> nn.Module:
    """A network with the seeded weights of its own initialisation, eval mode, and every parameter away from 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(*args, **options)
        for parameter in network.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    return network.eval()


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).abs().max() / max(1.0, wanted.abs().max().item())).item()


# ---- the published way of preparing images


def test_parity_with_the_official_dinov3_teacher():
    given = load_file(PARITY / "io.safetensors")
    config = json.loads((PARITY / "config.json").read_text())["teacher"]
    config.pop("kind")
    network = AutoModel.from_config(AutoConfig.for_model(**config))
    network.load_state_dict(load_file(PARITY / "teacher.safetensors"), strict=True)
    teacher = VisionTeacher(network, "dinov3")
    x = (given["x"] + 1) / 2
    values = teacher.preprocess(x, 32)
    assert torch.equal(teacher.to_uint8(x), given["train.teacher_input_uint8"])
    assert relative(values, given["train.teacher_pixel_values"]) < 1e-5
    assert relative(teacher.hidden(values), given["train.teacher_last_hidden_state"]) < 1e-5
    assert relative(teacher.features(x, (4, 4)), given["train.teacher_features"]) < 1e-5
    assert teacher.width == 24


@pytest.mark.parametrize("size", [48, 224, 256])
def test_dinov3_is_given_what_transformers_processor_gives(size):
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    processed = DINOv3ViTImageProcessor()((x * 255).byte(), return_tensors="pt")["pixel_values"]
    wanted = F.interpolate(processed, (size, size), mode="bilinear", align_corners=False)
    assert torch.equal(pixel_values(x, (size, size), PREPROCESSING["dinov3"]), wanted)


def test_dinov2_is_given_what_timms_eval_transform_gives():
    """At 518 pixels, then bilinearly to 14 pixels a token of the student."""
    with torch.device("meta"):
        network = timm.create_model("vit_small_patch14_dinov2.lvd142m", pretrained=False)
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=network), is_training=False)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    wanted = F.interpolate(transform(x), (56, 56), mode="bilinear", align_corners=False)
    assert torch.allclose(pixel_values(x, (56, 56), PREPROCESSING["dinov2"]), wanted, atol=1e-5)


def test_preprocessing_is_float32_under_autocast(images):
    wanted = pixel_values(images, (40, 40), PREPROCESSING["dinov3"])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pixel_values(images, (40, 40), PREPROCESSING["dinov3"]), wanted)
    assert pixel_values(images.bfloat16(), (40, 40), PREPROCESSING["siglip"]).dtype == torch.float32


# ---- every backend, from folders


def save_transformers(folder: Path, name: str) -> nn.Module:
    """Save a tiny random network as transformers does; gives the one whose tokens a teacher should return."""
    vision = SiglipVisionConfig(**TINY, image_size=32, patch_size=8)
    text = {"vocab_size": 10, "max_position_embeddings": 4, **TINY}
    build = {
        "dinov2": lambda: Dinov2Model(Dinov2Config(**TINY, image_size=56, patch_size=14)),
        "dinov2_registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**TINY, image_size=56, patch_size=14)),
        "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**TINY, num_register_tokens=4, patch_size=8)),
        "siglip_vision": lambda: SiglipVisionModel(vision),
        "siglip": lambda: SiglipModel(SiglipConfig(vision_config=vision.to_dict(), text_config=text)),
    }[name]
    network = seeded(build)
    network.save_pretrained(folder)
    return network.vision_model if name == "siglip" else network


def save_timm(folder: Path, name: str) -> nn.Module:
    """Save a tiny random network as timm does for the hub."""
    tiny = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    architecture, options = {
        "timm_vit": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, **tiny}),
        "timm_dinov2": ("vit_small_patch14_reg4_dinov2", {"img_size": 56, **tiny}),
        "timm_dinov3": ("vit_small_patch16_dinov3", {"patch_size": 8, **tiny}),
        "timm_siglip": ("vit_base_patch16_siglip_224", {"img_size": 32, "patch_size": 8, **tiny}),
        "timm_cnn": ("test_efficientnet", {}),
    }[name]
    network = seeded(timm.create_model, architecture, pretrained=False, **options)
    size = 64 if name == "timm_cnn" else options.get("img_size", 32)
    network.pretrained_cfg["input_size"] = (3, size, size)
    save_for_hf(network, folder, model_args=options, safe_serialization=True)
    return network


# name: (kind, pixels a side of the network's input for 32-pixel images of 4 × 4 tokens, tokens before the patches)
SAVED = {
    "dinov2": ("dinov2", 56, 1),
    "dinov2_registers": ("dinov2", 56, 5),
    "dinov3": ("dinov3", 32, 5),
    "siglip_vision": ("siglip", 32, 0),
    "siglip": ("siglip", 32, 0),
    "timm_vit": ("siglip", 32, 1),
    "timm_dinov2": ("dinov2", 56, 5),
    "timm_dinov3": ("dinov3", 32, 5),
    "timm_siglip": ("siglip", 32, 0),
    "timm_cnn": ("cnn", 64, 0),
}


@pytest.fixture(scope="module", params=SAVED)
def saved(request, tmp_path_factory):
    """(teacher from a local folder, the network that was saved there, kind, input pixels, prefix tokens)."""
    folder = tmp_path_factory.mktemp(request.param)
    is_timm = request.param.startswith("timm")
    network = (save_timm if is_timm else save_transformers)(folder, request.param)
    teacher = build_vision_teacher(Teacher("timm" if is_timm else "transformers", str(folder)), (4, 4))
    return teacher, network, *SAVED[request.param]


def tokens_of(network: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """All final tokens of the saved network by its own library's call."""
    with torch.no_grad():
        if hasattr(network.config if hasattr(network, "config") else None, "model_type"):
            return network(pixel_values=values).last_hidden_state
        if hasattr(network, "patch_embed"):
            return network.forward_features(values)
        stages = timm.create_model("test_efficientnet", pretrained=False, features_only=True)
        stages.load_state_dict(network.state_dict(), strict=False)
        return stages.eval()(values)[3].flatten(2).transpose(1, 2)      # stride 16: 4 × 4 of 64 pixels


def test_features_are_the_networks_patch_tokens(saved, images):
    teacher, network, kind, size, prefix = saved
    assert (teacher.kind, teacher.network_size((32, 32), 4)) == (kind, (size, size))
    if hasattr(network, "pretrained_cfg"):
        assert (teacher.spec.mean, teacher.spec.std) == (network.pretrained_cfg["mean"], network.pretrained_cfg["std"])
    else:
        assert teacher.spec == PREPROCESSING[kind]
    wanted = tokens_of(network, pixel_values(images, (size, size), teacher.spec))[:, prefix:]
    features = teacher.features(images, (4, 4))
    assert features.shape == (2, 16, teacher.width) and features.dtype == torch.float32
    assert torch.allclose(features, wanted, atol=1e-5)
    assert not torch.allclose(features[0], features[1], atol=1e-2)


def test_features_lie_where_the_picture_is(saved, images):
    """Another top right corner changes the last token of the first row most (a CNN looks further: that quarter's tokens);
    on a finer grid, that corner's tokens."""
    teacher, _, kind, *_ = saved
    changed = images.clone()
    changed[..., :8, -8:] = 1 - changed[..., :8, -8:]
    change = (teacher.features(changed, 4) - teacher.features(images, 4)).norm(dim=2)
    assert set(change.argmax(1).tolist()) <= ({2, 3, 6, 7} if kind == "cnn" else {3})
    teacher.input_size = teacher.network_size((32, 32), 4)[0]      # the network's own grid stays, the student's is finer
    try:
        finer = (teacher.features(changed, (8, 8)) - teacher.features(images, (8, 8))).norm(dim=2).unflatten(1, (8, 8))
        assert finer.shape == (2, 8, 8)
        row, column, reach = finer.flatten(1).argmax(1) // 8, finer.flatten(1).argmax(1) % 8, 4 if kind == "cnn" else 2
        assert (row < reach).all() and (column >= 8 - reach).all()
    finally:
        teacher.input_size = 0


def test_frozen(saved, images):
    teacher, *_ = saved
    x = images.clone().requires_grad_()
    assert not teacher.features(x, 4).requires_grad
    assert not teacher.features(x, 4).is_inference()               # a loss may keep it for its backward pass
    assert not teacher.train().training and not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert "random" not in teacher.provenance


def test_images_that_are_not_square(saved):
    teacher, _, kind, *_ = saved
    x = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(2))
    assert teacher.features(x, (4, 6)).shape == (1, 24, teacher.width)
    if kind in ("dinov2", "dinov3"):
        assert teacher.network_size((32, 48), (4, 6)) == ((56, 84) if kind == "dinov2" else (32, 48))


def test_input_size_option(images):
    """A larger input gives the student's grid from the network itself: 64 pixels, patches of 8, 8 × 8 tokens."""
    large = build_vision_teacher(Teacher("random", config=RANDOM_DINO, input_size=64))
    wanted = large.hidden(large.preprocess(images, 64))[:, 1:]
    assert torch.allclose(large.features(images, 8), wanted, atol=1e-6)


def test_another_grid_is_interpolated():
    """4 × 6 tokens of the teacher on a student's 8 × 12."""
    teacher = build_vision_teacher(Teacher("random", config=RANDOM_DINO))
    x = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(2))
    own = teacher.features(x, (4, 6)).transpose(1, 2).unflatten(2, (4, 6))
    spread = F.interpolate(own, (8, 12), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    assert torch.allclose(teacher.features(x, (8, 12)), spread, atol=1e-6)


# ---- random weights and real ones


def test_random_weights_say_so_and_repeat(images):
    state = torch.get_rng_state()
    one = build_vision_teacher(Teacher("random", config=RANDOM_DINO))
    torch.manual_seed(123)
    two = build_vision_teacher(Teacher("random", config=RANDOM_DINO))
    torch.set_rng_state(state)
    assert one.provenance == "random weights (seed 0)"
    assert (one.width, one.stride) == (24, 8)
    assert torch.equal(one.features(images, 4), two.features(images, 4))


def test_building_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    torch.manual_seed(123)
    state = torch.get_rng_state()
    build_vision_teacher(Teacher("random", config=RANDOM_DINO))
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    assert torch.equal(state, after)


def test_lite0_sees_a_cat(lite0):
    """ImageNet's classes 281 to 285 are the domestic cats."""
    photo = pil_to_tensor(read_image(sample_path("photos", "train") / "chelsea.jpg"))[None] / 255
    teacher = lite0()
    assert teacher.has_logits and "efficientnet-lite0" in teacher.provenance
    chances = teacher.logits(photo).softmax(1)[0]
    assert set(chances.topk(3).indices.tolist()) <= set(range(281, 286))
    assert chances[281:286].sum() > 0.8
    plain = teacher.logits(photo.mean((2, 3), keepdim=True).expand_as(photo)).softmax(1)[0]
    assert plain[281:286].sum() < 0.1


def test_lite0_logits_carry_gradient_to_the_image(lite0, images):
    teacher = lite0(64)
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(LogitDistance(teacher)(x, images.flip(0)).sum(), x)
    assert gradient.isfinite().all() and (gradient.abs().amax((1, 2, 3)) > 0).all()
    assert LogitDistance(teacher)(images, images).tolist() == [0, 0]
    assert LogitDistance(teacher).provenance == teacher.provenance


@pytest.mark.parametrize("input_size, stride, width", [(64, 8, 40), (128, 16, 112), (256, 32, 320), (40, 4, 24)])
def test_lite0_stage_fits_the_grid(lite0, input_size, stride, width):
    """64 pixels for 8 × 8 tokens: the features of stride 8; a larger input takes a deeper stage."""
    teacher = lite0(input_size, (8, 8))
    assert (teacher.stride, teacher.width) == (stride, width)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert teacher.features(x, (8, 8)).shape == (2, 64, width)


# ---- errors


@pytest.mark.parametrize("backend, source", [
    ("transformers", "facebook/dinov3-vitl16-pretrain-lvd1689m"),
    ("timm", "vit_large_patch14_dinov2.lvd142m"),
    ("timm", "hf-hub:someone/something"),
    ("transformers", "./no/such/folder"),
])
def test_missing_weights_say_what_to_do(backend, source, monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENIZERS_LAB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsMissing) as caught:
        build_vision_teacher(Teacher(backend, source))
    message = str(caught.value)
    assert source.removeprefix("hf-hub:") in message and "`source`" in message and "\n" not in message
    assert ("hf download" in message) == (not source.startswith("."))
    assert ("licence" in message) == ("dinov3" in source)


@pytest.mark.parametrize("teacher, message", [
    (Teacher("tim", "x"), "no teacher backend 'tim'; known: transformers, timm, asset, random"),
    (Teacher("timm", "vit_small_patch14_dinov"), "nearest: 'vit_small_patch14_dinov2'"),
    (Teacher("asset", "efficientnet-lite"), "nearest: 'efficientnet-lite0'"),
    (Teacher("asset", "lpips-vgg16"), "no vision teacher"),
    (Teacher("random", config={"model_type": "bert"}), "model_type 'bert'"),
    (Teacher("random"), "model_type 'None'"),
])
def test_unusable_choices(teacher, message):
    with pytest.raises(ConfigError, match=message):
        build_vision_teacher(teacher)


def test_a_checkpoint_that_lacks_tensors_is_refused(tmp_path):
    save_transformers(tmp_path, "dinov3")
    state = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in state if "up_proj.weight" in name)
    save_file({name: t for name, t in state.items() if name != gone}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight"):
        build_vision_teacher(Teacher("transformers", str(tmp_path)))


def test_wrong_inputs(images):
    teacher = build_vision_teacher(Teacher("random", config=RANDOM_DINO))
    with pytest.raises(InputError, match="uint8"):
        teacher.features((images * 255).byte(), 4)
    with pytest.raises(ConfigError, match="no classifier"):
        teacher.logits(images)
    with pytest.raises(ConfigError, match="kind 'dino'"):
        VisionTeacher(nn.Identity(), "dino")
