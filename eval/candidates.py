"""What reconstructs images: the model, the same network untrained, the mean colour of patches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tokenizers_lab.draw import stable_seed
from tokenizers_lab.errors import InputError
from tokenizers_lab.metrics import patch_mean
from tokenizers_lab.tokenizer import ImageEncoding, ImageTokenizer, Tokenizer

from .provenance import weights_sha256

UNTRAINED_LABEL = "untrained (random weights)"
Network = TypeVar("Network", bound=Tokenizer)


@dataclass
class Reconstruction:
    """Images (B, 3, H, W) in [0, 1], and what they were decoded from, where that is known."""

    images: Tensor
    encoding: ImageEncoding | None = None
    converted: dict[str, str] = field(default_factory=dict)      # files: key -> what it was stored as, if not 8-bit RGB


@dataclass(frozen=True)
class Candidate:
    """Something that reconstructs images: a row of the result. `reconstruct` may be called from several threads at once."""

    label: str
    role: str                                                       # model, untrained or baseline
    reconstruct: Callable[[Tensor, Sequence[str]], Reconstruction]  # images (B, 3, H, W) in [0, 1], keys -> the same shape
    description: dict[str, Any]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def model_candidate(
    tokenizer: ImageTokenizer, label: str = "model", role: str = "model", sample: bool = False, seed: int = 0
) -> Candidate:
    """A tokenizer as a row. Draws of a stochastic encoder or decoder depend on the seed and the image's key alone."""
    dtype = next(tokenizer.parameters()).dtype

    def reconstruct(images: Tensor, keys: Sequence[str]) -> Reconstruction:
        generator = torch.Generator(images.device).manual_seed(stable_seed(seed, "evaluate", *keys))
        before = generator.get_state()
        encoding = tokenizer.encode(images.to(dtype), sample=sample, generator=generator)
        latents = encoding.codes if encoding.latents is None else encoding.latents
        if latents is None:
            raise InputError(f"{label} encodes to neither latents nor codes")
        decoded = tokenizer.decode(latents, generator=generator).float()
        if len(keys) > 1 and not torch.equal(before, generator.get_state()):
            raise InputError(f"{label} draws noise, which would depend on the images beside each: see one at a time "
                             "(forward_batch 1)")
        return Reconstruction(decoded, encoding)

    return Candidate(label, role, reconstruct, describe(tokenizer, role), next(tokenizer.parameters()).device)


def describe(tokenizer: nn.Module, role: str) -> dict[str, Any]:
    """What a row says of a network."""
    return {
        "system": getattr(tokenizer, "system", type(tokenizer).__name__),
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        "weights_sha256": weights_sha256(tokenizer),
        "weights": "random weights" if role == "untrained" else getattr(tokenizer, "provenance", {}),
        "dtype": str(next(tokenizer.parameters()).dtype).removeprefix("torch."),
    }


def check_sampling(sample: bool, forward_batch: int) -> None:
    """Raise InputError for drawn latents of several images at a time, whose noise would depend on their neighbours."""
    if sample and forward_batch > 1:
        raise InputError(f"drawn latents (sample) need one image at a time: forward_batch must be 1, not {forward_batch}")


def untrained_copy(tokenizer: Network, seed: int = 0) -> Network:
    """The same network with new, seeded random weights, in eval mode; global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(tokenizer)(tokenizer.cfg)
    return fresh.to(tokenizer.device, next(tokenizer.parameters()).dtype).eval().requires_grad_(False)


def patch_mean_candidate(patch: int) -> Candidate:
    """The trivial baseline: each patch replaced by its mean colour."""
    label = f"patch mean ({patch}×{patch})"
    return Candidate(label, "baseline", lambda images, keys: Reconstruction(patch_mean(images, patch)), {"patch": patch})


def all_candidates(
    model: ImageTokenizer | Candidate, label: str, baselines: bool, sample: bool, seed: int
) -> list[Candidate]:
    """The rows of a result, the model first. What is a candidate already stands alone, without baselines."""
    if isinstance(model, Candidate):
        return [model]
    model.eval()
    candidates = [model_candidate(model, label, sample=sample, seed=seed)]
    if baselines:
        if hasattr(model, "cfg"):
            candidates.append(model_candidate(untrained_copy(model, seed), UNTRAINED_LABEL, "untrained", sample, seed))
        candidates.append(patch_mean_candidate(model.downsample))
    return candidates
