"""DM-Codec: sizes, official weights, padded batches, bad input, losses and a training step."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tokenizers_lab
from tokenizers_lab import hub
from tokenizers_lab.cli import main as cli
from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import CheckpointError, ConfigError, InputError, WeightsMissing
from tokenizers_lab.models.dm_codec import convert
from tokenizers_lab.models.dm_codec.config import (
    TERMS,
    DiscriminatorConfig,
    MelConfig,
    ModelConfig,
    ObjectiveConfig,
    TeacherConfig,
    check_model,
    check_objective,
)
from tokenizers_lab.models.dm_codec.model import DMCodec
from tokenizers_lab.models.dm_codec.objective import DMCodecObjective
from tokenizers_lab.training.objective import weighted_sum

PARITY = Path(__file__).parents[1] / "parity" / "dm_codec"
MANIFEST = json.loads((PARITY / "official_full_manifest.json").read_text())
SMALL = ModelConfig(filters=4, width=16, strides=[4, 2], codebooks=3, codebook_size=16, kmeans_iterations=5)
NO_TEACHERS = TeacherConfig(backend="none")
LOSSES = ObjectiveConfig(
    teacher_width=6, speech_teacher=NO_TEACHERS, language_teacher=NO_TEACHERS, recognizer=NO_TEACHERS,
    mel=MelConfig(bands=10, n_fft=256, hop=64, window=256, weights=[45.0, 1.0]),
    discriminators=DiscriminatorConfig([2, 3], [4, 4], 2, [16, 16, 16, 16, 16, 16, 16], [128, 64], 4),
)


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    """One thread, a cache of its own, no network."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("TOKENIZERS_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TOKENIZERS_LAB_OFFLINE", "1")
    monkeypatch.delenv(hub.OFFICIAL_ENV, raising=False)
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(before)


def speech(items=3, samples=700, seed=0) -> torch.Tensor:
    """Noise of changing loudness in [−1, 1]."""
    made = torch.randn(items, 1, samples, generator=torch.Generator().manual_seed(seed))
    return (made * torch.linspace(0.05, 0.4, samples)).clamp(-1, 1)


def codec(cfg: ModelConfig = SMALL) -> DMCodec:
    """A codec whose codebooks have started on its own features, so that all entries matter."""
    torch.manual_seed(0)
    made = DMCodec(cfg).train()
    with torch.no_grad():
        made.quantizer(made.encoder(speech(8)), Draw(0))
    return made.eval()


def batch(items=3, samples=700) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(5)
    frames = -(-samples // 8) - 1
    features = {name: torch.randn(items, frames, 6, generator=generator) for name in ("sm", "lm")}
    return SimpleNamespace(audio=speech(items, samples), features=features, texts=None)


# --- official weights -----------------------------------------------------------------------------------------------------

def meta_release() -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in MANIFEST["tensors"].items()}


def test_every_released_key_is_ours_and_the_other_way_round():
    official = meta_release()
    converted = convert.from_official(official)
    assert converted.model == ModelConfig() and converted.teacher_width == 768
    back = convert.to_official(converted.tokenizer, converted.heads)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in official.items()}
    assert len(back) == 166
    configured = convert.from_official(official, MANIFEST["release_config"])
    assert configured.model == converted.model
    with torch.device("meta"):
        whole, objective = DMCodec(ModelConfig()), DMCodecObjective(ObjectiveConfig(), ModelConfig(), build_frozen=False)
    parts = {"encoder": whole.encoder, "transform": objective.heads, "quantizer": whole.quantizer, "decoder": whole.decoder}
    counted = {name: sum(p.numel() for p in module.parameters()) for name, module in parts.items()}
    assert counted == MANIFEST["parameters_by_part"]
    assert (whole.hop, whole.sample_rate, whole.codebooks, whole.codebook_size) == (320, 16_000, 8, 1024)


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("quantizer.vq.layers.7._codebook.embed"), "misses quantizer.vq.layers.7._codebook.embed"),
    (lambda s: [s.pop(k) for k in list(s) if ".vq.layers.7." in k], "misses .* and 3 more"),      # a codebook fewer is no guess
    (lambda s: s.update({"decoder.extra": torch.zeros(1)}), "left over decoder.extra"),
    (lambda s: s.update({"transform.bias": torch.zeros(767)}), "another shape transform.bias"),
])
def test_what_does_not_fit_is_refused(change, message):
    state = meta_release()
    change(state)
    with pytest.raises(CheckpointError, match=message):
        convert.from_official(state)


def test_a_trainers_checkpoint_is_accepted_and_other_things_are_not():
    nested = {"generator": meta_release(), "discriminators": {}, "best_dev_mel_loss": 1.0}
    assert convert.from_official(nested).skipped == ["discriminators", "best_dev_mel_loss"]
    for wrong in ({}, {"state": 3}, {"generator": {}}):
        with pytest.raises(CheckpointError, match="no DM-Codec checkpoint"):
            convert.from_official(wrong)
    with pytest.raises(ConfigError, match="no 'n_filters'"):
        convert.official_config({"strides": [2]})
    with pytest.raises(ConfigError, match="'Mish' is not supported"):
        convert.official_config(MANIFEST["release_config"] | {"activation": "Mish"})


def test_toklab_convert(tmp_path, capsys):
    from safetensors.torch import load_file

    torch.save({"generator": load_file(PARITY / "weights.safetensors")}, "trained.pt")
    words = ["convert", "dm_codec", "trained.pt", "out", "--heads", "--official-config", str(PARITY / "config.json")]
    assert cli.call(words) == 0
    assert "licence of the release: Apache-2.0" in capsys.readouterr().out
    loaded = tokenizers_lab.load("out")
    assert isinstance(loaded, DMCodec) and loaded.hop == 320 and loaded.codebooks == 4
    heads = load_file(tmp_path / "out" / hub.HEADS_FILE)
    back = convert.to_official(loaded.state_dict(), heads)
    assert all(torch.equal(back[k], v) for k, v in load_file(PARITY / "weights.safetensors").items())
    assert cli.call(["convert", "dm_codec", "trained.pt", "out2"]) != 0      # without their config: not the release's sizes
    with pytest.raises(WeightsMissing, match=r"download it \(links in the README"):
        tokenizers_lab.load("dm_codec/official")


# --- use ------------------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def test_padded_batches_are_each_item_alone():
    made, audio = codec(), speech(5)
    lengths = torch.tensor([700, 333, 333, 1, 5])
    for i, n in enumerate(lengths):
        audio[i, :, n:] = 0.9      # whatever lies behind the end must not matter
    encoding = made.encode(audio, lengths)
    assert encoding.lengths.tolist() == [88, 42, 42, 1, 1] and encoding.codes.shape == (5, 3, 88)
    restored, cut = made.decode(encoding.codes, encoding.lengths), made.reconstruct(audio, lengths)
    assert len(encoding.codes.unique()) > 8
    for i, n in enumerate(lengths.tolist()):
        alone = made.encode(audio[i : i + 1, :, :n])
        frames = alone.codes.shape[2]
        assert torch.equal(alone.codes[0], encoding.codes[i, :, :frames]) and not encoding.codes[i, :, frames:].any()
        single = made.decode(alone.codes)
        assert torch.allclose(single[0], restored[i, :, : frames * 8], atol=1e-6) and not restored[i, :, frames * 8 :].any()
        assert torch.allclose(cut[i, :, :n], single[0, :, :n], atol=1e-6) and not cut[i, :, n:].any()
    assert not torch.equal(made.encode(audio).codes[1, :, :42], encoding.codes[1, :, :42])      # padding taken for sound


@torch.inference_mode()
def test_fewer_codebooks_are_a_prefix():
    made, audio = codec(), speech()
    codes = made.encode(audio).codes
    assert torch.equal(made.encode(audio, codebooks=2).codes, codes[:, :2])
    assert made.decode(codes[:, :1]).shape == (3, 1, 704)
    assert made.reconstruct(audio).shape == audio.shape and made.reconstruct(audio).abs().max() <= 1


def test_bad_input_gets_its_error():
    made, good = codec(), speech()
    codes = made.encode(good).codes
    broken = good.clone()
    broken[0, 0, 3] = float("nan")
    wrong_audio = [
        (broken, "finite"), (good * 32768, "scale or clamp"), (good[:, 0], "float \\(B, 1, samples\\)"), (good.int(), "int32"),
        (good.expand(3, 2, 700), "float \\(B, 1, samples\\)"), (good[..., :0], "empty"), (good[:0], "empty"),
    ]
    for audio, message in wrong_audio:
        with pytest.raises(InputError, match=message):
            made.encode(audio)
    for lengths, message in [(torch.tensor([1, 2]), "integers \\(3,\\)"), (torch.tensor([1, 2, 701]), "1 to 700 samples"),
                             (torch.tensor([0, 2, 3]), "1 to 700"), (torch.ones(3), "float32")]:
        with pytest.raises(InputError, match=message):
            made.encode(good, lengths)
    for wrong, message in [(codes + 16, r"in \[0, 16\)"), (codes - 99, r"in \[0, 16\)"), (codes.int(), "int32"),
                           (torch.cat([codes, codes], 1), "1 to 3"), (codes[0], "int64"), (codes[..., :0], "int64")]:
        with pytest.raises(InputError, match=message):
            made.decode(wrong)
    with pytest.raises(InputError, match="frames"):
        made.decode(codes, torch.tensor([88, 88, 89]))


def test_save_and_load_give_the_same_bytes_and_codes(tmp_path):
    made = codec()
    saved = made.save_pretrained(tmp_path / "saved")
    loaded = tokenizers_lab.load(saved)
    again = loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (saved / name).read_bytes() == (again / name).read_bytes()
    assert torch.equal(loaded.encode(speech()).codes, made.encode(speech()).codes)


@pytest.mark.parametrize("options", [
    {"activation": "snake", "residual_layers": 2}, {"lstm_layers": 0}, {"bidirectional": False, "strides": [3]},
])
def test_other_networks(options):
    made = codec(replace(SMALL, **options))
    names = {convert.official_name(k) for k in made.state_dict()}
    assert len(names) == len(made.state_dict())
    assert made.reconstruct(speech()).isfinite().all()


@pytest.mark.parametrize("options, message", [
    ({"strides": []}, "strides"), ({"filters": 1}, "halves"), ({"activation": "relu"}, "elu or snake"),
    ({"codebooks": 0}, "codebooks"), ({"decay": 1.0}, "decay"),
])
def test_impossible_models(options, message):
    with pytest.raises(ConfigError, match=message):
        check_model(replace(SMALL, **options))


# --- training -------------------------------------------------------------------------------------------------------------

def objective(**options) -> DMCodecObjective:
    torch.manual_seed(1)
    return DMCodecObjective(replace(LOSSES, **options), SMALL).train()


def test_only_active_terms_are_computed_and_discriminators_get_no_gradient():
    made, losses = codec().train(), objective()
    for active in (frozenset({"mel"}), frozenset({"waveform", "gan"}), frozenset(TERMS)):
        found = losses.generator_losses(made, batch(), Draw(0), active)
        assert found.terms.keys() == active and all(v.isfinite() for v in found.terms.values())
        weighted_sum(found.terms, dict.fromkeys(active, 1.0)).backward()
    assert all(p.grad is None for p in losses.discriminators.parameters())
    assert all(p.grad is not None for p in [*made.parameters(), *losses.heads.parameters()])
    judged = losses.discriminator_losses(found.real, found.fake.detach())
    weighted_sum(judged.terms, dict.fromkeys(judged.terms, 1.0)).backward()
    assert judged.terms.keys() == {"mpd", "msd", "msstft"}
    assert all(p.grad is not None for p in losses.discriminators.parameters())
    assert {"usage", "perplexity", "dead", "distance_sm", "mel_distance"} <= found.logs.keys()


def test_texts_come_from_the_manifest_or_from_the_recognizer():
    class Parrot(torch.nn.Module):
        def transcribe(self, audio):
            return [f"heard {len(clip)}" for clip in audio]

    data = batch()
    data.texts = ["a known text", None, *["known"] * (len(data.audio) - 2)]
    heard = f"heard {data.audio.shape[2]}"
    for source, expected in (("manifest", ["a known text", heard, *data.texts[2:]]), ("recognized", [heard] * len(data.audio))):
        losses = objective(texts=source)
        with pytest.raises(ConfigError, match="name a recognizer"):
            losses.transcripts(data)
        losses.frozen["recognizer"] = Parrot()
        assert losses.transcripts(data) == expected


def test_guidance():
    made, data, terms = codec(), batch(), frozenset({"distillation"})

    def distances(**options):
        losses = objective(**options).eval()
        found = losses.generator_losses(made, data, Draw(0), terms)
        return found.terms["distillation"].item(), {k: v.item() for k, v in found.logs.items() if k.startswith("distance")}

    both, parts = distances()
    assert both == pytest.approx((parts["distance_sm"] + parts["distance_lm"]) / 2)
    one, only = distances(guidance="lm")
    assert one == parts["distance_lm"] and only == {"distance_lm": one}
    weighted, _ = distances(sm_weight=0.3, lm_weight=0.9)
    assert weighted == pytest.approx(0.3 * parts["distance_sm"] + 0.9 * parts["distance_lm"])
    assert distances(layer=1)[0] != both and distances(axis="t")[0] != both
    data.features = {"sm": data.features["sm"]}
    with pytest.raises(ConfigError, match="no features 'lm'"):
        distances()


def test_a_lock_makes_two_forwards():
    plain, locked = codec().train(), codec().train()
    data = batch()
    start = plain.quantizer.book(0).cluster_size.clone()
    objective().generator_losses(plain, data, Draw(0), frozenset({"distillation"}))
    objective(lock="sm", layer=1).generator_losses(locked, data, Draw(0), frozenset({"distillation"}))
    moved = [(c.quantizer.book(0).cluster_size - start).abs().sum() for c in (plain, locked)]
    assert moved[1] > 1.5 * moved[0]
    unlocked = objective(layer=1).eval()
    of_layer_1 = unlocked.generator_losses(codec(), data, Draw(0), frozenset({"distillation"})).logs
    of_lock = objective(lock="sm", layer=1).eval().generator_losses(codec(), data, Draw(0), frozenset({"distillation"})).logs
    assert of_lock["distance_lm"] == of_layer_1["distance_lm"] and of_lock["distance_sm"] != of_layer_1["distance_sm"]


@pytest.mark.parametrize("options, message", [
    ({"guidance": "both"}, "guidance must be one of"), ({"layer": 3}, "layer must be 0 to 2"),
    ({"guidance": "lm", "lock": "lm"}, "needs guidance=combined"), ({"axis": "x"}, "axis"),
    ({"mel": replace(LOSSES.mel, weights=[])}, "mel.weights"),
])
def test_impossible_objectives(options, message):
    with pytest.raises(ConfigError, match=message):
        check_objective(replace(LOSSES, **options), SMALL)


def test_missing_teachers_are_named():
    with pytest.raises(WeightsMissing, match="hubert-base-ls960"):
        DMCodecObjective(replace(LOSSES, speech_teacher=TeacherConfig(source="facebook/hubert-base-ls960")), SMALL)


def test_training_learns_and_is_repeatable():
    def train(steps):
        torch.manual_seed(0)
        made, losses = DMCodec(SMALL).train(), objective()
        optimizer = torch.optim.AdamW([*made.parameters(), *losses.heads.parameters()], lr=3e-3, betas=(0.9, 0.99))
        history, data = [], batch()
        for step in range(steps):
            found = losses.generator_losses(made, data, Draw(0, step=step), frozenset({"waveform", "mel", "commitment"}))
            optimizer.zero_grad()
            weighted_sum(found.terms, {"waveform": 500.0, "mel": 1.0, "commitment": 10.0}).backward()
            optimizer.step()
            history.append(found.terms["mel"].item())
        return history, made

    history, made = train(40)
    assert history[-1] < 0.7 * history[0]
    again, _ = train(5)
    assert again == history[:5]
    assert made.quantizer.book(0).started.item() == 1


def test_mixed_precision_keeps_codebooks_and_losses_in_float32():
    made, losses = codec().train(), objective()
    with torch.autocast("cpu", torch.bfloat16):
        found = losses.generator_losses(made, batch(), Draw(0), frozenset(TERMS))
    assert {v.dtype for v in found.terms.values()} == {torch.float32} and all(v.isfinite() for v in found.terms.values())
    assert {b.dtype for b in made.quantizer.buffers()} == {torch.float32}


def test_encoding_leaves_the_codec_as_it_was():
    made = codec()
    before = copy.deepcopy(made.state_dict())
    made.reconstruct(speech())
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())


def test_the_first_weights_of_convolutions_are_scaled_by_the_gain():
    made = {}
    for gain in (1.0, 1.5):
        torch.manual_seed(0)
        made[gain] = DMCodec(replace(SMALL, init_gain=gain)).encoder.model[0].conv.weight
    torch.testing.assert_close(made[1.5], 1.5 * made[1.0])
    with pytest.raises(ConfigError, match="init_gain"):
        DMCodec(replace(SMALL, init_gain=0.0))
