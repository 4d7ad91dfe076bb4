"""TaDiCodec's vocoder: the authors' tensors and weights, its losses and its options."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokenizers_lab.config import load_config
from tokenizers_lab.errors import CheckpointError, ConfigError
from tokenizers_lab.models.tadicodec import convert_vocoder as convert
from tokenizers_lab.models.tadicodec.parity_vocoder import build_losses, build_vocoder, vocoder_tensors
from tokenizers_lab.models.tadicodec.vocoder import VocoderLosses
from tokenizers_lab.models.tadicodec.vocoder_config import VOCODER_TERMS, VocoderObjectiveConfig, check_vocoder_objective
from tokenizers_lab.nn import vocos
from tokenizers_lab.nn.mel import MelConfig, vocoder_mel
from tokenizers_lab.nn.vocos import Vocos
from tokenizers_lab.parity import compare, read_rules, read_tensors

PARITY = Path(__file__).parents[1] / "parity" / "tadicodec"
MANIFEST = json.loads((PARITY / "official_full_manifest.json").read_text())
CONFIG = json.loads((PARITY / "config.json").read_text())
ALL = frozenset(VOCODER_TERMS)
SMALL = VocoderObjectiveConfig(
    enabled=True, mel_bands=[5, 10], mel_windows=[32, 64], periods=[2, 3], period_channels=[2, 4], spectral_ffts=[32, 64],
    spectral_channels=[2, 4])
MEL = MelConfig(bands=6, n_fft=64, hop=16, high=None)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small() -> tuple[Vocos, VocoderLosses, torch.Tensor, torch.Tensor]:
    """A vocoder, its losses, audio (2, 1, 325) and mel (2, 6, 20)."""
    torch.manual_seed(0)
    vocoder, losses = Vocos(6, 8, 16, 2, 64, 16), VocoderLosses(SMALL, 8000)
    audio = 0.3 * torch.randn(2, 1, 325)
    return vocoder, losses, audio, vocoder_mel(audio[:, 0], MEL, 8000)


# --- the authors' tensors -------------------------------------------------------------------------------------------------

def failures() -> list[str]:
    """Names of the vocoder's tensors that are not reproduced. The training's mel is compared by itself, and the rest starts from
    the authors': in one band of the loss both sounds are so close that rounding of the mel decides the sign of a gradient."""
    rules = read_rules(PARITY / "tolerance.json")
    given = read_tensors(PARITY / "io.safetensors", rules, inputs=True)
    reference = read_tensors(PARITY / "io.safetensors", rules, inputs=False)
    guided = reference["sample.guided"]
    computed = vocoder_tensors(PARITY, CONFIG, given, lambda audio: reference["vocoder_train.mel"], guided)
    computed["vocoder_train.mel"] = vocoder_mel(given["vocoder_train.wav"], MelConfig(), 24_000)
    wanted = {k: v for k, v in reference.items() if k.split(".")[0] in ("vocoder", "vocoder_train", "pipeline")}
    assert len(wanted) == 37 and set(computed) == set(wanted)
    return [name for name, value in wanted.items() if compare(name, computed[name], value, 1e-5).failed]


def test_every_tensor_of_the_authors_is_reproduced():
    assert failures() == []


def test_a_wrong_limit_of_the_magnitudes_is_found(monkeypatch):
    monkeypatch.setattr(vocos, "LOUDEST", 90.0)
    assert "vocoder.wav" in failures() and "vocoder.head_linear" not in failures()


# --- the authors' weights -------------------------------------------------------------------------------------------------

def meta(*groups: str) -> dict[str, torch.Tensor]:
    """Tensors of the released files, without values; discriminators under the names of the training's checkpoint."""
    return {(key if group == "vocoder" else f"{group}.{key}"): torch.empty(value["shape"], device="meta")
            for group in groups for key, value in MANIFEST[group].items()}


def released() -> Vocos:
    with torch.device("meta"):
        return Vocos(**convert.vocoder_sizes(MANIFEST["release_config"]["vocos"]))


def test_every_released_key_is_ours_and_the_other_way_round():
    official, vocoder = meta("vocoder"), released()
    state = convert.vocoder_from_official(official, vocoder)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in vocoder.state_dict().items()}
    back = convert.vocoder_to_official(vocoder.state_dict())
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in official.items()} and len(back) == 279
    assert sum(p.numel() for p in vocoder.parameters()) == MANIFEST["num_parameters"]["vocoder"]


def test_every_key_of_the_discriminators_is_ours_and_the_defaults_are_the_authors():
    cfg = convert.vocoder_objective(MANIFEST["release_config"])
    default = replace(VocoderObjectiveConfig(enabled=True), spectral_hops=[32, 64, 128, 256, 512],
                      spectral_windows=[128, 256, 512, 1024, 2048])
    assert cfg == default
    with torch.device("meta"):
        judges = VocoderLosses(VocoderObjectiveConfig(), 24_000).discriminators
    state = convert.discriminators_from_official(meta("period_gan", "spec_gan"), judges)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in judges.state_dict().items()} and len(state) == 180
    for ours, theirs in (("period", "period_gan"), ("spectral", "spec_gan")):
        assert sum(p.numel() for p in judges[ours].parameters()) == MANIFEST["num_parameters"][theirs]


def test_weights_go_there_and_back():
    official, vocoder = load_file(PARITY / "vocoder.safetensors"), build_vocoder(PARITY, CONFIG)
    back = convert.vocoder_to_official(vocoder.state_dict())
    assert back.keys() == official.keys() and all(torch.equal(back[k], v) for k, v in official.items() if k != convert.WINDOW)


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("backbone.convnext.29.gamma"), "misses backbone.convnext.29.gamma"),
    (lambda s: s.pop("head.istft.window"), "misses head.istft.window"),
    (lambda s: s.update({"head.more": torch.zeros(1)}), "left over head.more"),
    (lambda s: s.update({"head.out.bias": torch.zeros(1921)}), "another shape head.out.bias"),
    (lambda s: s.update({"head.istft.window": torch.hamming_window(1920)}), "another window than Hann's"),
])
def test_a_vocoder_that_does_not_fit_is_refused(change, message):
    state = meta("vocoder")
    change(state)
    with pytest.raises(CheckpointError, match=message):
        convert.vocoder_from_official(state, released())


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("spec_gan.model.disc_4.model.layer_5.bias"), "misses spec_gan.model.disc_4.model.layer_5.bias"),
    (lambda s: s.update({"period_gan.discriminators.5.output_conv.bias": torch.zeros(1)}), "left over period_gan"),
    (lambda s: s.update({"period_gan.discriminators.0.output_conv.weight_v": torch.zeros(1, 9, 3, 1)}), "another shape period"),
])
def test_discriminators_that_do_not_fit_are_refused(change, message):
    with torch.device("meta"):
        judges = VocoderLosses(VocoderObjectiveConfig(), 24_000).discriminators
    state = meta("period_gan", "spec_gan")
    change(state)
    with pytest.raises(CheckpointError, match=message):
        convert.discriminators_from_official(state, judges)


@pytest.mark.parametrize("part, option, value, message", [
    ("vocos", "padding", "center", "padding must be 'same'"), ("vocos", "dim", None, "no 'dim'"),
    ("spec_gan", "use_complex", True, "use_complex must be False"), ("spec_gan", "channels", None, "no 'channels'"),
])
def test_options_that_we_do_not_have_are_refused(part, option, value, message):
    config = json.loads(json.dumps(CONFIG))
    config[part] = {k: v for k, v in config[part].items() if k != option} | ({option: value} if value is not None else {})
    with pytest.raises(ConfigError, match=message):
        convert.vocoder_sizes(config["vocos"]) if part == "vocos" else convert.vocoder_objective(config)


def test_a_missing_file_is_named(tmp_path):
    shutil.copy(PARITY / "vocoder.safetensors", tmp_path)
    build_vocoder(tmp_path, CONFIG)
    with pytest.raises(CheckpointError, match=r"discriminators\.safetensors is missing"):
        build_losses(tmp_path, CONFIG)


# --- losses ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("active", [("mel",), ("gan", "spectral_feature_matching"), VOCODER_TERMS, ()])
def test_only_active_terms_are_computed(active):
    vocoder, losses, audio, mel = small()
    made = losses.generator_terms(vocoder, audio, mel, frozenset(active))
    whole = losses.generator_terms(vocoder, audio, mel, ALL)
    assert set(made.terms) == set(active) and set(whole.terms) == ALL
    for name, value in made.terms.items():
        torch.testing.assert_close(value, whole.terms[name])
    assert made.fake.shape == made.real.shape == (2, 1, 320)      # the last hop is not full
    assert torch.equal(made.real, audio[..., :320])


def test_the_generators_gradient_reaches_the_vocoder_and_not_the_discriminators():
    vocoder, losses, audio, mel = small()
    made = losses.generator_terms(vocoder, audio, mel, ALL)
    for term in VOCODER_TERMS:
        vocoder.zero_grad()
        made.terms[term].backward(retain_graph=True)
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vocoder.parameters()), term
    assert all(p.grad is None and p.requires_grad for p in losses.discriminators.parameters())


def test_the_discriminators_gradient_does_not_reach_the_vocoder():
    vocoder, losses, audio, mel = small()
    fake = vocoder(mel)
    made = losses.discriminator_losses(audio[..., :320], fake)
    assert set(made.terms) == {"period", "spectral"} == set(losses.discriminators)
    sum(made.terms.values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in losses.discriminators.parameters())
    assert all(p.grad is None for p in vocoder.parameters())


def test_discriminators_that_are_updated_in_between_judge_anew():
    vocoder, losses, audio, mel = small()
    before = losses.generator_terms(vocoder, audio, mel, ALL)
    seen = []

    def judge(real, fake):
        seen.append((real, fake))
        with torch.no_grad():
            losses.discriminators["spectral"].discriminators[0].conv_post.bias += 1.0

    after = losses.generator_terms(vocoder, audio, mel, ALL, judge)
    assert torch.equal(seen[0][0], after.real) and torch.equal(seen[0][1], after.fake)
    torch.testing.assert_close(after.terms["mel"], before.terms["mel"])
    torch.testing.assert_close(after.terms["feature_matching"], before.terms["feature_matching"])
    assert (after.logs["gan_spectral"] - before.logs["gan_spectral"]).abs() > 0.1
    torch.testing.assert_close(after.logs["gan_period"], before.logs["gan_period"])


def test_a_perfect_vocoder_has_no_distance():
    _, losses, audio, mel = small()
    made = losses.generator_terms(lambda _: audio.clone().requires_grad_(), audio, mel, ALL)
    assert all(made.terms[name] == 0 for name in ALL - {"gan"}) and made.terms["gan"] > 0.1


@pytest.mark.parametrize("change, message", [
    ({"mel_bands": [5]}, "equal lengths"), ({"periods": []}, "periods must be one or more"),
    ({"spectral_hops": [8]}, "spectral_hops must be empty or as long"), ({"spectral_windows": [65, 64]}, "1 to n_fft"),
    ({"spectral_kernels": [4, 3]}, "two odd numbers"), ({"spectral_channels": [2]}, "at least 2 layers"),
    ({"spectral_ffts": [2, 64]}, "at least 4 samples"), ({"period_channels": [0, 2]}, "period_channels must be"),
])
def test_sizes_that_make_no_network_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        check_vocoder_objective(replace(SMALL, **change))
    with pytest.raises(ConfigError, match=message):
        VocoderLosses(replace(SMALL, **change), 8000)


# --- recipes --------------------------------------------------------------------------------------------------------------

def test_the_recipe_is_amphions():
    cfg = load_config("tadicodec/vocos-24k")
    stage = cfg.stages[0]
    loss = CONFIG["loss"]
    assert stage.weights == {
        "mel": loss["mel_loss_weight"], "gan": loss["adv_loss_weight"], "feature_matching": loss["fm_loss_weight"],
        "spectral_feature_matching": loss["spec_fm_loss_weight"]}
    assert (stage.steps, stage.lr, stage.schedule, stage.warmup, stage.starts) == (100_000, 1e-4, "constant", 0, {})
    for optimizer in (cfg.train.optimizer, cfg.train.discriminator_optimizer):
        assert (tuple(optimizer.betas), optimizer.weight_decay, optimizer.clip) == ((0.5, 0.9), 0, 0)
    assert (cfg.train.batch_size, cfg.train.ema, cfg.data.segment_seconds, cfg.data.sample_rate) == (48, 0, 3, 24_000)
    assert cfg.objective.vocoder == VocoderObjectiveConfig(enabled=True) and not cfg.model.codec


def test_the_small_recipe_has_every_term_and_the_mel_of_the_release():
    cfg, whole = load_config("tadicodec/vocoder-24k-tiny"), load_config("tadicodec/vocos-24k")
    stage = cfg.stages[0]
    assert stage.weights == whole.stages[0].weights and set(stage.weights) == ALL
    assert set(stage.starts) == ALL - {"mel"} and max(stage.starts.values()) < stage.steps
    assert cfg.model.mel == whole.model.mel and cfg.data.train == "sample:speech"
