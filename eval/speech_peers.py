"""Peers' speech codecs in our convention: transformers' Mimi, EnCodec and DAC, and the package `encodec`."""

import importlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.asset_fetch import offline
from tokenizers_lab.asset_readers import sha256_of
from tokenizers_lab.errors import CheckpointError, InputError, WeightsMissing
from tokenizers_lab.hub import hub_snapshot
from tokenizers_lab.tokenizer import SpeechEncoding, SpeechTokenizer, equal_lengths

RANDOM, RANDOM_TINY = "random", "random-tiny"
SEED = 1                 # of random weights; not 0, which the harness's untrained copies have
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
PACKAGE_FILES = {"24khz": "encodec_24khz-d7cc33bc.th"}     # the package's names of its models' files
PACKAGE_ADDRESS = "https://dl.fbaipublicfiles.com/encodec/v0/"


@dataclass
class SpeechPeerConfig:
    """What builds a peer."""

    options: dict[str, Any] = field(default_factory=dict)    # its config.json; empty: the published size
    codebooks: int = 0                                       # codes of a frame that are used; 0: all


class SpeechPeer(SpeechTokenizer):
    """A peer's codec; with random weights until it is given others. Items of a padded batch are computed as if alone."""

    cfg: SpeechPeerConfig
    published: ClassVar[dict[str, Any]] = {}      # options of the published size, where they are not the defaults
    tiny: ClassVar[dict[str, Any]] = {}           # options of a network that tests can run

    def __init__(self, cfg: SpeechPeerConfig):
        """Raises CheckpointError if the codec cannot be built, InputError if it has fewer codebooks than asked for."""
        super().__init__(cfg)
        try:
            self.network: Any = self.build(cfg.options).eval().requires_grad_(False)
            self.describe()
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{self.system}: its config builds no codec: {' '.join(str(error).split())}") from error
        if not 0 <= cfg.codebooks <= self.codebooks:
            raise InputError(f"{self.system} has {self.codebooks} codebooks, of which {cfg.codebooks} cannot be used")
        self.codebooks = cfg.codebooks or self.codebooks
        self.start_codebooks()

    def build(self, options: dict[str, Any]) -> nn.Module:
        """The network of a config, with random weights."""
        raise NotImplementedError

    def describe(self) -> None:
        """Set sample_rate, hop, codebooks, codebook_size and channels from the network's config."""
        raise NotImplementedError

    def codes_of(self, audio: Tensor) -> Tensor:
        """Codes (B, K, T) of audio (B, channels, samples), all items whole, by the first `codebooks` codebooks."""
        raise NotImplementedError

    def audio_of(self, codes: Tensor) -> Tensor:
        """Audio (B, channels, about T · hop) of codes (B, K, T)."""
        raise NotImplementedError

    def start_codebooks(self) -> None:
        """Give codebooks that start as zeros random entries near the latents, so that codes vary as a codec's do."""

    def encode(self, audio: Tensor, lengths: Tensor | None = None) -> SpeechEncoding:
        """Codes (B, K, T), T = ⌈samples / hop⌉. lengths: (B,) samples of each item. Raises InputError on unusable audio."""
        self.check_audio(audio, lengths)
        codes = torch.zeros(len(audio), self.codebooks, self.frames(audio.shape[2]), dtype=torch.int64, device=audio.device)
        for items, samples in equal_lengths(lengths, audio.shape[2], len(audio)):
            found = self.codes_of(audio[items, :, :samples].to(next(self.parameters()).dtype))
            codes[items, :, : found.shape[2]] = found
        return SpeechEncoding(codes, lengths=None if lengths is None else -(-lengths // self.hop))

    def decode(self, codes: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Audio (B, channels, T · hop) in [−1, 1] from codes (B, k, T). Raises InputError on unusable codes.

        A decoder with odd strides gives a few samples less than whole frames; they are 0.
        """
        self.check_codes(codes, lengths)
        audio = torch.zeros(len(codes), self.channels, codes.shape[2] * self.hop, device=codes.device)
        for items, frames in equal_lengths(lengths, codes.shape[2], len(codes)):
            made = self.audio_of(codes[items, :, :frames]).float()[..., : frames * self.hop]
            audio[items, :, : made.shape[2]] = made
        return audio.clamp(-1, 1)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The network's own."""
        return self.network.state_dict(*args, **kwargs)


class TransformersPeer(SpeechPeer):
    """A codec of transformers."""

    classes: ClassVar[tuple[str, str]]      # of its config and its model

    def build(self, options: dict[str, Any]) -> nn.Module:
        """Raises what transformers raises on options that it cannot use."""
        transformers: Any = importlib.import_module("transformers")
        config, model = (getattr(transformers, name) for name in self.classes)
        return model(config.from_dict(dict(options)))

    def describe(self) -> None:
        """The names that transformers' configs share."""
        config = self.network.config
        self.sample_rate, self.codebook_size = config.sampling_rate, config.codebook_size
        self.channels = getattr(config, "audio_channels", 1)

    def load(self, folder: Path) -> None:
        """Take the weights of a folder that transformers saved. Raises CheckpointError unless all keys fit."""
        transformers: Any = importlib.import_module("transformers")
        try:
            with torch.random.fork_rng(devices=[]):
                network, info = getattr(transformers, self.classes[1]).from_pretrained(
                    folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
        except Exception as error:      # transformers and safetensors raise many kinds for a damaged folder
            raise CheckpointError(f"{folder} cannot be loaded: {' '.join(str(error).split())}") from error
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(what):
                raise CheckpointError(f"{folder}: {what.replace('_', ' ')} in its weights, such as {sorted(info[what])[0]}")
        self.network = network.eval().requires_grad_(False)


class MimiPeer(TransformersPeer):
    """Mimi (Défossez et al. 2024): 12.5 frames a second, one semantic and up to 31 acoustic codebooks."""

    system = "mimi"
    classes = ("MimiConfig", "MimiModel")
    tiny: ClassVar[dict[str, Any]] = {
        "num_filters": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 16, "codebook_size": 64, "codebook_dim": 8, "vector_quantization_hidden_dimension": 8,
        "num_quantizers": 4, "upsample_groups": 16,
    }

    def describe(self) -> None:
        """Mimi's own names."""
        super().describe()
        config = self.network.config
        self.hop, self.codebooks = round(config.sampling_rate / config.frame_rate), config.num_quantizers

    def codes_of(self, audio: Tensor) -> Tensor:
        """Whole items need no mask."""
        return self.network.encode(audio, num_quantizers=self.codebooks, return_dict=True).audio_codes

    def audio_of(self, codes: Tensor) -> Tensor:
        """As MimiModel."""
        return self.network.decode(codes, return_dict=True).audio_values

    @torch.no_grad()
    def start_codebooks(self) -> None:
        """Both residual quantizers."""
        network = self.network
        latents = network.encoder(noise(self), return_dict=True).latents
        for part in (network.quantizer.semantic_residual_vector_quantizer, network.quantizer.acoustic_residual_vector_quantizer):
            values = latents if part.input_proj is None else part.input_proj(latents)
            fill_codebooks([layer.codebook.embed_sum for layer in part.layers], values)


class EncodecPeer(TransformersPeer):
    """EnCodec (Défossez et al. 2022) of transformers, those that neither normalise nor cut their input: the 24 kHz model.

    The 48 kHz model gives a scale beside the codes of each second, for which a code sequence has no place.
    """

    system = "encodec"
    classes = ("EncodecConfig", "EncodecModel")
    tiny: ClassVar[dict[str, Any]] = {      # 4 codebooks
        "num_filters": 4, "hidden_size": 16, "codebook_size": 64, "target_bandwidths": [0.9, 1.8],
    }

    def describe(self) -> None:
        """EnCodec's own names. Raises ValueError on a model that normalises or cuts."""
        super().describe()
        config = self.network.config
        if config.normalize or config.chunk_length is not None:
            raise ValueError("it normalises or cuts its input (as EnCodec at 48 kHz does), which codes alone cannot undo")
        self.hop, self.codebooks = config.hop_length, config.num_quantizers

    def codes_of(self, audio: Tensor) -> Tensor:
        """The quantizer's first books, whose number EnCodec gives as a bandwidth."""
        network = self.network
        latents = network.encoder(audio)
        bandwidth = self.codebooks * math.log2(self.codebook_size) * network.config.frame_rate / 1000
        return network.quantizer.encode(latents, bandwidth + 1e-6).transpose(0, 1)      # a rounded product would lose a book

    def audio_of(self, codes: Tensor) -> Tensor:
        """As EncodecModel, of one frame without a scale."""
        return self.network.decode(codes[None], [None], return_dict=True).audio_values

    @torch.no_grad()
    def start_codebooks(self) -> None:
        """One residual quantizer."""
        network = self.network
        fill_codebooks([layer.codebook.embed for layer in network.quantizer.layers], network.encoder(noise(self)))


class DacPeer(TransformersPeer):
    """DAC (Kumar et al. 2023). Audio is filled with zeros to whole frames, as its feature extractor does."""

    system = "dac"
    classes = ("DacConfig", "DacModel")
    published: ClassVar[dict[str, Any]] = {"downsampling_ratios": [2, 4, 5, 8], "n_codebooks": 12}      # descript/dac_16khz
    tiny: ClassVar[dict[str, Any]] = {"encoder_hidden_size": 8, "decoder_hidden_size": 64, "n_codebooks": 4, "codebook_size": 64}

    def describe(self) -> None:
        """DAC's own names."""
        super().describe()
        config = self.network.config
        self.hop, self.codebooks = int(config.hop_length), config.n_codebooks

    def codes_of(self, audio: Tensor) -> Tensor:
        """Of whole frames."""
        whole = F.pad(audio, (0, -audio.shape[2] % self.hop))
        return self.network.encode(whole, n_quantizers=self.codebooks, return_dict=True).audio_codes

    def audio_of(self, codes: Tensor) -> Tensor:
        """DAC gives (B, samples)."""
        return self.network.decode(audio_codes=codes, return_dict=True).audio_values[:, None]


class PackagePeer(SpeechPeer):
    """EnCodec at 24 kHz by its authors' package `encodec`."""

    system = "encodec-package"

    def build(self, options: dict[str, Any]) -> nn.Module:
        """The package has no other size. Raises WeightsMissing without the package."""
        return encodec_package().EncodecModel.encodec_model_24khz(pretrained=False)

    def describe(self) -> None:
        """The package's names."""
        network = self.network
        self.sample_rate, self.channels, self.hop = network.sample_rate, network.channels, int(network.encoder.hop_length)
        self.codebooks, self.codebook_size = network.quantizer.n_q, network.quantizer.bins

    def codes_of(self, audio: Tensor) -> Tensor:
        """By the bandwidth, as the package says how many books it uses."""
        network = self.network
        network.bandwidth = self.codebooks * network.bits_per_codebook * network.frame_rate / 1000
        ((codes, _),) = network.encode(audio)
        return codes

    def audio_of(self, codes: Tensor) -> Tensor:
        """One frame without a scale."""
        return self.network.decode([(codes, None)])

    @torch.no_grad()
    def start_codebooks(self) -> None:
        """One residual quantizer."""
        network = self.network
        fill_codebooks([layer._codebook.embed for layer in network.quantizer.vq.layers], network.encoder(noise(self)))


PEERS: dict[str, type[SpeechPeer]] = {peer.system: peer for peer in (MimiPeer, EncodecPeer, DacPeer, PackagePeer)}
PEER_HELP = f"{', '.join(f'{name}:' for name in PEERS)} and a hub id, a folder or {RANDOM}; @K for the first K codebooks"


def is_speech_peer(name: str) -> bool:
    """Whether a model's name begins with a peer's, such as `mimi:kyutai/mimi`."""
    return name.split(":", 1)[0] in PEERS and ":" in name


def load_speech_peer(name: str, device: torch.device | str = "cpu") -> SpeechPeer:
    """`CODEC:SOURCE` or `CODEC:SOURCE@K` as a speech tokenizer, in float32 and eval mode; K: only the first K codebooks.

    mimi, encodec, dac: transformers' codecs; SOURCE is a hub id (kyutai/mimi, facebook/encodec_24khz, descript/dac_24khz), a
    folder that transformers saved, `random` (seeded random weights at the published size; DAC's is that at 16 kHz), or
    `random-tiny`.
    encodec-package: the package `encodec`; SOURCE is 24khz (its authors' weights, from torch's cache or fetched), a folder
    that holds their file, or random.
    Raises InputError on another name, CheckpointError if the weights do not fit or the codec cannot be one (EnCodec at 48 kHz
    keeps a scale beside its codes), WeightsMissing if something is not here and cannot be fetched.
    """
    codec, _, source = name.partition(":")
    if codec not in PEERS or not source:
        raise InputError(f"{name} names no peer: they are {PEER_HELP}")
    source, at, count = source.rpartition("@") if source.rpartition("@")[2].isdecimal() else (source, "", "")
    if at and int(count) < 1:
        raise InputError(f"{name}: at least one codebook must be used")
    kind, books = PEERS[codec], int(count or 0)
    if source in (RANDOM, RANDOM_TINY):
        peer = random_peer(kind, kind.tiny if source == RANDOM_TINY else kind.published, books)
    elif kind is PackagePeer:
        peer = _load_package(source, books)
    else:
        peer = _load_transformers(kind, source, books)
    if at:
        peer.provenance["codebooks"] = f"the first {books}"
    return peer.to(device).eval()


def random_peer(kind: type[SpeechPeer], options: dict[str, Any], codebooks: int = 0) -> SpeechPeer:
    """A peer with seeded random weights, which its provenance says; global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        peer = kind(SpeechPeerConfig(options, codebooks))
    peer.provenance = {"source": f"random weights (seed {SEED})", "class": type(peer.network).__name__}
    return peer


def _load_transformers(kind: type[SpeechPeer], source: str, codebooks: int) -> SpeechPeer:
    folder = Path(source).expanduser()
    said = f"folder {folder.resolve().name}"      # the files' hashes say what it is: where it lies is nobody's business
    if not folder.is_dir():
        if folder.exists() or source.count("/") != 1:
            raise CheckpointError(f"{source} is no folder and no hub id: after {kind.system}: comes one of them, or {RANDOM}")
        folder, said = hub_snapshot(source, ["config.json", *WEIGHTS]), f"hub {source}"
    try:
        options = json.loads((folder / "config.json").read_text())
        found = options["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} has no readable config.json of transformers: {error}") from error
    if found != kind.system:
        raise CheckpointError(f"{folder} holds transformers' {found}, not {kind.system}")
    files = sorted(file for pattern in WEIGHTS[:2] for file in folder.glob(pattern))
    if not files:
        raise CheckpointError(f"{source} has no {WEIGHTS[0]}")
    peer = random_peer(kind, options, codebooks)
    assert isinstance(peer, TransformersPeer)
    peer.load(folder)
    peer.provenance = {
        "source": said, "class": kind.classes[1], "files": {file.name: sha256_of(file) for file in files},      # type: ignore[attr-defined]
        "config_sha256": sha256_of(folder / "config.json"),
    }
    return peer


def _load_package(source: str, codebooks: int) -> SpeechPeer:
    """The authors' weights of the package's 24 kHz model."""
    package, file_name = encodec_package(), PACKAGE_FILES["24khz"]
    if source == "48khz":
        raise CheckpointError("EnCodec at 48 kHz keeps a scale beside the codes of each second, for which codes have no place")
    folder = Path(torch.hub.get_dir()) / "checkpoints" if source == "24khz" else Path(source).expanduser()
    file = folder / file_name
    if source != "24khz" and not file.is_file():
        raise CheckpointError(f"{source} has no {file_name}: after encodec-package: comes 24khz, its folder, or {RANDOM}")
    advice = f"put {PACKAGE_ADDRESS}{file_name} into {folder}"
    if not file.is_file() and offline():
        raise WeightsMissing(f"EnCodec's weights are not here, and TOKENIZERS_LAB_OFFLINE is set: {advice}")
    peer = random_peer(PackagePeer, {}, codebooks)
    try:
        peer.network.load_state_dict(package.EncodecModel._get_pretrained(file_name, folder if file.is_file() else None))
    except OSError as error:      # also urllib's
        raise WeightsMissing(f"EnCodec's weights cannot be fetched ({error}): {advice}") from error
    except Exception as error:      # another hash, another file
        raise CheckpointError(f"{file_name} cannot be loaded: {' '.join(str(error).split())}") from error
    peer.provenance = {"source": f"package encodec, {file_name}", "class": "EncodecModel"}
    return peer


def encodec_package() -> Any:
    """The package `encodec`. Raises WeightsMissing that says how to install it."""
    try:
        return importlib.import_module("encodec")
    except ImportError as error:
        raise WeightsMissing(f"encodec-package: needs the package encodec: pip install encodec ({error})") from error


@torch.no_grad()
def fill_codebooks(books: list[Tensor], latents: Tensor) -> None:
    """Random entries, in place: the first codebook's spread as the latents (B, D, T), later ones' as much around 0."""
    values = latents.transpose(1, 2).flatten(0, 1)                  # (N, D)
    spread = values.std(0)
    for i, book in enumerate(books):
        book.copy_(torch.randn(book.shape) * spread + (values.mean(0) if i == 0 else 0))


def noise(tokenizer: SpeechTokenizer) -> Tensor:
    """Half a second of noise (1, channels, samples) for `fill_codebooks`."""
    return torch.rand(1, tokenizer.channels, tokenizer.sample_rate // 2) * 1.8 - 0.9
