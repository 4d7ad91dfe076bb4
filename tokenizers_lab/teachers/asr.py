"""Speech recognizers: Whisper and CTC networks, out of the assets table or by transformers. 16 kHz audio in, text out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenizers_lab.errors import ConfigError, InputError
from tokenizers_lab.nn.mel import whisper_log_mel

from .networks import local_folder, missing_teacher
from .ssl import SAMPLE_RATE, CTCRecognizer, build_recognizer
from .whisper import WHISPER_ASSETS, Whisper, whisper_from_asset, whisper_from_transformers

WINDOW = 30 * SAMPLE_RATE             # samples that a recognizer hears at once: Whisper's window
SEARCH = 5 * SAMPLE_RATE              # a longer clip is cut at the quietest place in a window's last 5 s
QUIET = SAMPLE_RATE // 10             # samples over which loudness is measured
LONGEST = 224                         # tokens of a window's text: half of the decoder's positions, as openai-whisper


class ASR(nn.Module):
    """A recognizer, always in eval mode. `provenance`: where its weights come from; `batch`: windows heard at once.

    Batching changes no text but where two tokens are equally likely to within rounding.
    """

    sample_rate = SAMPLE_RATE

    def __init__(self, provenance: str, batch: int = 8):
        super().__init__()
        self.provenance, self.batch = provenance, batch

    def train(self, mode: bool = True) -> "ASR":
        """A recognizer stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def transcribe(self, clips: Sequence[Tensor] | Tensor) -> list[str]:
        """The text of each clip (samples,), float at 16 kHz in about [−1, 1], each as if alone; an empty clip has none.

        A clip above 30 s is cut into windows at quiet places. Raises InputError on another shape or type, NaN, infinity.
        """
        device = next(self.parameters()).device
        windows, owners = [], []
        for i, clip in enumerate(clips):
            if clip.dim() != 1 or not clip.is_floating_point() or not clip.isfinite().all():
                raise InputError(f"clip {i} must be finite float (samples,), not {clip.dtype} {tuple(clip.shape)}")
            cut = split_windows(clip.to(device).float()) if len(clip) else []
            windows += cut
            owners += [i] * len(cut)
        texts: list[list[str]] = [[] for _ in clips]
        for first in range(0, len(windows), self.batch):
            heard = self.hear(windows[first : first + self.batch])
            for owner, text in zip(owners[first:], heard):
                texts[owner].append(text.strip())
        return [" ".join(part for part in parts if part) for parts in texts]

    def hear(self, windows: list[Tensor]) -> list[str]:
        """Texts of windows (samples,) of at most 30 s each."""
        raise NotImplementedError


def split_windows(clip: Tensor) -> list[Tensor]:
    """A clip (samples,) in stretches of at most 30 s, cut at the quietest tenth of a second in each window's last 5 s."""
    pieces = []
    while len(clip) > WINDOW:
        cut = quietest_cut(clip, WINDOW, SEARCH, QUIET)
        pieces.append(clip[:cut])
        clip = clip[cut:]
    return [*pieces, clip]


def quietest_cut(clip: Tensor, longest: int, search: int, quiet: int) -> int:
    """Where to cut a clip (samples,): the middle of the quietest `quiet` samples of the last `search` before sample `longest`.

    search: a multiple of quiet; the clip has at least `longest` samples.
    """
    loudness = clip[longest - search : longest].unflatten(0, (-1, quiet)).square().sum(-1)
    return longest - search + int(loudness.argmin()) * quiet + quiet // 2


class WhisperASR(ASR):
    """Whisper, greedy and without timestamps; every window is padded with zeros to 30 s, as it was trained."""

    def __init__(self, whisper: Whisper, language: str | None = None, batch: int = 8):
        """language: a code such as `nl`; none: English for an English network, else detected for each window.
        Raises ConfigError if the network does not know it."""
        super().__init__(whisper.provenance, batch)
        self.network, self.tokenizer = whisper.network.requires_grad_(False).eval(), whisper.tokenizer
        settings = self.network.generation_config
        settings.max_length, settings.max_new_tokens = None, LONGEST
        self.options: dict[str, Any] = {}
        if getattr(settings, "is_multilingual", False):
            known = [token.strip("<|>") for token in settings.lang_to_id]
            if language is not None and language not in known:
                raise ConfigError(f"Whisper has no language '{language}'; it has {', '.join(known)}")
            self.options = {"language": language, "task": "transcribe"}
        elif language not in (None, "en"):
            raise ConfigError(f"this Whisper ({whisper.provenance}) hears English only, not '{language}': take whisper-base")
        self.eval()

    def hear(self, windows: list[Tensor]) -> list[str]:
        bands = self.network.config.num_mel_bins
        features = torch.cat([whisper_log_mel(window[None], bands, WINDOW) for window in windows])
        mask = torch.ones_like(features[:, 0], dtype=torch.long)
        with quiet():
            rows = self.network.generate(
                input_features=features, attention_mask=mask, do_sample=False, num_beams=1, return_timestamps=False,
                **self.options)
        end = self.network.generation_config.eos_token_id          # all tokens from it on are no text
        return [self.tokenizer.decode([i for i in row.tolist() if i < end], skip_special_tokens=True) for row in rows]


@contextmanager
def quiet() -> Iterator[None]:
    """Hide transformers' warnings: Whisper's `generate` warns of arguments that it passes to itself."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


class CTCASR(ASR):
    """A CTC network, greedy."""

    def __init__(self, recognizer: CTCRecognizer, batch: int = 8):
        super().__init__(recognizer.provenance, batch)
        self.recognizer = recognizer
        self.eval()

    def hear(self, windows: list[Tensor]) -> list[str]:
        if len({len(window) for window in windows}) == 1:
            return self.recognizer.transcribe(torch.stack(windows))
        return [self.recognizer.transcribe(window[None])[0] for window in windows]      # padding would change the text


def build_asr(source: str, device: str | torch.device = "cpu", language: str | None = None) -> ASR:
    """A recognizer: whisper-tiny.en or whisper-base of the assets table, or a hub id or local folder of a Whisper or CTC network.

    language: for a multilingual Whisper only, a code such as `nl`; none: detected. Raises ConfigError on another choice,
    WeightsMissing if the weights are not here and cannot be fetched.
    """
    from transformers import AutoConfig

    if source in WHISPER_ASSETS:
        return WhisperASR(whisper_from_asset(source), language).to(device)
    if "/" not in source and not Path(source).expanduser().is_dir():
        raise ConfigError(f"there is no recognizer '{source}': use {', '.join(WHISPER_ASSETS)}, a hub id or a folder")
    try:
        config = AutoConfig.from_pretrained(local_folder(source), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise missing_teacher(source, error) from error
    if config.model_type == "whisper":
        return WhisperASR(whisper_from_transformers(source), language).to(device)
    if not any(name.endswith("ForCTC") for name in config.architectures or ()):
        raise ConfigError(f"'{source}' is a {config.model_type}, and neither a Whisper nor a network with a CTC head")
    if language is not None:
        raise ConfigError(f"'{source}' is a CTC network: it has one language, which cannot be set")
    return CTCASR(build_recognizer(source)).to(device)
