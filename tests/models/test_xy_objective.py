"""XY-Tokenizer's losses: which there are, what they see, where their gradients go; what stands still in stage 2."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tokenizers_lab.config import load_config
from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import ConfigError
from tokenizers_lab.models.xy_tokenizer.config import AdapterConfig, ModelConfig, QuantizerConfig, StackConfig, VocoderConfig
from tokenizers_lab.models.xy_tokenizer.model import XYTokenizer
from tokenizers_lab.models.xy_tokenizer.objective import XYTokenizerObjective
from tokenizers_lab.models.xy_tokenizer.objective_config import TERMS, DiscriminatorConfig, ObjectiveConfig, check_objective
from tokenizers_lab.teachers.listening_config import ListenerConfig
from tokenizers_lab.training.loop import train
from tokenizers_lab.training.run import Networks

STACK = {"width": 8, "layers": 1, "heads": 2, "hidden": 16}
MODEL = ModelConfig(
    bands=16, window_seconds=1.6, overlap_seconds=0.8, semantic=StackConfig(**STACK), semantic_adapter=AdapterConfig(**STACK),
    acoustic=StackConfig(**STACK), pre_adapter=AdapterConfig(**STACK), post_adapter=AdapterConfig(**STACK),
    quantizer=QuantizerConfig(codebooks=3, codebook_size=8, width=4, dead_threshold=0.0), decoder=StackConfig(**STACK),
    decoder_bands=8, vocoder=VocoderConfig(width=8, hidden=16, layers=1))
CONFIG = ObjectiveConfig(
    listener=ListenerConfig(backend="bytes", mode="trained", width=16, depth=1, heads=2, hidden=16, adapter_width=16),
    mel_bands=[5, 10], mel_windows=[64, 256],
    discriminators=DiscriminatorConfig([2], [2] * 5, 1, [16] * 7, [128], 2))
STAGE1 = ["semantic_encoder_adapter", "acoustic_encoder", "pre_rvq_adapter", "downsample", "quantizer", "post_rvq_adapter",
          "upsample", "acoustic_decoder", "vocoder", "heads"]
STAGE2 = ["upsample", "acoustic_decoder", "vocoder"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(parts=(), cfg=CONFIG):
    torch.manual_seed(0)
    tokenizer, objective = XYTokenizer(MODEL), XYTokenizerObjective(cfg, MODEL)
    Networks(tokenizer, tokenizer, objective, {}).select(list(parts))
    return tokenizer.train(), objective.train()


@pytest.fixture
def batch():
    audio = 0.5 * torch.randn(3, 1, 12_800, generator=torch.Generator().manual_seed(1)).clamp(-2, 2)
    audio[1, :, 7000:] = 0
    return SimpleNamespace(audio=audio, lengths=torch.tensor([12_800, 7000, 12_800]), texts=["one", None, "zwei"])


def losses_of(tokenizer, objective, batch, *terms):
    return objective.generator_losses(tokenizer, batch, Draw(0), frozenset(terms))


def with_gradient(module):
    """Parts whose parameters got a gradient other than 0."""
    found = {name.split(".")[0] for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    module.zero_grad()
    return found


def test_only_active_terms_are_computed(batch):
    tokenizer, objective = build()
    losses = losses_of(tokenizer, objective, batch, *TERMS)
    assert set(losses.terms) == set(TERMS) and all(t.dim() == 0 and t.isfinite() for t in losses.terms.values())
    assert losses.fake.shape == losses.real.shape == batch.audio.shape
    assert (losses.logs["asr_tokens"], losses.logs["asr_known"].item()) == (4 + 5, pytest.approx(2 / 3))
    for name in TERMS:
        assert set(losses_of(tokenizer, objective, batch, name).terms) == {name}
    assert set(objective.discriminator_losses(losses.real, losses.fake).terms) == {"mpd", "msd", "msstft"}


def test_where_gradients_go(batch):
    tokenizer, objective = build(STAGE1)
    front = {"semantic_encoder_adapter", "acoustic_encoder", "pre_rvq_adapter", "downsample", "quantizer"}
    back = {"upsample", "acoustic_decoder", "vocoder"}
    for term, parts in {"asr": front | {"post_rvq_adapter"}, "mel": front | {"post_rvq_adapter"} | back, "commitment": front,
                        "gan": front | {"post_rvq_adapter"} | back}.items():
        losses_of(tokenizer, objective, batch, term).terms[term].backward()
        assert with_gradient(tokenizer) == parts, term
        assert bool(with_gradient(objective.heads)) == (term == "asr")
        assert not with_gradient(objective.discriminators)
    assert not any(p.requires_grad for p in tokenizer.semantic_encoder.parameters())


def test_the_language_models_trained_parts_are_heads():
    _, objective = build(STAGE1)
    assert objective.provenance()["listener"].startswith("bytes model (1 layers, 16 wide) from a random start")
    assert {*objective.heads.parameters()} == {*objective.frozen["listener"].parameters()}
    frozen = XYTokenizerObjective(replace(CONFIG, listener=replace(CONFIG.listener, backend="none")), MODEL)
    assert not len(frozen.heads) and not frozen.provenance()


def test_padding_counts_for_nothing(batch):
    """What stands behind an item's end changes neither losses nor what the discriminators see."""
    tokenizer, objective = build(STAGE1)
    tokenizer.eval()
    first = losses_of(tokenizer, objective, batch, "asr", "mel")
    noisy = SimpleNamespace(**vars(batch))
    noisy.audio = batch.audio.clone()
    noisy.audio[1, :, 7000:] = 0.3
    second = losses_of(tokenizer, objective, noisy, "asr", "mel")
    for name in first.terms:
        torch.testing.assert_close(first.terms[name], second.terms[name])
    assert torch.equal(second.real[1, :, 7000:], torch.zeros(1, 5800)) and not second.fake[1, :, 7000:].any()
    noisy.audio[1, :, 6000:7000] = 0.3      # it does hear what is before the end
    assert losses_of(tokenizer, objective, noisy, "mel").terms["mel"] != first.terms["mel"]


def test_the_mel_term_is_a_mean_over_sound():
    """Silence behind a batch that is equal in both does not make the distance smaller."""
    _, objective = build()
    generator = torch.Generator().manual_seed(2)
    a, b = 0.3 * torch.randn(2, 2, 1, 6400, generator=generator)
    alone = objective.mel(a, b, torch.tensor([6400, 6400]))
    padded = objective.mel(*(torch.nn.functional.pad(x, (0, 6400)) for x in (a, b)), torch.tensor([6400, 6400]))
    assert padded.item() == pytest.approx(alone.item(), rel=0.05)


def test_in_stage_2_codes_stand_still(batch):
    for parts, still in ((STAGE1, False), (STAGE2, True)):
        tokenizer, objective = build(parts)
        losses_of(tokenizer, objective, batch, "mel")      # k-means, in stage 1
        before = {name: value.clone() for name, value in tokenizer.quantizer.state_dict().items()}
        batch.audio = batch.audio.flip(2)
        losses_of(tokenizer, objective, batch, "mel", "gan").terms["mel"].backward()
        after = tokenizer.quantizer.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in after) == still
        assert tokenizer.quantizer.training != still and not (still and tokenizer.acoustic_encoder.training)
        assert tokenizer.vocoder.training
    assert with_gradient(tokenizer) == {"upsample", "acoustic_decoder", "vocoder"}


def test_stage_2_starts_from_stage_1_by_the_name_of_its_run(tmp_path, monkeypatch):
    """Both recipes, at a size for seconds, through the loop: the second run's codes are the first one's."""
    monkeypatch.chdir(tmp_path)
    small = [f"model.{part}={{width: 8, layers: 1, heads: 2, hidden: 16}}" for part in (
        "semantic", "semantic_adapter", "acoustic", "pre_adapter", "post_adapter", "decoder")]
    small += ["model.vocoder={width: 8, hidden: 16, layers: 1}", "model.quantizer.codebook_size=8", "init_parts={}",
              "objective.mel_bands=[5]", "objective.mel_windows=[128]", "stages.0.steps=2", "data.val=null",
              "objective.listener.adapter_width=8"]
    first = train(load_config("xy_tokenizer/tiny-stage1", [*small, "train.batch_size=2"])).folder
    assert first.name == "xy_tokenizer-tiny-stage1"
    second = train(load_config("xy_tokenizer/tiny-stage2", [*small, "train.batch_size=2", "stages.0.starts={}",
                                                            "data.segment_seconds=0.64"])).folder
    one, two = (XYTokenizer.from_pretrained(folder) for folder in (first, second))
    audio = 0.3 * torch.randn(1, 1, 16_000, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    assert torch.equal(one.encode(audio).codes, two.encode(audio).codes)
    before = one.state_dict()
    changed = {name.split(".")[0] for name, value in two.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(STAGE2) and two.provenance["init_from"] == "runs/xy_tokenizer-tiny-stage1"


def test_the_recipes_are_what_is_known():
    one, two = (load_config(f"xy_tokenizer/emilia16k-stage{n}") for n in (1, 2))
    assert set(one.stages[0].weights) == {"asr", "mel", "commitment"} and one.stages[0].parts == STAGE1
    assert (one.objective.listener.source, one.objective.listener.mode) == ("Qwen/Qwen2.5-0.5B", "frozen")
    assert set(two.stages[0].weights) == {"mel", "gan", "feature_matching"} and two.stages[0].parts == STAGE2
    assert two.init_from == "runs/xy_tokenizer-emilia16k-stage1" and not two.init_parts and two.model == one.model
    assert (two.stages[0].lr, two.stages[0].discriminator_lr, two.train.batch_size) == (1e-5, 1e-4, 16)
    with torch.device("meta"):
        objective = XYTokenizerObjective(two.objective, two.model)
    assert set(objective.discriminators) == {"mpd", "msd", "msstft"} and not len(objective.heads)


@pytest.mark.parametrize("changes, message", [
    ("stages.0.weights.asr=1", "stages.0.weights.asr needs a language model"),
    ("objective.discriminators={periods: [], scales: 0, windows: []}", "stages.0.weights.feature_matching needs discriminators"),
    ("stages.0.weights.distillation=1", "xy_tokenizer has no loss 'distillation'"),
    ("stages.0.objective={mel_bands: [5]}", "cannot change 'mel_bands'; it may change nothing"),
])
def test_stages_that_cannot_be_trained_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        load_config("xy_tokenizer/tiny-stage2", [changes])


def test_impossible_options_are_refused():
    with pytest.raises(ConfigError, match="mel_bands and mel_windows must have equal lengths"):
        check_objective(replace(CONFIG, mel_bands=[5]))
    with pytest.raises(ConfigError, match=r"objective\.listener\.mode must be one of"):
        check_objective(replace(CONFIG, listener=replace(CONFIG.listener, mode="thawed")))
