"""What reconstructs images: the model, the same network untrained, the mean colour of patches."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tokenizers_lab.draw import stable_seed
from tokenizers_lab.errors import InputError
from tokenizers_lab.metrics import patch_mean
from tokenizers_lab.network import Network
from tokenizers_lab.tokenizer import ImageEncoding, ImageTokenizer

from .provenance import weights_sha256

UNTRAINED_LABEL = "untrained (random weights)"
AnyNetwork = TypeVar("AnyNetwork", bound=Network)


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
    tokenizer: ImageTokenizer, label: str = "model", role: str = "model", sample: bool = False, seed: int = 0,
    steps: int | None = None,
) -> Candidate:
    """A tokenizer as a row. Draws of a stochastic encoder or decoder depend on the seed and the image's key alone.

    A decoder of sampling steps starts every image from the same fixed noise, unless draws are asked for (`sample`).
    steps: how many it takes; none: its own default. Raises InputError where it takes none.
    """
    dtype = next(tokenizer.parameters()).dtype
    options = step_options(tokenizer, steps, label)
    fixed_noise = takes_steps(tokenizer) and not sample

    def reconstruct(images: Tensor, keys: Sequence[str]) -> Reconstruction:
        generator = torch.Generator(images.device).manual_seed(stable_seed(seed, "evaluate", *keys))
        before = generator.get_state()
        encoding = tokenizer.encode(images.to(dtype), sample=sample, generator=generator)
        latents = encoding.codes if encoding.latents is None else encoding.latents
        if latents is None:
            raise InputError(f"{label} encodes to neither latents nor codes")
        decoded = tokenizer.decode(latents, generator=None if fixed_noise else generator, **options).float()
        if len(keys) > 1 and not torch.equal(before, generator.get_state()):
            raise InputError(f"{label} draws noise, which would depend on the images beside each: see one at a time "
                             "(forward_batch 1)")
        return Reconstruction(decoded, encoding)

    description = {**describe(tokenizer, role), **decoder_protocol(tokenizer, steps)}
    return Candidate(label, role, reconstruct, description, next(tokenizer.parameters()).device)


def takes_steps(tokenizer: nn.Module) -> bool:
    """Whether it decodes by a number of sampling steps that may be chosen."""
    return "steps" in getattr(tokenizer, "decode_options", ())


def step_options(tokenizer: nn.Module, steps: int | None, label: str = "the model") -> dict[str, Any]:
    """What decode is told of the steps. Raises InputError where it takes none, or for fewer than one."""
    if steps is None:
        return {}
    if not takes_steps(tokenizer):
        raise InputError(f"{label} has no sampling steps that could be chosen: it decodes in one go")
    if steps < 1:
        raise InputError(f"decoding takes at least one sampling step, not {steps}")
    return {"steps": steps}


def decoder_protocol(tokenizer: nn.Module, steps: int | None = None) -> dict[str, Any]:
    """How a decoder of sampling steps is run, for rows and protocols; empty for every other one."""
    if not takes_steps(tokenizer):
        return {}
    options = getattr(tokenizer, "decode_options", ())
    said = {"decoder_steps": default_option(tokenizer, "steps") if steps is None else steps}
    said |= {name: default_option(tokenizer, name) for name in ("guidance", "rescale") if name in options}
    return {name: "the model's own" if value is None else value for name, value in said.items()}


def default_option(tokenizer: nn.Module, name: str) -> Any:
    """What decode does where it is not told: by its signature, else by the one place in the config; None if neither says."""
    decode = getattr(tokenizer, "decode", None)
    parameter = inspect.signature(decode).parameters.get(name) if callable(decode) else None
    if parameter is not None and parameter.default not in (None, parameter.empty):
        return parameter.default
    found = _fields_named(getattr(tokenizer, "cfg", None), name)
    if len(found) != 1:
        return None
    value = found[0]
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _fields_named(cfg: Any, name: str) -> list[Any]:
    """Values of all fields of that name in a config and its parts."""
    if not is_dataclass(cfg):
        return []
    mine = [(f.name, getattr(cfg, f.name)) for f in fields(cfg)]
    inside = [value for key, part in mine if key != name for value in _fields_named(part, name)]
    return [value for key, value in mine if key == name] + inside


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


def untrained_copy(tokenizer: AnyNetwork, seed: int = 0) -> AnyNetwork:
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
    model: ImageTokenizer | Candidate, label: str, baselines: bool, sample: bool, seed: int, steps: int | None = None
) -> list[Candidate]:
    """The rows of a result, the model first. What is a candidate already stands alone, without baselines or steps."""
    if isinstance(model, Candidate):
        if steps is not None:
            raise InputError(f"{model.label} is finished: it has no sampling steps")
        return [model]
    model.eval()
    candidates = [model_candidate(model, label, sample=sample, seed=seed, steps=steps)]
    if baselines:
        if hasattr(model, "cfg"):
            candidates.append(model_candidate(untrained_copy(model, seed), UNTRAINED_LABEL, "untrained", sample, seed, steps))
        candidates.append(patch_mean_candidate(model.downsample))
    return candidates
