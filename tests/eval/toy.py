"""A small image tokenizer and a run of it, made in milliseconds: what the harness and the report are tested on."""

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.registry import System
from tokenizers_lab.tokenizer import ImageEncoding, ImageTokenizer
from tokenizers_lab.training.objective import Objective

SIZE = 32


@dataclass
class ToyConfig:
    """Size of the toy."""

    patch: int = 8        # pixels a side of a token
    channels: int = 6     # C


@dataclass
class ToyObjectiveConfig:
    """Losses of the toy."""

    teachers: dict[str, str] = field(default_factory=dict)     # not used


@dataclass
class Posterior:
    """Diagonal Gaussian."""

    mean: Tensor
    logvar: Tensor


class Toy(ImageTokenizer):
    """Patches, a linear map to C channels and back."""

    system = "toy"

    def __init__(self, cfg: ToyConfig):
        super().__init__(cfg)
        self.downsample = cfg.patch
        width = 3 * cfg.patch**2
        self.analysis, self.synthesis = nn.Linear(width, cfg.channels), nn.Linear(cfg.channels, width)
        self.register_buffer("latent_mean", torch.zeros(cfg.channels))
        self.register_buffer("latent_std", torch.ones(cfg.channels))

    def encode(self, images: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> ImageEncoding:
        self.check_images(images)
        p, h, w = self.downsample, images.shape[2] // self.downsample, images.shape[3] // self.downsample
        tokens = images.reshape(-1, 3, h, p, w, p).permute(0, 2, 4, 1, 3, 5).reshape(-1, h, w, 3 * p * p)
        mean = self.analysis(tokens).permute(0, 3, 1, 2)
        drawn = mean + 0.1 * torch.randn(mean.shape, generator=generator) if sample else mean
        latents = (drawn - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]
        return ImageEncoding(latents=latents, posterior=Posterior(mean, torch.full_like(mean, -3.0)))

    def decode(self, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        z = latents * self.latent_std[:, None, None] + self.latent_mean[:, None, None]
        p, (b, _, h, w) = self.downsample, z.shape
        pixels = self.synthesis(z.permute(0, 2, 3, 1)).reshape(b, h, w, 3, p, p)
        return pixels.permute(0, 3, 1, 4, 2, 5).reshape(b, 3, h * p, w * p).clamp(0, 1)

    def set_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    @torch.no_grad()
    def fit(self, images: Tensor) -> "Toy":
        """Become the PCA of the images' patches: the best linear autoencoder of this size."""
        p, h = self.downsample, images.shape[2] // self.downsample
        tokens = images.reshape(-1, 3, h, p, h, p).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3 * p * p)
        mean = tokens.mean(0)
        axes = torch.linalg.svd(tokens - mean, full_matrices=False)[2][: self.cfg.channels]
        self.analysis.weight.copy_(axes)
        self.analysis.bias.copy_(-axes @ mean)
        self.synthesis.weight.copy_(axes.T)
        self.synthesis.bias.copy_(mean)
        return self


class ToyObjective(Objective):
    """Only says where its teacher is from."""

    def __init__(self, cfg: ToyObjectiveConfig, model: ToyConfig):
        super().__init__(cfg)

    def provenance(self) -> dict[str, str]:
        return {"teacher.toy": "random weights (seed 0)"}


SYSTEM = System(
    name="toy", kind="image", paper="A toy, <not a paper>", summary="patches and a linear map",
    model_config=f"{__name__}:ToyConfig", objective_config=f"{__name__}:ToyObjectiveConfig",
    tokenizer=f"{__name__}:Toy", objective=f"{__name__}:ToyObjective",
)


def pictures(count: int, size: int = SIZE, seed: int = 0) -> Tensor:
    """Smooth random pictures on the grid of uint8: (N, 3, size, size) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    smooth = nn.functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=True).clamp(0, 1)
    return (smooth * 255).round() / 255


def batches(images: Tensor, size: int) -> list[ImageBatch]:
    """The images in batches of a size, keyed by their number."""
    keys = [f"{i:03d}.png" for i in range(len(images))]
    return [ImageBatch(images[i : i + size], keys[i : i + size]) for i in range(0, len(images), size)]


def write_run(
    root: Path, name: str = "tiny", steps: int = 60, total: int = 60, seed: int = 0, channels: int = 6,
    note: str = "a <script>alert(1)</script> & more",
) -> Path:
    """A run's folder as training leaves it: config, metrics, one checkpoint, validation images beside it."""
    val, run = root / "val", root / f"toy-{name}"
    val.mkdir(parents=True, exist_ok=True)
    images = pictures(9)
    for i, image in enumerate(images):
        Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(val / f"{i:03d} <b>.png")
    run.mkdir()
    half = total // 2
    (run / "config.yaml").write_text(
        f"system: toy\nname: {json.dumps(name)}\nout: {root}\nmodel: {{patch: 8, channels: {channels}}}\n"
        f"objective: {{teachers: {{note: {json.dumps(note)}}}}}\n"
        f"data: {{train: {val}, val: {val}, size: {SIZE}, workers: 0}}\n"
        f"stages:\n- {{name: train, steps: {half}, lr: 0.001, weights: {{mse: 1.0, kl: 1.0e-06}}}}\n"
        f"- {{name: finetune, steps: {total - half}, lr: 0.0001, weights: {{mse: 2.0, gan: 0.5}}}}\n")
    rng = np.random.default_rng(seed)
    lines = []
    for step in range(2, steps + 1, 2):
        stage = "train" if step <= half else "finetune"
        mse = 0.3 * math.exp(-step / 20) + 0.01 + 0.002 * rng.random()
        terms = {"mse": mse, "kl": 100.0 + step} if stage == "train" else {"mse": mse, "gan": rng.normal()}
        lines.append({"step": step, "stage": stage, "kind": "train", "loss": mse, **terms, "lr": 1e-3 / step, "grad_norm": 1.0})
        if step % 10 == 0:
            lines.append({"step": step, "stage": stage, "kind": "val", "psnr": -10 * math.log10(mse), "ssim": 0.5 + step / 200})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 62, "sta')
    checkpoint = run / "checkpoints" / f"step_{steps:08d}"
    torch.manual_seed(seed)
    Toy(ToyConfig(channels=channels)).fit(images).save_pretrained(checkpoint)
    (checkpoint / "training").mkdir()
    (checkpoint / "training" / "state.json").write_text(json.dumps({"step": steps}))
    files = [p for p in checkpoint.rglob("*") if p.is_file()]
    hashes = {str(p.relative_to(checkpoint)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    (checkpoint / "manifest.json").write_text(json.dumps({"step": steps, "sha256": hashes}))
    return run
