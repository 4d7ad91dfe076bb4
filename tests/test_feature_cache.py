"""Teachers' features on disk: what is refused, what training reads, and the command that makes them."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tokenizers_lab.cli.main import call
from tokenizers_lab.config import load_config
from tokenizers_lab.data.loader import build_loader, fixed_crops, sample_path
from tokenizers_lab.errors import ConfigError, DataError
from tokenizers_lab.models.dm_codec.objective import DMCodecObjective
from tokenizers_lab.models.dm_codec.parity_teachers import language_teacher, recognizer_of, speech_teacher
from tokenizers_lab.settings import SpeechDataConfig
from tokenizers_lab.teachers.cache import Crop, FeatureSource, check_sources, make_features, network_sha256, open_features
from tokenizers_lab.training.run import build_objective

CLIPS = 5
PARITY = Path(__file__).parent / "parity" / "dm_codec"
CROP = Crop("a/b.flac", 320, 1600, 16_000, "a text")
AUDIO = torch.sin(torch.arange(1500) * 0.05)[None] * torch.linspace(0.1, 0.9, 1500)


@pytest.fixture
def clips(tmp_path) -> Path:
    """A folder with a few sample clips and their manifest; the last one has no text."""
    source, folder = sample_path("speech", "train"), tmp_path / "clips"
    folder.mkdir()
    rows = [json.loads(line) for line in (source / "manifest.jsonl").read_text().splitlines()[:CLIPS]]
    del rows[-1]["text"]
    for row in rows:
        shutil.copy(source / row["file"], folder)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def data(clips: Path, **options) -> SpeechDataConfig:
    return SpeechDataConfig(**{"train": str(clips), "segment_seconds": 1.0, "crop": "fixed", "workers": 0} | options)


def toy_folder(path: Path, clips: Path | None = None, name: str = "sm"):
    """A folder of one teacher; with clips, filled with the mean of each hop of 320 samples."""
    options = {"crop": "fixed", "segment_seconds": 1.0, "sample_rate": 16_000, "channels": 1}
    folder = make_features(path, {name: FeatureSource({"source": "toy", "layer": 1}, [nn.Linear(2, 2)])}, options)[name]
    for batch in fixed_crops(data(clips), 2) if clips else ():
        for i, key in enumerate(batch.keys):
            crop = Crop(key, int(batch.starts[i]), batch.audio.shape[2], 16_000, batch.texts[i])
            folder.write(crop, batch.audio[i, :, : batch.lengths[i]], toy_feature(batch.audio)[i])
    return folder


def toy_feature(audio: torch.Tensor) -> torch.Tensor:
    return audio.view(len(audio), -1, 320).mean(2, keepdim=True)


def test_what_is_written_is_read_and_nothing_else(tmp_path):
    folder, features = toy_folder(tmp_path), torch.randn(5, 3)
    with pytest.raises(DataError, match=r"no features 'sm' of a/b.flac from sample 320 on .* run `toklab features`"):
        folder.read(CROP, AUDIO)
    assert folder.whole(CROP, AUDIO) is False
    folder.write(CROP, AUDIO, features)
    assert torch.equal(folder.read(CROP, AUDIO), features) and folder.whole(CROP, AUDIO) is True
    for change in ({"start": 321}, {"samples": 1601}, {"text": "another"}, {"text": None}, {"key": "b.flac"}, {"rate": 8000}):
        assert folder.whole(replace(CROP, **change), AUDIO) is False
    assert torch.equal(folder.read(CROP, AUDIO * 1.001), features)      # as another decoder would have it
    with pytest.raises(DataError, match="another sound"):
        folder.read(CROP, AUDIO.flip(1))
    folder.write(CROP, AUDIO, features.half())
    torch.testing.assert_close(folder.read(CROP, AUDIO), features, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damage_is_noticed(tmp_path, damage):
    folder = toy_folder(tmp_path)
    folder.write(CROP, AUDIO, torch.randn(5, 3))
    content = bytearray(folder.file(CROP).read_bytes())
    content[-1] ^= 1
    folder.file(CROP).write_bytes({"cut": bytes(content[:-4]), "flipped": bytes(content), "empty": b""}[damage])
    with pytest.raises(DataError, match="are damaged"):
        folder.read(CROP, AUDIO)
    assert folder.whole(CROP, AUDIO) is None


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    folder = toy_folder(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DataError, match=r"cannot be written .*No space"):
        folder.write(CROP, AUDIO, torch.randn(5, 3))
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["features.json"]


def test_other_weights_settings_or_names_are_other_features(tmp_path):
    torch.manual_seed(0)
    networks = [nn.BatchNorm1d(3), nn.BatchNorm1d(3)]
    networks[1].running_mean += 1e-6
    assert network_sha256(networks[0]) != network_sha256(networks[1])      # buffers count
    sources = [{"sm": FeatureSource({"source": "a", "layer": layer}, [network])} for layer in (1, 2) for network in networks]
    assert len({make_features(tmp_path, source, {})["sm"].path for source in sources}) == 4
    check_sources(tmp_path, sources[-1])
    check_sources(tmp_path, {"sm": FeatureSource({"source": "a", "layer": 2})})      # no network built
    for wrong, text in ((sources[0], "made with layer 2, the config has 1"), (sources[2], "other weights"), (
            {"lm": FeatureSource({})}, "holds no features 'lm'")):
        with pytest.raises(ConfigError, match=text):
            check_sources(tmp_path, wrong)
    with pytest.raises(ConfigError, match="holds no features; make them by `toklab features"):
        open_features(tmp_path / "nowhere", {})


@pytest.mark.parametrize("workers", [0, 1])
def test_training_reads_the_features_of_its_segments(tmp_path, clips, workers):
    toy_folder(tmp_path / "features", clips)
    loader = build_loader(data(clips, features=str(tmp_path / "features"), workers=workers), 3, seed=0)
    for _ in range(3):
        batch, _ = next(loader)
        assert batch.features["sm"].shape == (3, 50, 1)
        torch.testing.assert_close(batch.features["sm"], toy_feature(batch.audio))
    loader.close()
    batch, _ = next(build_loader(data(clips), 3, seed=0))
    assert batch.features == {}


def test_missing_features_end_the_run_and_are_no_bad_clip(tmp_path, clips):
    folder = toy_folder(tmp_path / "features", clips)
    for file in folder.path.rglob("*.safetensors"):
        file.unlink()
    loader = build_loader(data(clips, features=str(tmp_path / "features"), bad_fraction=1.0), 3, seed=0)
    with pytest.raises(DataError, match="run `toklab features` with this config"):
        next(loader)


def test_features_of_other_segments_are_refused(tmp_path, clips):
    toy_folder(tmp_path / "features", clips)
    for options, text in (
        ({"crop": "random"}, "set data.crop=fixed"), ({"segment_seconds": 2.0}, "data.segment_seconds=1.0, not 2.0"),
        ({"crop": "start"}, "data.crop=fixed, not start"),
    ):
        with pytest.raises(ConfigError, match=text):
            build_loader(data(clips, features=str(tmp_path / "features"), **options), 3, seed=0)


@pytest.fixture
def recipe(tmp_path, clips) -> list[str]:
    """The tiny recipe with the parity set's small teachers, saved as people's folders are."""
    config, overrides = json.loads((PARITY / "config.json").read_text()), []
    builders = {"speech_teacher": speech_teacher, "language_teacher": language_teacher, "recognizer": recognizer_of}
    for option, build in builders.items():
        teacher, folder = build(PARITY, config), tmp_path / option
        teacher.network.save_pretrained(folder)
        if hasattr(teacher, "tokenizer"):
            teacher.tokenizer.save_pretrained(folder)
        overrides += [f"objective.{option}.backend=transformers", f"objective.{option}.source={folder}"]
    return ["dm_codec/tiny", *overrides, "objective.teacher_width=16", f"data.train={clips}", "data.crop=fixed",
            "data.segment_seconds=1.0"]


def test_the_command_makes_what_training_would_compute(tmp_path, recipe, capsys):
    out = tmp_path / "features"
    assert call(["features", *recipe, "--out", str(out), "--batch-size", "2"]) == 0
    said = capsys.readouterr().out
    assert f"{CLIPS} clips computed, 0 were there" in said and f"data.features={out}" in said
    cfg = load_config(recipe[0], recipe[1:])
    objective = DMCodecObjective(cfg.objective, cfg.model)
    live, _ = next(build_loader(cfg.data, 8, seed=0))
    cached, _ = next(build_loader(replace(cfg.data, features=str(out)), 8, seed=0))
    assert live.keys == cached.keys and set(cached.features) == {"sm", "lm"}
    assert None in live.texts and None not in live.texts[: live.texts.index(None)]      # known and recognized texts
    for name, frames in (("sm", 49), ("lm", 50)):      # HuBERT has a frame less than the codec
        assert cached.features[name].shape == (8, frames, 16)
        torch.testing.assert_close(cached.features[name], objective.target(name, live, 50), atol=1e-5, rtol=1e-5)
    assert [json.loads(line)["file"] for line in (out / "transcripts.jsonl").read_text().splitlines()] == [
        live.keys[live.texts.index(None)]]
    check_sources(out, objective.feature_sources())


def test_the_command_goes_on_where_it_stopped_and_mends(tmp_path, recipe, capsys):
    out = tmp_path / "features"
    assert call(["features", *recipe, "--out", str(out), "--half"]) == 0
    files = sorted(out.rglob("*.safetensors"))
    before = {file: load_file(file)["features"].clone() for file in files}      # else they are views of the files
    assert {value.dtype for value in before.values()} == {torch.float16}
    files[0].unlink()                                          # of lm
    files[-1].write_bytes(files[-1].read_bytes()[:100])        # of sm
    assert call(["features", *recipe, "--out", str(out), "--half"]) == 0
    said = capsys.readouterr().out.splitlines()[-4]
    made = 1 if files[0].stem == files[-1].stem else 2
    assert said.startswith(f"{made} clips computed, {CLIPS - made} were there, 1 were damaged")
    assert sorted(out.rglob("*.safetensors")) == files
    for file in files:
        torch.testing.assert_close(load_file(file)["features"], before[file])


def test_the_command_refuses_what_it_cannot_know(tmp_path, recipe, capsys):
    for override, text in (
        ("data.crop=random", "hears another stretch each time"),
        ("objective.language_teacher.backend=none", "give its backend and source"),
    ):
        assert call(["features", *recipe, override, "--out", str(tmp_path / "f")]) == 2
        assert text in capsys.readouterr().err
    assert call(["features", "rectok/tiny"]) == 2
    assert "trains with images" in capsys.readouterr().err


def test_a_run_with_cached_features_loads_no_teacher_and_refuses_those_of_others(tmp_path, recipe, capsys):
    out = tmp_path / "features"
    assert call(["features", *recipe, "--out", str(out)]) == 0
    cfg = load_config(recipe[0], [*recipe[1:], f"data.features={out}"])
    objective = build_objective(cfg)
    assert set(objective.frozen) == {"mel"} and objective.provenance().keys() == {"teacher.sm", "teacher.lm"}
    assert all(source.endswith("(cached features)") for source in objective.provenance().values())
    cfg.objective.speech_teacher.layer = 1
    with pytest.raises(ConfigError, match="layer -1, the config has 1"):
        build_objective(cfg)
    cfg = load_config("lm_spt/tiny", [f"data.features={out}"])
    with pytest.raises(ConfigError, match="takes no cached features"):
        build_objective(cfg)
