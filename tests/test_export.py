"""Exported tokenizers: run where this package cannot be imported, and by onnxruntime, with the tokenizer's own outputs."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tokenizers_lab.cli.main import call
from tokenizers_lab.config import load_config
from tokenizers_lab.errors import InputError, TokenizersLabError
from tokenizers_lab.export import export_tokenizer
from tokenizers_lab.hub import build_tokenizer
from tokenizers_lab.models.dm_codec.config import ModelConfig as DMCodecConfig
from tokenizers_lab.models.lm_spt.config import AuxiliaryConfig
from tokenizers_lab.models.lm_spt.config import ModelConfig as LMSPTConfig
from tokenizers_lab.registry import systems
from tokenizers_lab.tokenizer import ImageEncoding, ImageTokenizer, SpeechEncoding, SpeechTokenizer, Tokenizer

IMAGE_SYSTEMS = [name for name, system in systems().items() if system.kind == "image"]
NO_ONNX: dict[str, str] = {}      # system: what ONNX cannot express of it
BATCHES = (1, 2, 5)
SMALL = {      # every part of a speech system, as few layers as may be: (config, fewest frames of an exported program)
    "dm_codec": (DMCodecConfig(filters=4, strides=[4], width=8, lstm_layers=2, codebooks=3, codebook_size=16), 8),
    "lm_spt": (LMSPTConfig(
        sample_rate=600, strides=[2, 3], decoder_strides=[3, 2], semantic_width=4, acoustic_width=4, decoder_width=8, latent=6,
        codebooks=3, semantic_size=16, semantic_dim=4, acoustic_size=8, acoustic_dim=4, dilations=[1],
        auxiliary=AuxiliaryConfig(width=4, strides=[3], sample_rate=300, dilations=[1])), 2),
}

# Reads inputs, runs the programs, writes outputs; importing this package is refused.
ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tokenizers_lab":
            raise ImportError(f"{name} was imported")

sys.meta_path.insert(0, Refuse())
import torch
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
folder = sys.argv[1]
encode, decode = (torch.export.load(f"{folder}/{part}.pt2").module() for part in ("encode", "decode"))
made = {}
with torch.no_grad():
    for name, given in load_file(f"{folder}/inputs.safetensors").items():
        torch.manual_seed(0)
        made[f"{name}.stored"] = stored = encode(given)
        torch.manual_seed(0)
        made[f"{name}.made"] = decode(stored)
save_file({k: v.contiguous() for k, v in made.items()}, f"{folder}/outputs.safetensors")
assert not any(name.partition(".")[0] == "tokenizers_lab" for name in sys.modules)
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(system: str) -> ImageTokenizer:
    """The system's tiny model, one block deep where it has depths, with latent statistics where it has them."""
    cfg = load_config(f"{system}/tiny")
    for part in vars(cfg.model).values():
        if isinstance(getattr(part, "depth", None), int):
            part.depth = 1
    torch.manual_seed(0)
    tokenizer = build_tokenizer(system, cfg.model).eval()
    if hasattr(tokenizer, "latent_mean"):
        tokenizer.latent_mean.normal_(0, 0.3)
        tokenizer.latent_std.uniform_(0.5, 2)
    return tokenizer


def expected(tokenizer: ImageTokenizer, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents or codes, images of them)."""
    with torch.no_grad():
        torch.manual_seed(0)
        encoding = tokenizer.encode(images)
        stored = encoding.codes if encoding.latents is None else encoding.latents
        torch.manual_seed(0)
        return stored, tokenizer.decode(stored)


@pytest.mark.parametrize("system", IMAGE_SYSTEMS)
def test_runs_without_this_package(system, tmp_path):
    tokenizer = tiny(system)
    about = export_tokenizer(tokenizer, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["decode.pt2", "encode.pt2", "export.json"]
    inputs = {str(n): torch.rand(n, *about["encode"]["input"]["shape"][1:]) for n in BATCHES}
    save_file(inputs, tmp_path / "inputs.safetensors")
    subprocess.run([sys.executable, "-I", "-c", ALONE, tmp_path], check=True, timeout=300)
    outputs = load_file(tmp_path / "outputs.safetensors")
    for name, images in inputs.items():
        stored, decoded = expected(tokenizer, images)
        assert torch.allclose(outputs[f"{name}.stored"].double(), stored.double(), atol=1e-5, rtol=0)
        assert torch.allclose(outputs[f"{name}.made"], decoded, atol=1e-5, rtol=0)
        assert decoded.std() > 0 and stored.double().std() > 0
        assert list(stored.shape[1:]) == about["encode"]["output"]["shape"][1:] == about["decode"]["input"]["shape"][1:]
    assert json.loads((tmp_path / "export.json").read_text()) == about


def small(system: str) -> SpeechTokenizer:
    """A speech system with few layers, whose codes vary."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(system, SMALL[system][0]).eval()
    with torch.no_grad():
        for name, parameter in tokenizer.named_parameters():
            if name.endswith("original0") or name.endswith("bias"):
                parameter.mul_(2)
    return tokenizer


def clips(tokenizer: SpeechTokenizer, shortest: int) -> dict[str, torch.Tensor]:
    """Noise of several batch sizes and lengths in whole frames: the shortest, and others than the export was traced with."""
    return {
        f"{n}x{frames}": torch.rand(n, 1, frames * tokenizer.hop, generator=torch.Generator().manual_seed(n)) * 1.8 - 0.9
        for n, frames in ((1, shortest), (2, 50), (3, 131))
    }


@pytest.mark.parametrize("system", [pytest.param("dm_codec", marks=pytest.mark.slow), "lm_spt"])      # LSTMs trace slowly
def test_speech_of_any_length_without_this_package(system, tmp_path):
    tokenizer, shortest = small(system), SMALL[system][1]
    about = export_tokenizer(tokenizer, tmp_path)
    assert about["shortest_frames"] == shortest and about["seconds"] is None and json.loads(
        (tmp_path / "export.json").read_text()) == about
    assert about["encode"]["input"]["shape"] == ["batch", 1, "samples"] == about["decode"]["output"]["shape"]
    inputs = clips(tokenizer, shortest)
    save_file(inputs, tmp_path / "inputs.safetensors")
    subprocess.run([sys.executable, "-I", "-c", ALONE, tmp_path], check=True, timeout=300)
    outputs = load_file(tmp_path / "outputs.safetensors")
    for name, audio in inputs.items():
        codes, decoded = expected(tokenizer, audio)
        assert torch.equal(outputs[f"{name}.stored"], codes) and (codes.shape[2] < 20 or len(codes.unique()) > 5)
        assert torch.allclose(outputs[f"{name}.made"], decoded, atol=1e-5, rtol=0) and decoded.std() > 0
    assert not tokenizer.fused      # left as it was


@pytest.mark.slow
@pytest.mark.parametrize("system", SMALL)
def test_speech_as_onnx(system, tmp_path):
    onnxruntime = needed("onnxruntime")
    needed("onnxscript")
    tokenizer, shortest = small(system), SMALL[system][1]
    about = export_tokenizer(tokenizer, tmp_path, onnx=True)
    for name, audio in clips(tokenizer, shortest).items():
        codes, decoded = expected(tokenizer, audio)
        for part, given, wanted in (("encode", audio, codes), ("decode", codes, decoded)):
            file = tmp_path / about[part]["files"]["onnx"]
            session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
            made = session.run([about[part]["output"]["name"]], {about[part]["input"]["name"]: given.numpy()})[0]
            assert torch.allclose(torch.from_numpy(made).double(), wanted.double(), atol=1e-4, rtol=0), (part, name)


def test_speech_of_a_fixed_length(tmp_path):
    class Fixed(SpeechTokenizer):      # knows one length alone
        system, sample_rate, hop, codebooks, codebook_size = "fixed", 100, 10, 1, 4

        def __init__(self):
            super().__init__(object())
            self.weight = nn.Parameter(torch.ones(1))

        def encode(self, audio, lengths=None):
            frames = audio.unfold(2, 10, 10).mean(-1) * self.weight * torch.ones(int(audio.shape[2]) // 10)
            return SpeechEncoding((frames > 0).long())

        def decode(self, codes, lengths=None):
            return (codes.float() * self.weight).repeat_interleave(10, 2)

    with pytest.raises(TokenizersLabError, match=r"fixed: torch\.export cannot express encode: .*\(seconds\) may work"):
        export_tokenizer(Fixed(), tmp_path)
    about = export_tokenizer(Fixed(), tmp_path, seconds=0.55)
    assert about["seconds"] == 0.6 and about["encode"]["input"]["shape"] == ["batch", 1, 60]
    audio = torch.rand(4, 1, 60) - 0.5
    assert torch.equal(torch.export.load(tmp_path / "encode.pt2").module()(audio), Fixed().encode(audio).codes)
    with pytest.raises(InputError, match="above 0"):
        export_tokenizer(Fixed(), tmp_path, seconds=0)


def needed(module: str):
    """An optional package; CI must have it."""
    if os.environ.get("CI") == "true" and importlib.util.find_spec(module) is None:
        pytest.fail(f"{module} is not installed (pip install '.[dev]')")
    return pytest.importorskip(module)


@pytest.mark.parametrize("system", [s for s in IMAGE_SYSTEMS if s not in NO_ONNX])
def test_onnx(system, tmp_path):
    onnxruntime = needed("onnxruntime")
    needed("onnxscript")
    tokenizer = tiny(system)
    about = export_tokenizer(tokenizer, tmp_path, onnx=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1

    def run(part: str, given: torch.Tensor) -> torch.Tensor:
        session = onnxruntime.InferenceSession(str(tmp_path / about[part]["files"]["onnx"]), options, ["CPUExecutionProvider"])
        assert session.get_inputs()[0].shape == about[part]["input"]["shape"]
        return torch.from_numpy(session.run([about[part]["output"]["name"]], {about[part]["input"]["name"]: given.numpy()})[0])

    for n in BATCHES:
        images = torch.rand(n, *about["encode"]["input"]["shape"][1:])
        stored, decoded = expected(tokenizer, images)
        assert torch.allclose(run("encode", images).double(), stored.double(), atol=1e-4, rtol=0)
        if not about["decode"]["stochastic"]:
            assert torch.allclose(run("decode", stored), decoded, atol=1e-4, rtol=0)


class Toy(ImageTokenizer):
    """Pixels as latents: one weight for encoding, one for decoding, and some that nothing uses."""

    system, downsample = "toy", 1

    def __init__(self):
        super().__init__(object())
        self.up, self.down = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(0.5))
        self.unused = nn.Parameter(torch.zeros(1_000_000))

    def encode(self, images, sample=False, generator=None):
        self.check_images(images)
        return ImageEncoding(latents=images * self.up)

    def decode(self, latents, generator=None):
        return latents * self.down


def test_file_has_only_what_it_runs(tmp_path):
    tokenizer = Toy().train()
    export_tokenizer(tokenizer, tmp_path, size=8)
    for part, weight in (("encode", "tokenizer.up"), ("decode", "tokenizer.down")):
        file = tmp_path / f"{part}.pt2"
        assert list(torch.export.load(file).state_dict) == [weight] and file.stat().st_size < 100_000
        assert os.fsencode(os.path.dirname(__file__)) not in file.read_bytes()      # no path of this machine
    assert tokenizer.training and tokenizer.up.requires_grad      # left as it was


def test_stochastic_decoder_draws_from_the_global_generator(tmp_path):
    class Noisy(Toy):
        def decode(self, latents, generator=None):
            return latents * self.down + 0.1 * torch.randn(latents.shape, generator=generator)

    tokenizer = Noisy()
    about = export_tokenizer(tokenizer, tmp_path, size=8)
    assert about["decode"]["stochastic"] and not about["encode"]["stochastic"]
    latents, program = torch.rand(3, 3, 8, 8), torch.export.load(tmp_path / "decode.pt2").module()
    torch.manual_seed(5)
    wanted = tokenizer.decode(latents)
    torch.manual_seed(5)
    made = program(latents)
    assert torch.equal(made, wanted) and not torch.equal(program(latents), made)


def test_refusals(tmp_path):
    class Branches(Toy):      # decides by values, which no graph can
        def encode(self, images, sample=False, generator=None):
            return ImageEncoding(latents=images * self.up if images.mean() > 0.4 else images)

    class FixedBatch(Toy):      # forgets that there are batches of other sizes
        def encode(self, images, sample=False, generator=None):
            return ImageEncoding(latents=images * torch.ones(int(images.shape[0]), 1, 1, 1))

    class Smell(Tokenizer):
        system = "toy-smell"

    with pytest.raises(TokenizersLabError, match=r"toy: torch\.export cannot express encode"):
        export_tokenizer(Branches(), tmp_path / "branches", size=8)
    with pytest.raises(TokenizersLabError, match="toy: "):
        export_tokenizer(FixedBatch(), tmp_path / "batch", size=8)
    with pytest.raises(InputError, match="toy-smell tokenizer cannot be exported"):
        export_tokenizer(Smell(object()), tmp_path / "smell")
    with pytest.raises(InputError, match="multiples of 8, not \\(60, 60\\)"):
        export_tokenizer(tiny("rectok"), tmp_path / "size", size=60)
    assert not list(tmp_path.glob("*/.exporting-*"))


def test_command(tmp_path, capsys):
    tokenizer = tiny("rectok")
    tokenizer.save_pretrained(tmp_path / "model")
    assert call(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--size", "32"]) == 0
    assert "images batch × 3 × 32 × 32 -> latents batch × 32 × 4 × 4" in capsys.readouterr().out
    images = torch.rand(2, 3, 32, 32)
    program = torch.export.load(tmp_path / "out" / "encode.pt2").module()
    assert torch.allclose(program(images), expected(tokenizer, images)[0], atol=1e-5)


def test_command_for_speech(tmp_path, capsys):
    tokenizer = small("lm_spt")
    tokenizer.save_pretrained(tmp_path / "model")
    assert call(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--seconds", "0.5"]) == 0
    assert "audio batch × 1 × 300 -> codes batch × 3 × 50" in capsys.readouterr().out
    audio = clips(tokenizer, 50)["1x50"]
    program = torch.export.load(tmp_path / "out" / "encode.pt2").module()
    assert torch.equal(program(audio), expected(tokenizer, audio)[0])
    assert call(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--size", "64"]) == 2
    assert "--size is for images" in capsys.readouterr().err
