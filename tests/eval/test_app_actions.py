"""What the page of `toklab app` does, without a browser: results, files of `toklab encode`, one line for every wrong input."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import save_file

import tokenizers_lab
from tokenizers_lab.cli.main import call
from tokenizers_lab.errors import CheckpointError, DataError, InputError, TokenizersLabError
from tokenizers_lab.eval.app import loaded
from tokenizers_lab.eval.app.actions import (
    Limits,
    Sampling,
    choose_model,
    decode_image,
    decode_sound,
    mel_picture,
    open_encoded,
    reconstruct_image,
    reconstruct_sound,
)
from tokenizers_lab.eval.app.drawings import SMALLEST, code_chart, code_image, latent_image
from tokenizers_lab.eval.app.loaded import is_untrained, load_models, runs_in, short_titles, tiny_recipe
from tokenizers_lab.hub import build_tokenizer, load, weights_sha256
from tokenizers_lab.metrics import psnr
from tokenizers_lab.models.dm_codec.config import ModelConfig as DMConfig
from tokenizers_lab.models.rectok.config import ModelConfig as RecTokConfig
from tokenizers_lab.models.rectok.config import ViTConfig
from tokenizers_lab.models.tadicodec.config import ModelConfig as TaDiConfig
from tokenizers_lab.models.tadicodec.config import VocoderConfig
from tokenizers_lab.text import TextConfig

SAMPLES = Path(tokenizers_lab.__file__).parent / "data" / "samples"
PHOTO, CLIP = SAMPLES / "photos" / "val" / "china.jpg", SAMPLES / "speech" / "val" / "en_US_f_Allison_43.flac"
LIMITS, USUAL = Limits(), Sampling()
CONFIGS = {
    "rectok": RecTokConfig(image_size=16, patch=8, latent_channels=6, encoder=ViTConfig(48, 1, 4), decoder=ViTConfig(64, 2, 4)),
    "dm_codec": DMConfig(filters=4, width=16, codebooks=3, codebook_size=64),
    "tadicodec": TaDiConfig(width=16, encoder_layers=1, decoder_layers=2, heads=2, bits=8, norm_init="identity",
                            text=TextConfig(), steps=2, vocoder=VocoderConfig("vocos", 16, 24, 2)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Saved folders of small untrained tokenizers."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    return {name: str(build_tokenizer(name, cfg).save_pretrained(root / name)) for name, cfg in CONFIGS.items()}


@pytest.fixture(scope="module")
def models(folders) -> dict[str, loaded.LoadedModel]:
    return dict(zip(folders, load_models(list(folders.values()), "cpu")))


@pytest.fixture
def photo(models, tmp_path):
    return reconstruct_image(models["rectok"], PHOTO, PHOTO.name, 16, USUAL, LIMITS, tmp_path)


@pytest.fixture
def sound(models, tmp_path):
    return reconstruct_sound(models["dm_codec"], CLIP, CLIP.name, USUAL, LIMITS, tmp_path)


def toklab(*words: str) -> None:
    assert call([*words, "--device", "cpu"]) == 0


def tensors_of(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    encoded = open_encoded(file, file.name, LIMITS)
    return encoded.tensors, encoded.header


# --- results --------------------------------------------------------------------------------------------------------------

def test_image_is_what_the_command_line_makes(folders, photo, tmp_path):
    toklab("encode", str(PHOTO), "--model", folders["rectok"], "--out", str(tmp_path / "cli"), "--size", "16")
    ours, header = tensors_of(photo.files[0])
    theirs, wanted = tensors_of(tmp_path / "cli" / "china.safetensors")
    assert ours.keys() == theirs.keys() and torch.equal(ours["latents"], theirs["latents"])
    assert header == {**wanted, "file": "china.jpg"}, "no path of the server is in what people download"
    toklab("decode", str(photo.files[0]), "--model", folders["rectok"], "--out", str(tmp_path / "decoded"))
    with Image.open(tmp_path / "decoded" / "china.png") as theirs, Image.open(photo.files[1]) as ours:
        assert np.array_equal(np.asarray(theirs), np.asarray(ours)) and ours.size == (16, 16)


def test_image_facts_and_pictures(photo):
    with Image.open(photo.files[1]) as file:
        made = torch.from_numpy(np.array(file)).permute(2, 0, 1)[None] / 255
    small = [image.resize((16, 16), Image.Resampling.NEAREST) for image in (photo.original, photo.made)]
    original, shown = (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 for image in small)
    assert torch.equal(shown, made)
    assert photo.facts["PSNR ↑"] == f"{psnr(made, original).item():.2f} dB" and -1 < float(photo.facts["SSIM ↑"]) < 1
    assert photo.facts["latents"].startswith("6 × 2 × 2") and "0.0938 floats a pixel: 24 in all, 32 times" in photo.facts["rate"]
    assert photo.original.size == photo.made.size == (SMALLEST, SMALLEST) == photo.picture.size
    assert len(photo.picture.getcolors()) == 4, "a colour for each of the four positions"


def test_whole_image_keeps_its_size(models, tmp_path):
    Image.open(PHOTO).resize((37, 21)).save(tmp_path / "odd.png")
    result = reconstruct_image(models["rectok"], tmp_path / "odd.png", "odd.png", None, USUAL, LIMITS, tmp_path)
    with Image.open(result.files[1]) as made:
        assert made.size == (37, 21)
    assert result.facts["image"] == "37 × 21 pixels"


def test_any_crop_is_the_same_view_for_every_patch(models, tmp_path):
    """A crop that is no multiple of the patch is padded, and cut again."""
    result = reconstruct_image(models["rectok"], PHOTO, PHOTO.name, 21, USUAL, LIMITS, tmp_path)
    assert result.facts["image"] == "21 × 21 pixels, the centre of 288 × 288" and result.facts["latents"].startswith("6 × 3 × 3")
    encoded = open_encoded(result.files[0], "x.safetensors", LIMITS)
    again = decode_image(models["rectok"], encoded, USUAL, LIMITS, tmp_path)
    assert again.original is None and np.array_equal(np.asarray(again.made), np.asarray(result.made))


def test_sound_is_what_the_command_line_makes(folders, sound, tmp_path, capsys):
    toklab("encode", str(CLIP), "--model", folders["dm_codec"], "--out", str(tmp_path / "cli"))
    ours, header = tensors_of(sound.files[0])
    theirs, wanted = tensors_of(tmp_path / "cli" / f"{CLIP.stem}.safetensors")
    assert torch.equal(ours["codes"], theirs["codes"]) and ours["codes"].dtype == theirs["codes"].dtype
    assert header == {**wanted, "file": CLIP.name}
    toklab("decode", str(sound.files[0]), "--model", folders["dm_codec"], "--out", str(tmp_path / "decoded"))
    made, rate = soundfile.read(tmp_path / "decoded" / f"{CLIP.stem}.wav")
    assert np.array_equal(made, soundfile.read(sound.made)[0]) and rate == sound.audio[1]
    capsys.readouterr()
    toklab("reconstruct", str(CLIP), "--model", folders["dm_codec"], "--out", str(tmp_path / "reconstructed"))
    said = re.search(r"mel distance ([\d.]+), SI-SDR (-?[\d.]+) dB", capsys.readouterr().out)
    assert float(sound.facts["mel distance ↓"]) == pytest.approx(float(said[1]), rel=0.01)
    assert float(sound.facts["SI-SDR ↑"].split()[0]) == pytest.approx(float(said[2]), rel=0.01)


def test_sound_facts_and_pictures(models, sound, tmp_path):
    frames = math.ceil(soundfile.info(CLIP).frames / 320)
    assert sound.facts["codes"] == f"3 × {frames} (codebooks, frames), 50 frames a second"
    assert sound.facts["rate"] == "900 bit/s"      # 50 · 3 · log2 64
    assert 0 <= float(sound.facts["STOI ↑"]) < 1 and sound.picture.width > 800
    one = mel_picture((CLIP, CLIP.name), {"a": sound}, tmp_path)
    two = mel_picture((CLIP, CLIP.name), {"a": sound, "b": sound}, tmp_path)
    assert one.width == two.width and two.height - one.height == 180, "a row for each sound"


def test_dropped_codes_are_decoded(models, sound, tmp_path):
    encoded = open_encoded(sound.files[0], "mine.safetensors", LIMITS)
    everyone = list(models.values())
    model = choose_model(everyone, encoded, None, any_model=False)
    shares: list[float] = []
    made = decode_sound(model, encoded, USUAL, LIMITS, tmp_path, shares.append)
    assert model is models["dm_codec"] and torch.equal(made.audio[0], sound.audio[0]) and sum(shares) == pytest.approx(1)
    assert made.made.name == "mine-decoded.wav"


def test_diffusion_options_reach_the_decoder(models, tmp_path):
    model = models["tadicodec"]
    make = lambda sampling: reconstruct_sound(model, CLIP, CLIP.name, sampling, LIMITS, tmp_path)      # noqa: E731
    usual, steps, seed, text = (make(s) for s in (USUAL, Sampling(1), Sampling(seed=3), Sampling(text="so what")))
    assert not any(torch.equal(usual.audio[0], other.audio[0]) for other in (steps, seed, text))
    assert steps.facts["decoder"] == "steps 1, without text" and text.facts["decoder"] == "with text"
    with pytest.raises(InputError, match="steps must be 1 to 200, not 201"):
        make(Sampling(201))
    plain = reconstruct_sound(models["dm_codec"], CLIP, CLIP.name, Sampling(3, 2.0, 1, "words"), LIMITS, tmp_path)
    assert "decoder" not in plain.facts, "a decoder that does not sample is told nothing"


def test_pictures_of_codes():
    codes = torch.arange(24).reshape(2, 3, 4)
    assert code_image(codes, 64).size == (9, 3)      # two books, a line between them
    assert len(latent_image(torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))).getcolors()) == 12
    few, many = (code_chart(torch.zeros(rows, 9, dtype=torch.int64), [64] * rows, 1.0) for rows in (2, 8))
    assert few.width == many.width and few.height < many.height
    assert code_chart(torch.zeros(3, 1), [], 1.0).width == few.width      # latents without any spread


# --- wrong inputs ---------------------------------------------------------------------------------------------------------

def wav(path: Path, values: np.ndarray, rate: int = 16_000) -> Path:
    soundfile.write(path, values, rate, subtype="FLOAT")
    return path


@pytest.fixture
def wrong(tmp_path) -> dict[str, Path]:
    (tmp_path / "broken.png").write_bytes(PHOTO.read_bytes()[:100])
    (tmp_path / "cut.png").write_bytes(PHOTO.read_bytes()[:9000])
    (tmp_path / "notes.png").write_text("not an image")
    (tmp_path / "noise.wav").write_bytes(bytes(range(256)))
    (tmp_path / "nothing.wav").write_bytes(b"")
    damaged = ("broken.png", "cut.png", "notes.png", "noise.wav", "nothing.wav")
    return {name: tmp_path / name for name in damaged} | {
        "nan.wav": wav(tmp_path / "nan.wav", np.full(4000, np.nan, dtype=np.float32)),
        "empty.wav": wav(tmp_path / "empty.wav", np.zeros(0, dtype=np.float32)),
        "long.wav": wav(tmp_path / "long.wav", np.zeros(16_000 * 3, dtype=np.float32))}


@pytest.mark.parametrize("name, error, said", [
    ("broken.png", DataError, "damaged header"), ("cut.png", DataError, "truncated or damaged"),
    ("notes.png", DataError, "not an image"),
    ("noise.wav", DataError, "not a sound file"), ("nothing.wav", DataError, "an empty file"),
    ("nan.wav", DataError, "NaN or infinity"), ("empty.wav", DataError, "no samples"),
    ("long.wav", InputError, "3.0 s are more than 2 s"),
])
def test_unreadable_files_are_one_line_without_the_servers_path(models, wrong, tmp_path, name, error, said):
    limits = replace(LIMITS, seconds=2.0)
    with pytest.raises(error, match=said) as caught:
        if name.endswith("png"):
            reconstruct_image(models["rectok"], wrong[name], name, 16, USUAL, limits, tmp_path)
        else:
            reconstruct_sound(models["dm_codec"], wrong[name], name, USUAL, limits, tmp_path)
    assert isinstance(caught.value, TokenizersLabError) and "\n" not in str(caught.value)
    assert name in str(caught.value) and str(tmp_path) not in str(caught.value)


def test_loud_sounds_are_warned_of_by_name(models, tmp_path):
    loud = wav(tmp_path / "upload-1234.wav", np.full(8000, 3.0, dtype=np.float32))
    with pytest.warns(UserWarning, match=r"^mine.wav: peaks of 3 were clipped"):
        reconstruct_sound(models["dm_codec"], loud, "mine.wav", USUAL, LIMITS, tmp_path)


def test_files_of_the_other_kind(models, tmp_path):
    with pytest.raises(InputError, match=r"china.jpg is an image, but .* for speech"):
        reconstruct_sound(models["dm_codec"], PHOTO, PHOTO.name, USUAL, LIMITS, tmp_path)
    with pytest.raises(InputError, match="is a sound, but"):
        reconstruct_image(models["rectok"], CLIP, CLIP.name, 16, USUAL, LIMITS, tmp_path)
    with pytest.raises(InputError, match="holds codes or latents: drop it at"):
        reconstruct_image(models["rectok"], CLIP, "codes.safetensors", 16, USUAL, LIMITS, tmp_path)
    with pytest.raises(InputError, match="dm_codec is a tokenizer for speech"):
        reconstruct_image(models["dm_codec"], PHOTO, PHOTO.name, 16, USUAL, LIMITS, tmp_path)


@pytest.mark.parametrize("limits, size, said", [
    (Limits(megabytes=0.001), 16, "MB are more than 0.001 MB"), (Limits(pixels=1000), 16, "more than max_pixels"),
    (Limits(view=255), 16, "256 pixels are more than 255"), (Limits(view=1000), None, "82,944 pixels are more than 1,000"),
    (LIMITS, 0, "at least 1 pixel"), (LIMITS, 100_000, "more than 1,048,576"),
])
def test_limits_of_images(models, tmp_path, limits, size, said):
    with pytest.raises(TokenizersLabError, match=said):
        reconstruct_image(models["rectok"], PHOTO, PHOTO.name, size, USUAL, limits, tmp_path)
    assert not list(tmp_path.iterdir())


def changed(file: Path, target: Path, tensors=None, **header: str) -> Path:
    """A copy of an encoded file with other tensors or another header."""
    old, texts = tensors_of(file)
    save_file(tensors or old, target, metadata={**texts, **header})
    return target


def test_codes_of_another_model(models, photo, sound, tmp_path):
    everyone, rectok, codec = list(models.values()), models["rectok"], models["dm_codec"]
    foreign = open_encoded(changed(photo.files[0], tmp_path / "foreign.safetensors", model_sha256="0" * 64), "foreign", LIMITS)
    with pytest.raises(InputError, match=r"weights that are not on this page \(rectok, SHA-256 000000000000\)"):
        choose_model(everyone, foreign, None, any_model=False)
    with pytest.raises(InputError, match=r"was encoded by other weights .* choose its model, or allow another"):
        choose_model(everyone, foreign, rectok, any_model=False)
    assert choose_model(everyone, foreign, rectok, any_model=True) is rectok
    codes = open_encoded(sound.files[0], "codes", LIMITS)
    with pytest.raises(InputError, match="does not hold an image"):
        decode_image(choose_model(everyone, codes, rectok, any_model=True), codes, USUAL, LIMITS, tmp_path)
    with pytest.raises(InputError, match="does not hold codes of a sound"):
        decode_sound(codec, foreign, USUAL, LIMITS, tmp_path)


def test_damaged_latents(models, photo, tmp_path):
    target, model = tmp_path / "bad.safetensors", models["rectok"]

    def decode(tensors=None, limits=LIMITS, **header: str) -> None:
        encoded = open_encoded(changed(photo.files[0], target, tensors, **header), "bad", LIMITS)
        decode_image(model, encoded, USUAL, limits, tmp_path)

    decode()
    for header in ({"height": "17"}, {"top": "-1"}, {"left": "9"}, {"width": "0"}):
        with pytest.raises(InputError, match="do not fit its header"):
            decode(**header)
    with pytest.raises(InputError, match="its header is damaged"):
        decode(height="many")
    for latents in (torch.full((6, 2, 2), torch.nan), torch.zeros(5, 2, 2), torch.zeros(6, 2)):
        with pytest.raises(InputError):
            decode({"latents": latents})
    with pytest.raises(InputError, match="640 × 640 pixels are more than 1,000"):
        decode({"latents": torch.zeros(6, 80, 80)}, Limits(view=1000), height="640", width="640")
    target.write_bytes(b"not safetensors")
    with pytest.raises(InputError, match=r"^dropped is not a file that toklab encode wrote") as caught:
        open_encoded(target, "dropped", LIMITS)
    assert str(tmp_path) not in str(caught.value)


def test_codes_of_a_long_sound(models, sound, tmp_path):
    encoded = open_encoded(sound.files[0], "codes", LIMITS)
    with pytest.raises(InputError, match="s are more than 1 s"):
        decode_sound(models["dm_codec"], encoded, USUAL, Limits(seconds=1), tmp_path)


# --- models ---------------------------------------------------------------------------------------------------------------

def test_weights_are_described(models, folders, tmp_path):
    for name, model in models.items():
        assert model.sha256 == weights_sha256(folders[name]) and model.title == name
        assert model.warning == model.origin == loaded.RANDOM, name
    moved = load(folders["rectok"])
    with torch.no_grad():
        for value in moved.parameters():
            value.add_(0.01)
    assert not is_untrained(moved)
    moved.save_pretrained(tmp_path / "moved")
    moved.provenance = {"converted_from": "authors/release"}
    moved.save_pretrained(tmp_path / "official")
    unknown, official = load_models([str(tmp_path / "moved"), str(tmp_path / "official")], "cpu")
    assert (unknown.origin, unknown.warning) == (loaded.UNKNOWN, "")
    assert (official.origin, official.warning) == ("the authors' release authors/release", "")


def test_tiny_recipes_are_known():
    tiny = {"image_size": 64, "patch": 8, "latent_channels": 32, "encoder": {"width": 192, "depth": 2, "heads": 4},
            "decoder": {"width": 192, "depth": 3, "heads": 4}, "logvar_bias": -5.0}
    assert tiny_recipe("rectok", tiny) == "rectok/tiny" and tiny_recipe("rectok", {**tiny, "patch": 16}) is None


def test_runs_are_found(tmp_path):
    with pytest.raises(CheckpointError, match=r"no MODEL was named and .* train one \(toklab train rectok/tiny"):
        runs_in(tmp_path)


def test_titles_tell_models_apart(tmp_path):
    for name in ("a/run", "b/run", "c/other"):
        (tmp_path / name).mkdir(parents=True)
    one, two, three = (str(tmp_path / name) for name in ("a/run", "b/run", "c/other"))
    assert short_titles([one, three]) == ["run", "other"] and short_titles([one, two, three]) == [one, two, "other"]
    assert short_titles([one, one]) == [f"{one} (1)", f"{one} (2)"] and short_titles(["rectok/official"]) == ["rectok/official"]
