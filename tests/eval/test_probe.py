"""The recognizer on frozen codes: it reads what codes say, and nothing where they say nothing."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from tokenizers_lab.cli.main import call
from tokenizers_lab.data.batch import SpeechBatch
from tokenizers_lab.errors import ConfigError, DataError, InputError
from tokenizers_lab.eval.probe_asr import Alphabet, CTCProbe, Entries, ProbeSettings, Vectors, ctc_losses, probe_asr
from tokenizers_lab.eval.speech_candidates import Clip
from tokenizers_lab.tokenizer import SpeechEncoding, SpeechTokenizer

LETTERS = "abcdefgh "
SETTINGS = ProbeSettings(width=32, layers=1, frame_rate=40, dropout=0.0, lr=3e-2, epochs=14, batch_size=4, selection=6,
                         features="entries")


@dataclass
class SpellerConfig:
    """Which codes it gives."""

    scrambled: bool = False


class Speller(SpeechTokenizer):
    """Reads letters that are levels of frames of 400 samples (40 a second): codebook 0 is the letter, codebook 1 always 0."""

    system = "speller"
    sample_rate, hop, codebooks, codebook_size = 16_000, 400, 2, 9

    def __init__(self, cfg: SpellerConfig):
        super().__init__(cfg)
        self.weight = nn.Parameter(torch.zeros(1))

    def encode(self, audio, lengths=None):
        letters = ((audio[:, 0, ::400] + 1) / 2 * 8).round().long()                                       # (B, T)
        if self.cfg.scrambled:
            generator = torch.Generator().manual_seed(int(letters.sum()))
            letters = torch.randint(0, 9, letters.shape, generator=generator)
        return SpeechEncoding(codes=torch.stack([letters, torch.zeros_like(letters)], 1))


def spoken(number, seed, texts=None):
    """Batches of one clip each; each letter takes two frames."""
    generator = torch.Generator().manual_seed(seed)
    for i in range(number):
        ids = torch.randint(0, 8, (8,), generator=generator)
        ids[4] = 8
        text = "".join(LETTERS[j] for j in ids)
        audio = (ids.repeat_interleave(2).float() / 8 * 2 - 1).repeat_interleave(400)[None, None]
        yield SpeechBatch(audio, torch.tensor([audio.shape[2]]), [f"{seed}-{i}"], [text if texts is None else texts[i]],
                          [None], [None], torch.zeros(1, dtype=torch.int64))


def measured(model, **options):
    return probe_asr(model, spoken(32, 1), spoken(6, 2), SETTINGS, **options)


@pytest.fixture(scope="module")
def result():
    return measured(Speller(SpellerConfig()))


def test_codes_that_are_the_letters_are_read_without_error(result):
    metrics = result["rows"][0]["metrics"]
    assert metrics["cer"]["value"] < 3 and metrics["ctc"]["value"] < 0.15 and metrics["cer"]["reference_units"] == 6 * 8
    assert metrics["wer"]["reference_units"] == 12 and metrics["ctc"]["uncertainty"]["low"] <= metrics["ctc"]["value"]
    assert result["texts"][0] == " ".join(result["texts"][0].split()) and len(result["keys"]) == 6
    row = result["rows"][0]
    assert (row["repeat"], row["frame_rate"], row["codes_used"]) == (1, 40, [9, 1]) and len(row["curve"]) == row["epochs"] == 14
    assert row["curve"][row["epoch"] - 1]["selection"] == min(point["selection"] for point in row["curve"])


def test_codes_that_have_nothing_to_do_with_the_letters_are_not(result):
    metrics = measured(Speller(SpellerConfig(scrambled=True)))["rows"][0]["metrics"]
    assert metrics["cer"]["value"] > 60 and metrics["ctc"]["value"] > 10 * result["rows"][0]["metrics"]["ctc"]["value"]


def test_it_is_the_same_again_and_another_with_another_seed(result):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = measured(Speller(SpellerConfig()))
    assert torch.equal(before, torch.get_rng_state())
    assert again["rows"] == result["rows"]
    other = probe_asr(Speller(SpellerConfig()), spoken(32, 1), spoken(6, 2), ProbeSettings(**{**vars(SETTINGS), "seed": 1}))
    assert other["rows"][0]["curve"] != result["rows"][0]["curve"]


def test_the_untrained_network_is_a_row_of_its_own_with_margins():
    quick = ProbeSettings(**{**vars(SETTINGS), "epochs": 2})
    found = probe_asr(Speller(SpellerConfig()), spoken(12, 1), spoken(3, 2), quick, baseline=True)
    assert [row["role"] for row in found["rows"]] == ["model", "untrained"] and found["rows"][1]["weights"] == "random weights"
    assert {margin["metric"] for margin in found["margins"]} == {"ctc", "cer", "wer"}
    assert all(margin["value"] == 0 for margin in found["margins"])      # this network's codes do not depend on its weights
    json.dumps(found, allow_nan=False)


def test_clips_without_a_text_are_counted_and_what_is_in_both_parts_is_refused():
    quick = ProbeSettings(**{**vars(SETTINGS), "epochs": 1, "selection": 0})
    found = probe_asr(Speller(SpellerConfig()), spoken(3, 1, ["ab c", None, "..."]), spoken(2, 2), quick)
    assert found["protocol"]["without_text"] == {"training": 2, "held_out": 0} and found["protocol"]["training_clips"] == 1
    with pytest.raises(DataError, match="no clip has a text \\(2 have none\\)"):
        probe_asr(Speller(SpellerConfig()), spoken(2, 1, [None, ""]), spoken(2, 2), quick)
    with pytest.raises(DataError, match="2 of the held-out clips are among the training clips"):
        probe_asr(Speller(SpellerConfig()), spoken(2, 1), spoken(2, 1), quick)


def test_a_text_longer_than_its_frames_has_no_loss_and_does_no_harm():
    alphabet = Alphabet.of(["aab"])
    texts = [alphabet.encode(text) for text in ("aab", "ab", "ax")]
    scores = torch.randn(3, 3, alphabet.classes, generator=torch.Generator().manual_seed(0)).requires_grad_()
    losses = ctc_losses(scores.log_softmax(2), torch.tensor([3, 3, 3]), texts)
    assert losses.isinf().tolist() == [True, False, False]      # aab needs a blank between its a's
    losses[losses.isfinite()].sum().backward()
    assert scores.grad.isfinite().all() and not scores.grad[0].any() and texts[2][1] == alphabet.classes - 1
    paths = (scores[1].log_softmax(1)[torch.arange(3), torch.tensor(path)].sum()
             for path in ([0, 1, 2], [1, 0, 2], [1, 2, 0], [1, 1, 2], [1, 2, 2]))
    assert losses[1].item() == pytest.approx(-torch.stack(list(paths)).logsumexp(0).item() / 2, rel=1e-5)
    assert alphabet.decode(torch.tensor([1, 1, 0, 1, 2, 3])) == "aab\ufffd"


def test_a_clip_is_read_alike_alone_and_in_a_batch():
    torch.manual_seed(0)
    probe = CTCProbe(Entries([5, 5], SETTINGS.width), 2, 4, SETTINGS).eval()
    codes = torch.randint(0, 5, (2, 2, 6))
    together = probe(codes, torch.tensor([6, 4]))
    torch.testing.assert_close(together[1:, :8], probe(codes[1:, :, :4], torch.tensor([4])))
    assert not torch.allclose(together[1:, :8], probe(codes[1:, :, :5], torch.tensor([5]))[:, :8])


def test_what_cannot_be_probed_is_refused():
    with pytest.raises(ConfigError, match="--epochs must be at least 1"):
        ProbeSettings(epochs=0)

    class Latents(Speller):
        def encode(self, audio, lengths=None):
            return SpeechEncoding(latents=audio)

    from tokenizers_lab.eval.probe_asr import frames_of

    with pytest.raises(InputError, match="has latents, not codes"):
        frames_of(Latents(SpellerConfig()), Clip("x", torch.zeros(1, 800), 16_000), "entries")


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tokenizers_lab.cli.eval.load_model", lambda name, device: Speller(SpellerConfig()))
    out = tmp_path / "probe.json"
    words = ["probe", "asr", "speller", "--limit", "2", "--epochs", "1", "--width", "2", "--out", str(out), "--device", "cpu",
             "--features", "entries"]
    assert call(words) == 0
    printed = capsys.readouterr().out
    assert "2 held-out clips" in printed and "word error rate" in printed and "of 9, 1 of 9; frames repeated 2 times" in printed
    found = json.loads(out.read_text())
    assert found["protocol"]["epochs"] == 1 and found["protocol"]["data"]["held_out"]["source"] == "sample:speech/val"
    assert call(["probe", "asr", "speller", "clips"]) == 2
    assert "name them by --held-out" in capsys.readouterr().err
    assert call(["probe"]) == 2


class WithVectors(Speller):
    """Whose codebook says where in the alphabet a letter is, in sines and cosines; codebook 1 says nothing."""

    def code_vectors(self, codes):
        angles = codes[:, 0, None] * torch.tensor([0.7, 1.4, 2.8])[:, None]
        return 100 + 0.01 * torch.cat([angles.sin(), angles.cos()], 1)      # standardised by the probe


def test_the_codecs_own_vectors_are_read_too():
    settings = replace(SETTINGS, features="vectors")
    found = probe_asr(WithVectors(SpellerConfig()), spoken(32, 1), spoken(6, 2), settings)
    assert found["rows"][0]["metrics"]["cer"]["value"] < 3
    assert found["protocol"]["features"].startswith("the codec's quantized vectors") and found["rows"][0]["codes_used"] == [9, 1]
    with pytest.raises(InputError, match="does not show the vectors"):
        probe_asr(Speller(SpellerConfig()), spoken(4, 1), spoken(2, 2), settings)


def test_vectors_are_standardised():
    examples = 5 + 3 * torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    inward = Vectors(examples, 4)
    torch.nn.init.eye_(inward.linear.weight)
    torch.nn.init.zeros_(inward.linear.bias)
    given = inward(examples[None])[0]                                                                     # (T, D)
    assert given.mean(0).abs().max() < 1e-4 and (given.std(0) - 1).abs().max() < 1e-4
