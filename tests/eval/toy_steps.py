"""Small diffusion decoders, made in milliseconds: more steps leave less of the noise that they start from."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from toy import SYSTEM, Toy
from toy_speech import Steps

from tokenizers_lab.diffusion.noise import start_noise
from tokenizers_lab.registry import System
from tokenizers_lab.tokenizer import SpeechEncoding, SpeechTokenizer


@dataclass
class Sampling:
    """How the toys decode."""

    steps: int = 2          # sampling steps
    guidance: float = 1.5   # not used


@dataclass
class FlowConfig:
    """Size of the toy of images."""

    patch: int = 8
    channels: int = 6
    sampling: Sampling = field(default_factory=Sampling)


class Flow(Toy):
    """The toy of images, whose decoder leaves noise of 0.2 / steps."""

    system = "flow"
    decode_options = ("steps", "guidance")
    encoded = 0      # images, by all toys of this class

    def encode(self, images, sample=False, generator=None):
        Flow.encoded += len(images)
        return super().encode(images, sample, generator)

    def decode(self, latents: Tensor, generator: torch.Generator | None = None, steps: int | None = None,
               guidance: float | None = None) -> Tensor:
        images = super().decode(latents)
        noise = start_noise(tuple(images.shape), images.device, generator)
        return (images + 0.2 / (steps or self.cfg.sampling.steps) * noise).clamp(0, 1)


@dataclass
class SpokenConfig:
    """Size of the toy of speech."""

    channels: int = 1
    steps: int = 8


class Spoken(Steps):
    """The toy of speech, whose decoder leaves noise of 0.5 / steps, and half of it where it is told the text."""

    system = "spoken"
    decode_options = ("texts", "steps", "guidance")
    takes_texts = True
    decodings = ()

    def decode(self, codes, lengths=None, texts=None, steps=None, guidance=2.0):
        audio = super().decode(codes, lengths)
        assert texts is None or len(texts) == len(codes)
        scale = 0.5 if texts is not None and all(texts) else 1.0
        return audio + 0.5 * scale / (steps or self.cfg.steps) * start_noise(tuple(audio.shape), audio.device)


class Mel(SpeechTokenizer):
    """A speech tokenizer of continuous latents: frames of four samples."""

    system = "mel"
    sample_rate, hop, codebooks, codebook_size = 16_000, 4, 0, 0

    def __init__(self, cfg: SpokenConfig):
        super().__init__(cfg)
        self.gain = nn.Parameter(torch.ones(1))

    def encode(self, audio: Tensor, lengths: Tensor | None = None) -> SpeechEncoding:
        padded = nn.functional.pad(audio[:, 0], (0, -audio.shape[2] % 4))
        return SpeechEncoding(latents=padded.unflatten(1, (-1, 4)).transpose(1, 2) * self.gain)

    def decode(self, latents: Tensor, lengths: Tensor | None = None) -> Tensor:
        return latents.transpose(1, 2).flatten(1)[:, None] * 0.9


class MelObjective(nn.Module):
    """Trains nothing."""

    def __init__(self, cfg, model):
        super().__init__()

    def provenance(self):
        return {}


@dataclass
class NoObjective:
    """No losses."""


FLOW_SYSTEM = System(
    name="flow", kind="image", paper="A toy", summary=SYSTEM.summary, model_config=f"{__name__}:FlowConfig",
    objective_config=SYSTEM.objective_config, tokenizer=f"{__name__}:Flow", objective=SYSTEM.objective)
SPOKEN_SYSTEM, MEL_SYSTEM = (
    System(name=name, kind="speech", paper="A toy", summary="frames of four samples", model_config=f"{__name__}:SpokenConfig",
           objective_config=f"{__name__}:NoObjective", tokenizer=f"{__name__}:{tokenizer}", objective=f"{__name__}:MelObjective")
    for name, tokenizer in (("spoken", "Spoken"), ("mel", "Mel")))
