"""The diffusers adapter: its protocol, and its use by diffusers' own pipelines, schedulers and training step."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch.nn import functional as F

from tokenizers_lab.adapters.diffusers import DiffusersAutoencoder
from tokenizers_lab.config import load_config
from tokenizers_lab.errors import CheckpointError, InputError
from tokenizers_lab.hub import build_tokenizer, load
from tokenizers_lab.models.rectok.config import ModelConfig, ViTConfig
from tokenizers_lab.registry import systems
from tokenizers_lab.tokenizer import ImageTokenizer

SIZE, PATCH, CHANNELS = 32, 8, 4
GRID = SIZE // PATCH
LATENT_MEAN, LATENT_STD = torch.tensor([0.3, -0.2, 0.1, 0.0]), torch.tensor([0.5, 2.0, 1.5, 0.8])


def rectok(variational: bool = True, patch: int = PATCH) -> ImageTokenizer:
    """A tiny RecTok with latent statistics, whose first weights are large enough for outputs that differ."""
    size = ViTConfig(width=32, depth=1, heads=2)
    cfg = ModelConfig(4 * patch, patch, CHANNELS, encoder=size, decoder=size, variational=variational)
    torch.manual_seed(0)
    tokenizer = build_tokenizer("rectok", cfg).eval()
    with torch.no_grad():
        for name, parameter in tokenizer.named_parameters():
            if name.startswith(("encoder.head", "decoder.embed", "decoder.pixels")):
                parameter.normal_(0, 0.3)
    tokenizer.set_latent_statistics(LATENT_MEAN, LATENT_STD)
    return tokenizer


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def images():
    """Two smooth images in [0, 1] of known colours."""
    steps = torch.linspace(0, 1, SIZE)
    ramp = torch.stack([steps[None].expand(SIZE, SIZE), steps[:, None].expand(SIZE, SIZE), torch.full((SIZE, SIZE), 0.5)])
    return torch.stack([ramp, ramp.flip(0) * 0.5])


@torch.no_grad()
def test_distribution_over_normalised_latents(images):
    tokenizer = rectok()
    latent_dist = DiffusersAutoencoder(tokenizer).encode(images * 2 - 1).latent_dist
    encoding = tokenizer.encode(images)
    assert torch.allclose(latent_dist.mode(), encoding.latents, atol=1e-5)
    std = encoding.posterior.std / LATENT_STD[:, None, None]
    assert torch.allclose(latent_dist.std, std, rtol=1e-5)
    # the same noise gives the draw that the tokenizer's own posterior gives, then normalised
    noise = torch.randn(encoding.latents.shape, generator=torch.Generator().manual_seed(3))
    drawn = (encoding.posterior.sample(noise) - LATENT_MEAN[:, None, None]) / LATENT_STD[:, None, None]
    assert torch.allclose(latent_dist.sample(torch.Generator().manual_seed(3)), drawn, atol=1e-5)


@torch.no_grad()
def test_decode_and_forward(images):
    tokenizer = rectok()
    adapter = DiffusersAutoencoder(tokenizer)
    wanted = tokenizer.reconstruct(images) * 2 - 1
    assert wanted.std() > 0.05
    assert torch.allclose(adapter.decode(tokenizer.encode(images).latents).sample, wanted, atol=1e-5)
    assert torch.allclose(adapter(images * 2 - 1).sample, wanted, atol=1e-5)
    latents = adapter.encode(images * 2 - 1, return_dict=False)[0].mode()
    assert torch.allclose(adapter.decode(latents, return_dict=False)[0], wanted, atol=1e-5)
    generators = [torch.Generator(), torch.Generator()]
    assert torch.allclose(adapter.decode(latents, generator=generators).sample, wanted, atol=1e-5)


@torch.no_grad()
def test_plain_autoencoder_is_a_point(images):
    adapter = DiffusersAutoencoder(rectok(variational=False))
    latent_dist = adapter.encode(images * 2 - 1).latent_dist
    assert torch.equal(latent_dist.sample(), latent_dist.mode())


def test_config_type_and_device(images):
    adapter = DiffusersAutoencoder(rectok())
    assert (adapter.config.scaling_factor, adapter.config.shift_factor) == (1.0, 0.0)
    assert adapter.config.latent_channels == CHANNELS and adapter.config.sample_size == SIZE
    assert 2 ** (len(adapter.config.block_out_channels) - 1) == PATCH
    assert adapter.dtype == torch.float32 and adapter.device.type == "cpu"
    half = DiffusersAutoencoder(rectok()).to(torch.bfloat16)
    latents = half.encode((images * 2 - 1).bfloat16()).latent_dist.mode()
    assert half.dtype == latents.dtype == half.decode(latents).sample.dtype == torch.bfloat16


def test_refusals(images):
    with pytest.raises(InputError, match="power of two, not 12"):
        DiffusersAutoencoder(rectok(patch=12))
    with pytest.raises(InputError, match=r"\[-1, 1\]"):
        DiffusersAutoencoder(rectok()).encode(images * 255)

    class Codes(ImageTokenizer):
        system, downsample = "codes", 8

    with pytest.raises(InputError, match="no continuous latents"):
        DiffusersAutoencoder(Codes(object()))


@pytest.mark.parametrize("name", [name for name, system in systems().items() if system.kind == "image"])
@torch.no_grad()
def test_every_image_system(name):
    """Of each image system's tiny model: with continuous latents, the adapter reconstructs as the tokenizer does."""
    cfg = load_config(f"{name}/tiny")
    torch.manual_seed(0)
    tokenizer = build_tokenizer(name, cfg.model).eval()
    x = torch.rand(2, 3, cfg.data.size, cfg.data.size)
    torch.manual_seed(1)
    encoding = tokenizer.encode(x)
    if encoding.latents is None:
        with pytest.raises(InputError, match="no continuous latents"):
            DiffusersAutoencoder(tokenizer)
        return
    adapter = DiffusersAutoencoder(tokenizer)
    assert encoding.latents.shape[1] == adapter.config.latent_channels
    assert x.shape[2] // encoding.latents.shape[2] == 2 ** (len(adapter.config.block_out_channels) - 1)
    wanted = tokenizer.decode(encoding.latents, torch.Generator().manual_seed(2)) * 2 - 1
    made = adapter(x * 2 - 1, generator=torch.Generator().manual_seed(2)).sample
    assert torch.allclose(made, wanted, atol=1e-4)


def test_diffusers_training_step(images, tmp_path):
    """diffusers' transformer and flow scheduler learn the latents of the adapter: the loss falls to a third."""
    tokenizer = rectok()
    with torch.no_grad():      # a posterior as narrow as training makes it: its noise would drown these two images
        tokenizer.encoder.head.weight[CHANNELS:].zero_()
        tokenizer.encoder.head.bias[CHANNELS:].fill_(-6)
    DiffusersAutoencoder(tokenizer).save_pretrained(tmp_path / "vae")
    vae = DiffusersAutoencoder.from_pretrained(tmp_path, subfolder="vae", revision=None, variant=None).requires_grad_(False)
    scheduler = FlowMatchEulerDiscreteScheduler()
    model = transformer().train()
    with torch.no_grad():
        clean = vae.encode(images.repeat(4, 1, 1, 1) * 2 - 1).latent_dist.sample(torch.Generator().manual_seed(1))
        clean = (clean - vae.config.shift_factor) * vae.config.scaling_factor
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    labels = torch.tensor([0, 1]).repeat(4)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(120):
        place = torch.randint(0, len(scheduler.timesteps), (len(clean),), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        time = scheduler.timesteps[place]
        noisy = scheduler.scale_noise(clean, time, noise)
        prediction = model(noisy, timestep=time, class_labels=labels).sample
        loss = F.mse_loss(prediction, noise - clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < np.mean(losses[:20]) / 3


def test_from_pretrained_options(tmp_path):
    tokenizer = rectok()
    tokenizer.save_pretrained(tmp_path / "vae")
    options = {"torch_dtype": torch.bfloat16, "subfolder": "vae", "low_cpu_mem_usage": True}
    half = DiffusersAutoencoder.from_pretrained(str(tmp_path), **options)
    assert half.dtype == torch.bfloat16
    whole = DiffusersAutoencoder.from_pretrained(tmp_path / "vae").tokenizer.state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in tokenizer.state_dict().items())
    for option in ("revision", "variant", "device_map", "unheard_of"):
        with pytest.raises(InputError, match=option):
            DiffusersAutoencoder.from_pretrained(tmp_path / "vae", **{option: "fp16"})
    with pytest.raises(CheckpointError, match="no subfolder unet"):
        DiffusersAutoencoder.from_pretrained(tmp_path, subfolder="unet")
    with pytest.raises(CheckpointError, match="no folder and no hub id"):
        DiffusersAutoencoder.from_pretrained("rectok/official", subfolder="vae")


def transformer() -> DiTTransformer2DModel:
    """A tiny class-conditional DiT over the adapter's latents."""
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=2, sample_size=GRID,
        patch_size=1, num_embeds_ada_norm=1000, norm_num_groups=1,
    ).eval()


def test_class_conditional_pipeline(tmp_path):
    """DiTPipeline samples, is saved and loaded, and samples the same; its `vae` folder is a saved tokenizer of ours."""
    tokenizer = rectok()
    pipeline = DiTPipeline(transformer(), DiffusersAutoencoder(tokenizer), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def sample(pipeline):
        generator = torch.Generator().manual_seed(0)
        return pipeline([3, 5, 7], num_inference_steps=3, generator=generator, output_type="np").images

    made = sample(pipeline)
    assert made.shape == (3, SIZE, SIZE, 3) and made.std() > 0.01
    pipeline.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/model_index.json").read_text())["vae"][1] == "DiffusersAutoencoder"
    again = DiTPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(sample(again), made)
    for name, tensor in load(tmp_path / "saved/vae").state_dict().items():
        assert torch.equal(tensor, tokenizer.state_dict()[name])


def test_stable_diffusion_pipelines(images):
    """Text-to-image asks the adapter for its downsampling, image-to-image encodes with it and decodes."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=GRID, in_channels=CHANNELS, out_channels=CHANNELS, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=8, attention_head_dim=4,
    ).eval()
    parts = {
        "vae": DiffusersAutoencoder(rectok()), "unet": unet, "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
        "text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None,
    }
    prompt = {"prompt_embeds": torch.randn(1, 3, 8), "negative_prompt_embeds": torch.randn(1, 3, 8)}

    text_to_image = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    text_to_image.set_progress_bar_config(disable=True)
    assert text_to_image.vae_scale_factor == PATCH
    assert text_to_image(**prompt, num_inference_steps=2).images[0].size == (SIZE, SIZE)
    assert text_to_image(**prompt, num_inference_steps=2, height=2 * SIZE, width=SIZE).images[0].size == (SIZE, 2 * SIZE)

    image_to_image = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    image_to_image.set_progress_bar_config(disable=True)
    options = {**prompt, "num_inference_steps": 4, "strength": 0.5, "output_type": "pt"}
    made = [image_to_image(image=image[None], generator=torch.Generator().manual_seed(0), **options).images for image in images]
    assert made[0].shape == (1, 3, SIZE, SIZE)
    assert not torch.allclose(made[0], made[1], atol=1e-3)      # what it was given reaches what it makes
