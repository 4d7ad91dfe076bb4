"""How much of what is said can be read from a codec's frozen codes: a small recognizer is trained on them and tested on others.

The probe of XY-Tokenizer's authors (arXiv 2506.23325) is a two-layer bidirectional LSTM with CTC on characters, on frames
repeated to at least 50 a second. As theirs, it is given the codec's quantized vectors; or, so that it needs nothing but the codes
and is the same for every codec, it learns a vector for each entry of each codebook, and adds those of a frame.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from tokenizers_lab.data.batch import SpeechBatch
from tokenizers_lab.draw import Draw, stable_seed
from tokenizers_lab.errors import ConfigError, DataError, InputError
from tokenizers_lab.text_normalisers import build_normaliser
from tokenizers_lab.tokenizer import SpeechTokenizer

from .bootstrap import mean_summary
from .candidates import UNTRAINED_LABEL, describe, untrained_copy
from .deterministic import exact_convolutions
from .gather import check_names
from .provenance import environment, samples_sha256, text_sha256
from .speech_candidates import Clip, network_input
from .wer import character_edits, summarise_edits, word_edits

BLANK, UNKNOWN = 0, "\ufffd"      # of CTC; a character that no training text has
EDITS = {"cer": ("character error rate", character_edits), "wer": ("word error rate", word_edits)}
FEATURES = {
    "vectors": "the codec's quantized vectors, standardised over the training clips, by a learned linear map",
    "entries": "a learned vector for each entry of each codebook, added up over the codebooks",
}
Progress = Callable[[Iterable[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class ProbeSettings:
    """The recognizer and its training."""

    width: int = 128                # channels of a frame, and of each direction of the LSTM
    layers: int = 2                 # of the LSTM, as published
    frame_rate: float = 50.0        # frames are repeated a whole number of times to at least so many a second, as published
    dropout: float = 0.3            # of frames' vectors and between layers
    lr: float = 2e-3                # of Adam
    batch_size: int = 8             # clips
    epochs: int = 60                # passes over the training clips
    minutes: float | None = None    # training of a row ends after so long, which makes results depend on the machine
    selection: int = 10             # every so many training clips one is kept, by which the best epoch is chosen; 0: the last
    features: str = "vectors"       # vectors: the codec's, as published; entries: learned anew from the codes alone
    normaliser: str = "basic"       # of texts: basic, english, none (docs/evaluation.md)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "layers", "batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.features not in FEATURES:
            raise ConfigError(f"--features must be one of {', '.join(FEATURES)}, not '{self.features}'")
        if self.minutes is not None and self.minutes <= 0:
            raise ConfigError(f"--minutes must be above 0, not {self.minutes:g}")


@dataclass
class Said:
    """A clip as the probe sees it."""

    key: str
    text: str                                              # normalised, not empty
    seconds: float
    digest: str                                            # SHA-256 of its samples
    codes: list[Tensor] = field(default_factory=list)      # (K, T) int64 on the CPU, of each row's tokenizer
    frames: list[Tensor] = field(default_factory=list)     # what the probe is given: the codes, or vectors (D, T) float32


class Entries(nn.Module):
    """A learned vector for each entry of each codebook, added up over the codebooks."""

    def __init__(self, sizes: Sequence[int], width: int):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in sizes)

    def forward(self, codes: Tensor) -> Tensor:
        """(B, T, width) of codes (B, K, T)."""
        return torch.stack([table(codes[:, k]) for k, table in enumerate(self.tables)]).sum(0) / math.sqrt(len(self.tables))


class Vectors(nn.Module):
    """A linear map of vectors that are standardised by the mean and deviation of each of their numbers."""

    mean: Tensor
    std: Tensor

    def __init__(self, examples: Tensor, width: int):
        """examples: (D, n), of the training clips."""
        super().__init__()
        self.register_buffer("mean", examples.mean(1))
        self.register_buffer("std", examples.std(1).clamp_min(1e-5))
        self.linear = nn.Linear(len(examples), width)

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, T, width) of vectors (B, D, T)."""
        return self.linear((vectors.transpose(1, 2) - self.mean) / self.std)


class CTCProbe(nn.Module):
    """Frames to log probabilities of blank, the known characters, and all others."""

    def __init__(self, inward: nn.Module, repeat: int, classes: int, settings: ProbeSettings):
        """inward: Entries or Vectors, of settings.width; repeat: frames that each becomes."""
        super().__init__()
        self.inward = inward
        self.repeat, self.dropout = repeat, nn.Dropout(settings.dropout)
        self.lstm = nn.LSTM(settings.width, settings.width, settings.layers, batch_first=True, bidirectional=True,
                            dropout=settings.dropout if settings.layers > 1 else 0.0)
        self.output = nn.Linear(2 * settings.width, classes)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """(B, repeat · T, classes) of codes or vectors (B, ·, T); lengths: (B,) frames of each, on the CPU. Padding is not looked
        at."""
        x = self.dropout(self.inward(frames)).repeat_interleave(self.repeat, 1)                  # (B, repeat · T, width)
        packed = pack_padded_sequence(x, lengths * self.repeat, batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=x.shape[1])
        return self.output(self.dropout(hidden)).log_softmax(2)


@dataclass(frozen=True)
class Alphabet:
    """Characters of the training texts; 0 is CTC's blank, the last class stands for every other character."""

    characters: tuple[str, ...]

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Alphabet":
        return cls(tuple(sorted(set("".join(texts)))))

    @property
    def classes(self) -> int:
        """Blank, the characters, the others."""
        return len(self.characters) + 2

    def encode(self, text: str) -> Tensor:
        """(characters,) int64."""
        place = {character: i for i, character in enumerate(self.characters, start=1)}
        return torch.tensor([place.get(character, self.classes - 1) for character in text])

    def decode(self, best: Tensor) -> str:
        """The text of the most likely class of each frame (T,): repetitions are one, blanks are none."""
        shown = ["", *self.characters, UNKNOWN]
        return "".join(shown[i] for i in torch.unique_consecutive(best).tolist())


# --- clips ------------------------------------------------------------------------------------------------------------------

def code_clips(
    tokenizers: Sequence[SpeechTokenizer], batches: Iterable[SpeechBatch], sample_rate: int, settings: ProbeSettings
) -> tuple[list[Said], int]:
    """Every clip with a text, coded alone by each tokenizer, and the number of those without.

    Raises DataError if none has one.
    """
    normalise, found, without = build_normaliser(settings.normaliser), [], 0
    for batch in batches:
        for i, key in enumerate(batch.keys):
            text = normalise(batch.texts[i] or "")
            if not text:
                without += 1
                continue
            clip = Clip(key, batch.audio[i, :, : int(batch.lengths[i])], sample_rate, text)
            said = Said(key, text, clip.seconds, samples_sha256(clip.audio))
            for tokenizer in tokenizers:
                codes, frames = frames_of(tokenizer, clip, settings.features)
                said.codes.append(codes)
                said.frames.append(frames)
            found.append(said)
    if not found:
        raise DataError(f"no clip has a text{f' ({without} have none)' if without else ''}: the probe needs transcripts")
    check_names([said.key for said in found], "clips")
    return sorted(found, key=lambda said: said.key), without


@torch.inference_mode()
def frames_of(tokenizer: SpeechTokenizer, clip: Clip, features: str) -> tuple[Tensor, Tensor]:
    """(codes (K, T), what the probe is given: these, or their vectors (D, T)) of a clip. Raises InputError if there are none."""
    parameter = next(tokenizer.parameters())
    with exact_convolutions():
        codes = tokenizer.encode(network_input(clip, tokenizer)[None].to(parameter.device, parameter.dtype)).codes
    if codes is None:
        raise InputError(f"a {tokenizer.system} tokenizer has latents, not codes: the probe reads codes")
    kept = codes[0].cpu().clone()
    return kept, kept if features == "entries" else tokenizer.code_vectors(codes)[0].float().cpu().clone()


def padded(clips: Sequence[Said], row: int) -> tuple[Tensor, Tensor]:
    """(frames (B, ·, T), how many of each (B,)) of a row's clips."""
    frames = [said.frames[row].T for said in clips]
    return pad_sequence(frames, batch_first=True).transpose(1, 2), torch.tensor([len(f) for f in frames])


# --- the probe --------------------------------------------------------------------------------------------------------------

def ctc_losses(log_probabilities: Tensor, frames: Tensor, texts: Sequence[Tensor]) -> Tensor:
    """(B,) CTC loss of each clip in nats for each of its characters; infinite where the frames are too few for the text."""
    sizes = torch.tensor([len(text) for text in texts])
    needed = sizes + torch.tensor([int((text[1:] == text[:-1]).sum()) for text in texts])      # a blank between equal ones
    losses = F.ctc_loss(log_probabilities.transpose(0, 1), torch.cat(list(texts)).to(log_probabilities.device), frames, sizes,
                        BLANK, reduction="none", zero_infinity=True)
    return torch.where((needed <= frames).to(losses.device), losses / sizes.to(losses), math.inf)


def train_probe(
    probe: CTCProbe, clips: Sequence[Said], row: int, alphabet: Alphabet, settings: ProbeSettings, progress: Progress
) -> tuple[list[dict[str, float]], int]:
    """Train in place and leave the weights of the best epoch by the kept clips; returns each epoch's mean losses, and which
    epoch's weights are left."""
    kept = clips[settings.selection - 1 :: settings.selection] if settings.selection else []
    learned = [said for said in clips if all(said is not other for other in kept)]
    if not learned:
        raise DataError("too few clips with a text to train a probe on")
    texts = {said.key: alphabet.encode(said.text) for said in clips}
    device = next(probe.parameters()).device
    optimizer = torch.optim.Adam(probe.parameters(), settings.lr)
    curve: list[dict[str, float]] = []
    best, chosen, weights = math.inf, 0, None
    ends = math.inf if settings.minutes is None else time.monotonic() + 60 * settings.minutes
    for epoch in progress(range(settings.epochs), "training the probe"):
        probe.train()
        order = Draw(settings.seed, step=epoch).permutation("clips", len(learned)).tolist()
        total, counted = 0.0, 0
        for start in range(0, len(order), settings.batch_size):
            taken = [learned[i] for i in order[start : start + settings.batch_size]]
            given, frames = padded(taken, row)
            losses = ctc_losses(probe(given.to(device), frames), frames * probe.repeat, [texts[said.key] for said in taken])
            losses = losses[losses.isfinite()]
            if not len(losses):
                continue
            loss = losses.mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(probe.parameters(), 5.0)
            optimizer.step()
            total, counted = total + float(losses.detach().sum()), counted + len(losses)
        if not counted:
            raise DataError("every text is longer than its clip has frames: the probe cannot be trained")
        curve.append({"epoch": epoch + 1, "train": total / counted})
        if kept:
            measured = [value for said in kept if math.isfinite(value := hear(probe, said, row, alphabet)[0])]
            curve[-1]["selection"] = sum(measured) / len(measured) if measured else math.inf
            if curve[-1]["selection"] < best:
                best, chosen = curve[-1]["selection"], epoch + 1
                weights = {name: value.clone() for name, value in probe.state_dict().items()}
        if time.monotonic() > ends:
            break
    if weights is None:
        return curve, len(curve)
    probe.load_state_dict(weights)
    return curve, chosen


@torch.no_grad()
def hear(probe: CTCProbe, said: Said, row: int, alphabet: Alphabet) -> tuple[float, str]:
    """(CTC loss in nats a character, the most likely text by frames) of a clip alone."""
    probe.eval()
    given, frames = padded([said], row)
    log_probabilities = probe(given.to(next(probe.parameters()).device), frames)
    loss = ctc_losses(log_probabilities, frames * probe.repeat, [alphabet.encode(said.text)])
    return float(loss[0]), alphabet.decode(log_probabilities[0].argmax(1))


def probe_row(
    tokenizer: SpeechTokenizer, row: int, train: Sequence[Said], held_out: Sequence[Said], settings: ProbeSettings,
    progress: Progress,
) -> dict[str, Any]:
    """Train the probe on a row's codes and measure it on the held-out ones."""
    alphabet = Alphabet.of(said.text for said in train)
    repeat = max(1, math.ceil(settings.frame_rate * tokenizer.hop / tokenizer.sample_rate - 1e-9))
    with torch.random.fork_rng():
        torch.manual_seed(stable_seed(settings.seed, "asr probe"))
        inward: nn.Module = Entries(tokenizer.codebook_sizes, settings.width) if settings.features == "entries" else Vectors(
            torch.cat([said.frames[row] for said in train], dim=1), settings.width)
        probe = CTCProbe(inward, repeat, alphabet.classes, settings).to(tokenizer.device)
        curve, epoch = train_probe(probe, train, row, alphabet, settings, progress)
    heard = [hear(probe, said, row, alphabet) for said in held_out]
    losses = [loss for loss, _ in heard if math.isfinite(loss)]
    metrics: dict[str, Any] = {"ctc": {
        "title": "CTC loss", "unit": "nats a character", "better": "lower", "n": len(losses),
        **(mean_summary(losses, settings.seed) if losses else {"value": None, "uncertainty": None}),
        "per_clip": [loss if math.isfinite(loss) else None for loss, _ in heard], "too_short": len(heard) - len(losses)}}
    for name, (title, edits) in EDITS.items():
        counts = [edits(said.text, text) for said, (_, text) in zip(held_out, heard)]
        metrics[name] = {"title": title, "unit": "%", "better": "lower", "n": len(counts),
                         **summarise_edits(counts, settings.seed), "per_clip": [100 * c.rate for c in counts]}
    used = [torch.cat([said.codes[row][k] for said in train]).unique().numel() for k in range(len(tokenizer.codebook_sizes))]
    return {"metrics": metrics, "repeat": repeat, "frame_rate": tokenizer.sample_rate / tokenizer.hop,
            "codebook_sizes": list(tokenizer.codebook_sizes), "codes_used": used,
            "parameters_of_probe": sum(p.numel() for p in probe.parameters()), "epochs": len(curve), "epoch": epoch,
            "curve": [{name: value if math.isfinite(value) else None for name, value in point.items()} for point in curve],
            "heard": [text for _, text in heard]}


def probe_asr(
    model: SpeechTokenizer, train: Iterable[SpeechBatch], held_out: Iterable[SpeechBatch], settings: ProbeSettings | None = None,
    *, label: str = "model", baseline: bool = False, sample_rate: int | None = None, data: dict[str, Any] | None = None,
    progress: Progress = lambda items, what: items,
) -> dict[str, Any]:
    """Train a recognizer on the codes of `train`, and give its held-out CTC loss, CER and WER as JSON data.

    train, held_out: batches at `sample_rate` (Hz; none: the model's); clips without a text are left out and counted. Each is
    coded once and alone. baseline: also the same probe on the codes of the same network with random weights, and how much
    better the model is (margins; positive is better). data: the protocol of the clips. progress: wraps iterables.
    The same on a CPU for the same seed, unless `minutes` ends it. Raises DataError without texts or if a clip is in both parts,
    InputError of a model without codes.
    """
    settings = settings or ProbeSettings()
    model.eval()
    rows = [(label, "model", model)]
    if baseline:
        rows.append((UNTRAINED_LABEL, "untrained", untrained_copy(model, settings.seed)))
    tokenizers, rate = [tokenizer for _, _, tokenizer in rows], sample_rate or model.sample_rate
    known, silent = code_clips(tokenizers, progress(train, "coding the training clips"), rate, settings)
    tested, untold = code_clips(tokenizers, progress(held_out, "coding the held-out clips"), rate, settings)
    twice = {said.digest for said in known} & {said.digest for said in tested}
    if twice:
        raise DataError(f"{len(twice)} of the held-out clips are among the training clips: give other clips (--held-out)")
    results = []
    for row, (name, role, tokenizer) in enumerate(rows):
        results.append({"label": name, "role": role, **describe(tokenizer, role),
                        **probe_row(tokenizer, row, known, tested, settings, progress)})
    return {
        "probe": "asr", "n": len(tested), "keys": [said.key for said in tested], "rows": results, "margins": margins(results),
        "texts": [said.text for said in tested],
        "protocol": {
            **asdict(settings), "data": data or {}, "sample_rate": rate, "features": FEATURES[settings.features],
            "network": "bidirectional LSTM, CTC on characters", "normaliser": build_normaliser(settings.normaliser).name,
            "training_clips": len(known), "training_seconds": math.fsum(said.seconds for said in known),
            "held_out_seconds": math.fsum(said.seconds for said in tested),
            "without_text": {"training": silent, "held_out": untold},
            "training_sha256": text_sha256([said.digest for said in known]),
            "held_out_sha256": text_sha256([said.digest for said in tested]), "device": str(model.device)},
        "environment": environment(model.device),
    }


def margins(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How much better the first row is than each other one, over the clips of both: positive is better."""
    found = []
    for other in rows[1:]:
        for name, mine in rows[0]["metrics"].items():
            pairs = zip(mine["per_clip"], other["metrics"][name]["per_clip"])
            values = [theirs - ours for ours, theirs in pairs if ours is not None and theirs is not None]
            if values:
                found.append({"metric": name, "over": other["label"], "role": other["role"], **mean_summary(values)})
    return found
