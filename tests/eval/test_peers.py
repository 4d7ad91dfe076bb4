"""diffusers' autoencoders, measured by our protocol."""

import hashlib
import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import batches, pictures

from tokenizers_lab.errors import CheckpointError, InputError, WeightsMissing
from tokenizers_lab.eval.images import evaluate_images
from tokenizers_lab.eval.latents import latent_statistics
from tokenizers_lab.eval.peers import load_peer

FILE = "diffusion_pytorch_model.safetensors"


def small_kl() -> diffusers.AutoencoderKL:
    torch.manual_seed(7)      # not the untrained row's
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4, latent_channels=4, sample_size=32, scaling_factor=0.5, shift_factor=0.25).eval()


def small_dc() -> diffusers.AutoencoderDC:
    torch.manual_seed(0)
    return diffusers.AutoencoderDC(
        encoder_block_out_channels=(8, 16, 16), decoder_block_out_channels=(8, 16, 16), encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1), encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()), latent_channels=8, attention_head_dim=8,
        decoder_norm_types="batch_norm", decoder_act_fns="silu", scaling_factor=0.4).eval()


@pytest.fixture
def kl(tmp_path: Path) -> str:
    small_kl().save_pretrained(tmp_path / "kl")
    return str(tmp_path / "kl")


@torch.inference_mode()
def test_kl_is_diffusers_own_computation(kl: str) -> None:
    peer, own, images = load_peer(kl), small_kl(), pictures(3)
    posterior = own.encode(images * 2 - 1).latent_dist
    encoding = peer.encode(images)
    assert torch.allclose(encoding.latents, (posterior.mode() - 0.25) * 0.5, atol=1e-6) and peer.downsample == 2
    expected = (own.decode(posterior.mode()).sample / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(peer.reconstruct(images), expected, atol=1e-4) and peer.cfg.image_size == 32
    drawn = [peer.encode(images, sample=True, generator=torch.Generator().manual_seed(s)).latents for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    raw = posterior.mode().double().permute(0, 2, 3, 1).reshape(-1, 4)
    found, _ = latent_statistics(peer, batches(images, 2))
    assert found["raw_std"] == pytest.approx(raw.std(0, correction=0).tolist(), abs=1e-5)
    assert found["mean"] == pytest.approx(((raw.mean(0) - 0.25) * 0.5).tolist(), abs=1e-5) and found["shape"] == [4, 16, 16]


@torch.inference_mode()
def test_dc(tmp_path: Path) -> None:
    small_dc().save_pretrained(tmp_path / "dc")
    peer, own, images = load_peer(str(tmp_path / "dc")), small_dc(), pictures(2)
    latent = own.encode(images * 2 - 1).latent
    assert torch.allclose(peer.encode(images).latents, latent * 0.4, atol=1e-6) and peer.downsample == 4
    assert torch.allclose(peer.reconstruct(images), (own.decode(latent).sample / 2 + 0.5).clamp(0, 1), atol=1e-4)
    with pytest.raises(InputError, match="no posterior"):
        peer.encode(images, sample=True)
    found, _ = latent_statistics(peer, batches(images, 2))
    assert found["kl_bits_per_image"] is None and found["raw_std"][0] == pytest.approx(found["std"][0] / 0.4, rel=1e-3)


def test_result_names_the_peer_and_its_file(kl: str) -> None:
    result = evaluate_images(load_peer(kl), batches(pictures(3), 2), ("psnr",), label="diffusers:kl")
    row, untrained, _ = result["rows"]
    digest = hashlib.sha256(Path(kl, FILE).read_bytes()).hexdigest()
    assert row["weights"]["class"] == "AutoencoderKL" and row["weights"]["files"] == {FILE: digest}
    assert row["weights_sha256"] == digest != untrained["weights_sha256"]
    assert row["weights"]["source"] == f"folder {Path(kl).name}"      # no path of this machine
    assert row["metrics"]["psnr"]["value"] != untrained["metrics"]["psnr"]["value"]


def test_a_pipelines_folder(kl: str, tmp_path: Path) -> None:
    shutil.copytree(kl, tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    assert load_peer(str(tmp_path / "pipeline")).downsample == 2


def test_wrong_folders_are_typed_errors(kl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = load_file(Path(kl, FILE))
    save_file({k: v for k, v in state.items() if k != "decoder.conv_out.bias"}, Path(kl, FILE), metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing keys in its weights, such as decoder\.conv_out\.bias"):
        load_peer(kl)
    Path(kl, FILE).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_peer(kl)
    Path(kl, FILE).unlink()
    with pytest.raises(CheckpointError, match="has no diffusion_pytorch_model"):
        load_peer(kl)
    Path(kl, "config.json").write_text(json.dumps({"_class_name": "VQModel"}))
    with pytest.raises(CheckpointError, match=r"holds diffusers' VQModel; .*AutoencoderKL, AutoencoderDC"):
        load_peer(kl)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no readable config\.json"):
        load_peer(str(tmp_path / "empty"))
    with pytest.raises(CheckpointError, match="no folder and no hub id"):
        load_peer("nothing")
    monkeypatch.setenv("TOKENIZERS_LAB_OFFLINE", "1")
    with pytest.raises(WeightsMissing, match="hf download somebody/an-autoencoder"):
        load_peer("somebody/an-autoencoder")
