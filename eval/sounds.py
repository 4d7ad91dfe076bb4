"""What a codec's run is heard and seen by: sound files of a few held-out clips, and pictures of their mel spectrograms."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from tokenizers_lab.data.audio import encode_audio
from tokenizers_lab.data.resample import resampled_length
from tokenizers_lab.losses.spectral import hz_to_mel
from tokenizers_lab.metrics import MEL_BANDS, MEL_HOP, MEL_RATE, log_mel_spectrogram
from tokenizers_lab.tokenizer import SpeechTokenizer

from .speech_candidates import Clip, Rebuilt, SpeechCandidate

DYNAMIC = 80 * np.log(10) / 20                      # colours span this much below the original's loudest band: 80 dB
TICKS = (0, 250, 500, 1000, 2000, 4000, 8000)       # Hz
COLOURS = colormaps["magma"].resampled(64)          # few enough for small files, more than an eye tells apart here


@dataclass
class ClipKeeper:
    """Keeps a few of an evaluation's clips with the model's reconstructions, of different speakers as far as there are."""

    count: int
    kept: list[tuple[Clip, Rebuilt]] = field(default_factory=list)

    def __call__(self, candidate: SpeechCandidate, clip: Clip, made: Rebuilt) -> None:
        """Called by `evaluate_speech`. A new speaker takes the place of the last clip whose speaker is heard already."""
        if candidate.role != "model":
            return
        if len(self.kept) >= self.count:
            speakers = [kept.speaker for kept, _ in self.kept]
            again = [i for i, speaker in enumerate(speakers) if speaker in speakers[:i]]
            if clip.speaker in speakers or not again:
                return
            del self.kept[again[-1]]
        self.kept.append((clip, made))


@torch.inference_mode()
def resynthesise(tokenizer: SpeechTokenizer, clip: Clip, made: Rebuilt) -> dict[str, tuple[Tensor, int]]:
    """What there is to hear of a clip: name -> (audio (channels, samples), Hz).

    The original, the reconstruction, and what each further way of decoding makes of its codes, all of one duration.
    """
    sounds = {"original": (clip.audio.cpu(), clip.sample_rate), "reconstruction": (made.audio.cpu(), made.sample_rate)}
    for name in tokenizer.decodings if made.codes is not None else ():
        assert made.codes is not None
        options: dict[str, Any] = {"decoding": name}
        rate = tokenizer.output_rate(name)
        samples = resampled_length(clip.audio.shape[1], clip.sample_rate, rate)
        sounds[name] = (tokenizer.decode(made.codes[None], **options)[0, :, :samples].float().cpu(), rate)
    return sounds


def write_sounds(
    folder: Path, tokenizer: SpeechTokenizer, kept: Iterable[tuple[Clip, Rebuilt]], start: str
) -> list[dict[str, Any]]:
    """16-bit WAV files of each clip and of what the tokenizer makes of it, and a picture of their spectrograms.

    start: folder of the files, relative to `folder`. Returns what they are, for results.json: key, text, speaker, seconds,
    sounds (name: file) and picture.
    """
    (folder / start).mkdir(exist_ok=True)
    entries = []
    for i, (clip, made) in enumerate(kept):
        sounds = resynthesise(tokenizer, clip, made)
        files = {name: f"{start}/{i:02d}_{name}.wav" for name in sounds}
        for name, (audio, rate) in sounds.items():
            (folder / files[name]).write_bytes(encode_audio(audio, rate, "WAV"))
        picture = f"{start}/{i:02d}_mel.png"
        save_mels({name: mel_levels(audio, rate) for name, (audio, rate) in sounds.items()}, folder / picture)
        entries.append({"key": clip.key, "text": clip.text, "speaker": clip.speaker, "seconds": round(clip.seconds, 3),
                        "sounds": files, "picture": picture})
    return entries


def mel_levels(audio: Tensor, sample_rate: int) -> np.ndarray:
    """Log-mel magnitudes (80, frames) of audio (channels, samples): those that the mel distance compares."""
    return log_mel_spectrogram(audio[None], sample_rate)[0].numpy()


def save_mels(mels: Mapping[str, np.ndarray], path: Path) -> None:
    """A PNG of spectrograms (80, frames), one below the other, all in the colours of the first one's loudness."""
    loudest = next(iter(mels.values())).max()
    height = 0.5 + 1.8 * len(mels)      # inches
    figure = Figure(figsize=(9, height), dpi=100)
    axes = figure.subplots(len(mels), sharex=True, squeeze=False)[:, 0]
    figure.subplots_adjust(left=0.07, right=0.9, bottom=0.42 / height, top=1 - 0.25 / height, hspace=0.25)
    for place, (name, mel) in zip(axes, mels.items()):
        image = draw_mel(place, mel, loudest)
        place.set_title(name, fontsize=9, loc="left", pad=3)
        place.set_ylabel("Hz (mel scale)", fontsize=8)
        place.tick_params(labelsize=8)
    axes[-1].set_xlabel("s", fontsize=8)
    bar = figure.colorbar(image, cax=figure.add_axes((0.915, 0.42 / height, 0.02, 1 - 0.67 / height)))
    bar.set_label("ln of the mel band's magnitude", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    figure.savefig(path, metadata={"Software": None})


def draw_mel(axes: Axes, mel: np.ndarray, loudest: float) -> Any:
    """Draw a spectrogram (80, frames) over seconds and Hz on the mel scale, coloured from `loudest` − 80 dB to `loudest`."""
    frame = MEL_HOP / MEL_RATE
    # frame i is centred at i · frame seconds, band b at b + 1 of 81 equal steps up the mel scale
    image = axes.imshow(
        mel, cmap=COLOURS, vmin=loudest - DYNAMIC, vmax=loudest, origin="lower", aspect="auto", interpolation="none",
        extent=(-frame / 2, (mel.shape[1] - 0.5) * frame, 0.5, MEL_BANDS + 0.5))
    axes.set_xlim(0, (mel.shape[1] - 1) * frame)
    hz = torch.tensor([*TICKS, MEL_RATE / 2], dtype=torch.float64)
    heights = hz_to_mel(hz, "slaney") / hz_to_mel(hz[-1:], "slaney") * (MEL_BANDS + 1)
    axes.set_yticks(heights[:-1].tolist(), [f"{tick / 1000:g}k" if tick >= 1000 else str(tick) for tick in TICKS])
    axes.set_ylim(0, MEL_BANDS + 1)
    return image
