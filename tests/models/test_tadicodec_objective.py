"""TaDiCodec's losses: which terms there are, what they count, what is dropped, where their gradients go."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tokenizers_lab.config import load_config
from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import ConfigError
from tokenizers_lab.models.tadicodec.config import (
    CODEC_TERMS,
    ModelConfig,
    ObjectiveConfig,
    VocoderConfig,
    VocoderObjectiveConfig,
    check_objective,
)
from tokenizers_lab.models.tadicodec.model import TaDiCodec
from tokenizers_lab.models.tadicodec.objective import TaDiCodecObjective
from tokenizers_lab.nn.mel import MelConfig
from tokenizers_lab.settings import StageConfig
from tokenizers_lab.text import TextConfig
from tokenizers_lab.training.optim import learning_rate

RATE, HOP = 6000, 960
MODEL = ModelConfig(
    sample_rate=RATE, mel=MelConfig(bands=20, n_fft=480, hop=120, high=3000.0), width=16, encoder_layers=1, decoder_layers=1,
    heads=2, downsample=8, bits=6, text=TextConfig(), steps=2, vocoder=VocoderConfig("vocos", 8, 16, 1))
VOICE = VocoderObjectiveConfig(
    enabled=True, mel_bands=[4, 8], mel_windows=[64, 128], periods=[2, 3], period_channels=[2, 2, 2, 2, 2],
    spectral_ffts=[64, 128], spectral_channels=[2, 2, 2, 2, 2])
ALL = frozenset(CODEC_TERMS)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Chosen(Draw):
    """Draws with the coin tosses of a batch fixed: the rest is as seeded."""

    def __init__(self, **tosses):
        super().__init__(0)
        self.tosses = tosses

    def uniform(self, purpose, shape=(), low=0.0, high=1.0):
        return torch.full(shape, self.tosses[purpose]) if purpose in self.tosses else super().uniform(purpose, shape, low, high)


PROMPTED = {"context": 0.5, "condition": 0.5}      # prompt and condition kept


def build(model=MODEL, **options):
    torch.manual_seed(0)
    tokenizer = TaDiCodec(model).train()
    if model.codec:
        for part in (tokenizer.encoder, tokenizer.to_code, tokenizer.from_code, tokenizer.decoder):
            for p in part.parameters():
                nn.init.normal_(p, std=0.2)
    objective = TaDiCodecObjective(ObjectiveConfig(**options), model)
    objective.train()
    return tokenizer, objective


def speech(lengths=(6 * HOP, 4 * HOP - 50), texts=("some text", "x"), seed=1):
    generator = torch.Generator().manual_seed(seed)
    items = [0.4 * torch.rand(1, n, generator=generator) - 0.2 for n in lengths]
    audio = torch.stack([F.pad(item, (0, max(lengths) - item.shape[1])) for item in items])
    return SimpleNamespace(audio=audio, lengths=torch.tensor(lengths), texts=list(texts))


def flow_of(tokenizer, objective, batch, **tosses):
    coded = objective.code(tokenizer, batch)
    return coded, objective.flow(tokenizer, coded, batch.texts, Chosen(**(PROMPTED | tosses)))


def trained(tokenizer):
    """Parts with a gradient other than 0."""
    found = {name.split(".")[0] for name, p in tokenizer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    tokenizer.zero_grad()
    return found


def test_only_active_terms_are_computed_and_no_discriminator_is_built():
    tokenizer, objective = build()
    assert not len(objective.discriminators) and not list(objective.parameters())
    for active in (ALL, *(frozenset({name}) for name in CODEC_TERMS)):
        losses = objective.generator_losses(tokenizer, speech(), Draw(0), active)
        assert set(losses.terms) == active and all(t.dim() == 0 and t.isfinite() for t in losses.terms.values())
        assert {"usage", "perplexity", "balance"} <= losses.logs.keys() and losses.fake is None
    with pytest.raises(ConfigError, match="enabled must be true"):
        objective.generator_losses(tokenizer, speech(), Draw(0), frozenset({"mel"}))


def test_where_gradients_go():
    tokenizer, objective = build()
    coder = {"encoder", "to_code"}
    expected = {"flow": coder | {"from_code", "decoder", "text_embedding"}, "entropy": coder, "commitment": coder}
    for term, parts in expected.items():
        objective.generator_losses(tokenizer, speech(), Chosen(**PROMPTED), frozenset({term})).terms[term].backward()
        assert trained(tokenizer) == parts, term


def test_prompt_frames_stay_clean_and_carry_no_loss():
    tokenizer, objective = build()
    coded, flow = flow_of(tokenizer, objective, speech())
    assert coded.mel.shape == (2, 48, 20) and coded.lengths.tolist() == [48, 32]
    assert ((flow.prompt >= 5) & (flow.prompt < 19)).all()                     # min(48 // 4, 5) to int(0.4 · 48) − 1
    for i, (prompt, end) in enumerate(zip(flow.prompt.tolist(), (48, 32))):
        assert torch.equal(flow.x[i, :prompt], coded.mel[i, :prompt])
        assert not torch.allclose(flow.x[i, prompt], coded.mel[i, prompt], atol=1e-2)
        assert flow.counted[i].tolist() == [False] * prompt + [True] * (end - prompt) + [False] * (48 - end)
    t = flow.time[:, None, None]
    noise = (coded.mel - flow.target) / (1 - MODEL.sigma)
    behind = torch.arange(48) >= flow.prompt[:, None]
    expected = (1 - (1 - MODEL.sigma) * t) * noise + t * coded.mel
    torch.testing.assert_close(flow.x[behind], expected[behind], atol=1e-5, rtol=1e-4)
    loss = objective.codec_losses(coded, flow, frozenset({"flow"})).terms["flow"]
    torch.testing.assert_close(loss, (flow.predicted - flow.target)[flow.counted].abs().mean())


@pytest.mark.parametrize("frames", [1, 2, 4, 5, 8, 16, 50])
def test_prompt_lengths_are_the_authors(frames):
    objective = build()[1]
    low, high = min(frames // 4, 5), int(0.4 * frames)
    found = objective.prompt_lengths(400, frames, Chosen(context=0.21), torch.device("cpu"))
    expected = set(range(low, high)) if high > low else {low}      # theirs fails on so few frames
    assert set(found.tolist()) == expected
    assert not objective.prompt_lengths(400, frames, Chosen(context=0.19), torch.device("cpu")).any()


def test_what_is_dropped_is_dropped_for_the_whole_batch():
    tokenizer, objective = build(text_drop=0.1)
    batch, kept = speech(), {"text": 0.5}
    coded, flow = flow_of(tokenizer, objective, batch, **kept)
    assert torch.equal(flow.condition, coded.condition)
    coded, flow = flow_of(tokenizer, objective, batch, condition=0.19, **kept)
    assert not flow.condition.any()
    flow.predicted.sum().backward()
    assert trained(tokenizer) == {"decoder", "text_embedding"}
    _, without = flow_of(tokenizer, objective, batch, text=0.09)
    without.predicted.sum().backward()
    assert trained(tokenizer) == {"encoder", "to_code", "from_code", "decoder"}
    nobody = SimpleNamespace(**{**vars(batch), "texts": [None, None]})
    assert torch.equal(without.predicted, flow_of(tokenizer, objective, nobody, **kept)[1].predicted)
    no_prompt = flow_of(tokenizer, objective, batch, context=0.19, **kept)[1]
    assert not no_prompt.prompt.any()


def test_other_texts_and_other_codes_make_another_flow():
    tokenizer, objective = build()
    batch = speech()
    first = flow_of(tokenizer, objective, batch)[1].predicted
    batch.texts = ["some text", "yes"]
    second = flow_of(tokenizer, objective, batch)[1].predicted
    assert torch.allclose(first[0], second[0], atol=1e-6) and not torch.allclose(first[1], second[1], atol=1e-4)
    coded = objective.code(tokenizer, batch)
    coded.condition = -coded.condition
    third = objective.flow(tokenizer, coded, batch.texts, Chosen(**PROMPTED)).predicted
    assert not torch.allclose(second, third, atol=1e-3)


def test_an_item_counts_as_if_it_were_alone():
    tokenizer, objective = build()
    tokenizer.eval()
    batch = speech()
    alone = SimpleNamespace(audio=batch.audio[1:, :, : 4 * HOP - 50], lengths=batch.lengths[1:], texts=batch.texts[1:])
    both, one = (objective.code(tokenizer, b) for b in (batch, alone))
    assert torch.equal(both.quantized.codes[1:, :, :4], one.quantized.codes)
    torch.testing.assert_close(both.mel[1:, :32], one.mel)
    torch.testing.assert_close(both.condition[1:, :32], one.condition)
    encoded = tokenizer.encode(batch.audio, batch.lengths)
    assert torch.equal(encoded.codes[1, :, :4], one.quantized.codes[0])       # training sees what encode gives
    official = replace(objective.cfg, batch_as_released=True)
    objective.cfg = official
    both, one = (objective.code(tokenizer, b) for b in (batch, alone))
    assert both.lengths.tolist() == [48, 31] and not torch.allclose(both.mel[1, 30], one.mel[0, 30], atol=1e-3)


def test_padding_does_not_count_in_the_entropies():
    tokenizer, objective = build()
    batch = speech(lengths=(4 * HOP, 4 * HOP))
    longer = SimpleNamespace(**{**vars(batch), "audio": F.pad(batch.audio, (0, 2 * HOP))})
    terms = [objective.generator_losses(tokenizer, b, Draw(0), ALL).terms for b in (batch, longer)]
    for name in ("entropy", "commitment"):
        torch.testing.assert_close(terms[0][name], terms[1][name])
    objective.cfg = replace(objective.cfg, batch_as_released=True)
    official = objective.generator_losses(tokenizer, longer, Draw(0), ALL).terms
    assert not torch.allclose(official["commitment"], terms[0]["commitment"])


def test_the_flow_is_learned():
    torch.manual_seed(0)
    tokenizer = TaDiCodec(replace(MODEL, norm_init="identity")).train()
    objective = TaDiCodecObjective(ObjectiveConfig(), MODEL)
    optimizer, batch, values = torch.optim.AdamW(tokenizer.parameters(), 3e-3), speech(), []
    for step in range(60):
        terms = objective.generator_losses(tokenizer, batch, Draw(0, step=step), frozenset({"flow", "entropy"})).terms
        optimizer.zero_grad()
        (terms["flow"] + terms["entropy"]).backward()
        optimizer.step()
        values.append(terms["flow"].item())
    assert sum(values[-10:]) < 0.85 * sum(values[:10])


def test_the_vocoder_trains_alone():
    model = replace(MODEL, codec=False)
    tokenizer, objective = build(model, vocoder=VOICE)
    assert set(objective.discriminators) == {"period", "spectral"} and "mel" in objective.frozen
    saved = [k for k in objective.state_dict() if not k.startswith("frozen.")]
    assert saved and all(k.startswith("discriminators.") for k in saved)       # each weight once
    judged = []

    def judge(real, fake):
        assert real.shape == fake.shape == (2, 1, 5760)
        judged.append(objective.discriminator_losses(real, fake).terms)

    active = frozenset({"mel", "gan", "feature_matching", "spectral_feature_matching"})
    losses = objective.generator_losses(tokenizer, speech(), Draw(0), active, judge)
    assert set(losses.terms) == active and set(judged[0]) == {"period", "spectral"}
    sum(losses.terms.values()).backward()
    assert trained(tokenizer) == {"vocoder"}


@pytest.mark.parametrize(("overrides", "message"), [
    (["stages.0.weights={mel: 1}"], "kind=vocos"),
    (["stages.0.weights={mel: 1}", "model.vocoder.kind=vocos"], "enabled=true"),
    (["stages.0.weights={mel: 1}", "model.vocoder.kind=vocos", "objective.vocoder.enabled=true"], r"parts must be \[vocoder\]"),
    (["stages.0.weights={mel: 1, flow: 1}"], "two stages"),
    (["stages.0.weights={flow: 1}", "model.codec=false", "model.vocoder.kind=vocos"], "needs model.codec=true"),
    (["stages.0.weights={flaw: 1}"], "has no loss 'flaw'"),
    (["stages.0.objective={vocoder: {enabled: true}}"], "cannot change 'vocoder'"),
    (["stages.0.objective={text_drop: 2}"], "stages.0.objective.text_drop must be from 0 to 1"),
])
def test_impossible_runs_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config("tadicodec/tiny", overrides)


def test_a_probability_is_one():
    with pytest.raises(ConfigError, match="condition_drop must be from 0 to 1"):
        check_objective(ObjectiveConfig(condition_drop=-0.1))


def test_the_inverse_square_root_schedule():
    stage = StageConfig(name="train", lr=1.0, warmup=100, schedule="inverse_sqrt")
    rates = [learning_rate(stage, 1.0, done, 1000) for done in (0, 50, 100, 400, 10_000)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0.1])
