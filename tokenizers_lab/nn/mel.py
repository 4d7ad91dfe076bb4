"""Log-mel spectrograms that networks take, differentiable: Whisper's, and that of mel vocoders with the way back to audio."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizers_lab.losses.spectral import log_mel, mel_filters, stft_magnitude, widest

WHISPER_RATE, WHISPER_FFT, WHISPER_HOP = 16_000, 400, 160


@lru_cache(maxsize=8)
def whisper_filters(bands: int) -> Tensor:
    """Whisper's mel filters (bands, 201): Slaney's scale, unit areas. The tensor is shared: do not change it."""
    with torch.inference_mode(False), torch.device("cpu"):      # the cache must serve training too
        return mel_filters(WHISPER_RATE, WHISPER_FFT, bands, scale="slaney").T.contiguous()


def whisper_log_mel(audio: Tensor, bands: int, samples: int, floor_over_batch: bool = False) -> Tensor:
    """Whisper's input features (B, bands, samples / 160) of 16 kHz audio (B, L), padded with zeros or cut to `samples`,
    float32.

    log10 of the mel power, nothing below the maximum − 8, then (· + 4) / 4. Differentiable, also through the maximum.
    floor_over_batch: one maximum for the whole batch instead of one for each item; LM-SPT was trained so.
    """
    audio = F.pad(audio, (0, samples - audio.shape[-1]))                       # a negative padding cuts
    window = torch.hann_window(WHISPER_FFT, device=audio.device)
    power = stft_magnitude(widest(audio), WHISPER_FFT, WHISPER_HOP, window.to(widest(audio)))[..., :-1].square()
    level = (whisper_filters(bands).to(power) @ power).clamp_min(1e-10).log10().float()            # (B, bands, frames)
    loudest = level.amax() if floor_over_batch else level.amax((-2, -1), keepdim=True)
    return (torch.maximum(level, loudest - 8) + 4) / 4


POWER_FLOOR, MEL_FLOOR = 1e-9, 1e-5      # added to |STFT|²; smallest mel before the logarithm


@dataclass
class MelConfig:
    """The normalised log-mel frames of a vocoder: (log mel − mean) / √variance. Defaults are TaDiCodec's, at 24 kHz."""

    bands: int = 128                  # mel bands, of Slaney's scale and unit areas
    n_fft: int = 1920                 # samples of a frame, under a Hann window
    hop: int = 480                    # samples between frames
    low: float = 0.0                  # Hz
    high: float | None = 12_000.0     # Hz; none: half the sample rate
    mean: float = -4.92               # of the log-mel values
    variance: float = 8.14            # of the log-mel values


@lru_cache(maxsize=8)
def vocoder_filters(sample_rate: int, n_fft: int, bands: int, low: float, high: float | None) -> Tensor:
    """Mel filters (n_fft // 2 + 1, bands), float32. The tensor is shared: do not change it."""
    with torch.inference_mode(False), torch.device("cpu"):      # the cache must serve training too
        return mel_filters(sample_rate, n_fft, bands, low, high, scale="slaney")


def vocoder_log_mel(audio: Tensor, cfg: MelConfig, sample_rate: int, lengths: Tensor | None = None) -> Tensor:
    """Natural log-mel spectrogram (B, bands, L // hop) of audio (B, L), not normalised, float32.

    Frame i is about sample (i + ½) · hop; the ends of the audio are reflected (HiFi-GAN's padding). lengths: (B,) samples of
    each item of a padded batch, whose own end is then reflected as if it were alone; frames that reach no sample of it are
    those of silence. Without it padding counts as sound, as in the code that mel vocoders are trained with.
    """
    audio, pad = audio.float(), (cfg.n_fft - cfg.hop) // 2
    ends = torch.full((audio.shape[0],), audio.shape[1], device=audio.device) if lengths is None else lengths.to(audio.device)
    window = torch.hann_window(cfg.n_fft, device=audio.device)
    spectrum = torch.stft(
        reflect_ends(audio, ends, pad), cfg.n_fft, cfg.hop, window=window, center=False, return_complex=True)
    magnitude = (spectrum.real.square() + spectrum.imag.square() + POWER_FLOOR).sqrt()           # (B, bins, frames)
    filters = vocoder_filters(sample_rate, cfg.n_fft, cfg.bands, cfg.low, cfg.high).to(audio.device)
    return log_mel(filters.T @ magnitude, MEL_FLOOR)


def vocoder_mel(audio: Tensor, cfg: MelConfig, sample_rate: int, lengths: Tensor | None = None) -> Tensor:
    """The normalised `vocoder_log_mel` (B, bands, L // hop) that networks take."""
    return (vocoder_log_mel(audio, cfg, sample_rate, lengths) - cfg.mean) / cfg.variance**0.5


def reflect_ends(audio: Tensor, lengths: Tensor, pad: int) -> Tensor:
    """(B, L + 2 · pad): each item of audio (B, L) with both its ends reflected, `pad` samples on each side; then zeros.

    lengths: (B,) samples of each. Items shorter than the padding are reflected back and forth.
    """
    place = torch.arange(-pad, audio.shape[1] + pad, device=audio.device)                        # (L + 2 · pad,)
    last = (lengths - 1)[:, None]
    back_and_forth = place % (2 * last).clamp_min(1)
    source = torch.minimum(back_and_forth, (2 * last - back_and_forth).clamp_min(0))             # (B, L + 2 · pad)
    return audio.gather(1, source) * (place < lengths[:, None] + pad)


def griffin_lim(mel: Tensor, cfg: MelConfig, sample_rate: int, iterations: int = 32) -> Tensor:
    """Audio (B, 1, T · hop) of normalised mel frames (B, bands, T): no network, and it sounds so.

    Magnitudes by the pseudo-inverse of the mel filters, phases by Griffin and Lim's rounds (Perraudin et al. 2013) from zero.
    """
    from torchaudio.functional import griffinlim

    filters = vocoder_filters(sample_rate, cfg.n_fft, cfg.bands, cfg.low, cfg.high).to(mel.device)
    level = (mel.float() * cfg.variance**0.5 + cfg.mean).exp()
    magnitude = (torch.linalg.pinv(filters.T) @ level).clamp_min(0)                              # (B, bins, T)
    extra = -(-cfg.n_fft // (2 * cfg.hop))      # frames repeated at both ends, so that a short clip fills a window
    magnitude = F.pad(magnitude, (extra, extra), mode="replicate")
    window = torch.hann_window(cfg.n_fft, device=mel.device)
    audio = griffinlim(magnitude, window, cfg.n_fft, cfg.hop, cfg.n_fft, 1.0, iterations, 0.99, None, False)
    start = extra * cfg.hop - cfg.hop // 2      # there, frame i is about sample i · hop
    return audio[:, None, start : start + mel.shape[2] * cfg.hop]
