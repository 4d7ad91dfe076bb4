"""Error rates: jiwer's counts to the digit, known intervals, normalisers, and a recognizer's rates of real speech."""

import json
import math
import random
from pathlib import Path

import jiwer
import pytest
import torch

import tokenizers_lab
from tokenizers_lab.data.audio import read_audio
from tokenizers_lab.errors import InputError
from tokenizers_lab.eval.asr_metrics import ErrorRate, summarise
from tokenizers_lab.eval.wer import EditCounts, character_edits, corpus_interval, count_edits, summarise_edits, word_edits
from tokenizers_lab.text_normalisers import build_normaliser, normaliser_for

SPEECH = Path(tokenizers_lab.__file__).parent / "data" / "samples" / "speech" / "val"


def spoken(name):
    row = next(row for row in map(json.loads, (SPEECH / "manifest.jsonl").read_text(encoding="utf-8").splitlines())
               if row["file"] == name)
    return read_audio(SPEECH / name)[0][0], {"key": name, **{part: row[part] for part in ("text", "speaker", "language")}}


def counts_of(output):
    return EditCounts(output.hits, output.substitutions, output.deletions, output.insertions)


def pairs_of_words():
    """Random word lists of few different words, in which several shortest alignments are the rule; and real sentences."""
    rng = random.Random(0)
    for _ in range(600):
        words = "abcdefgh"[: rng.randint(1, 8)]
        longest = rng.choice((3, 8, 20, 70))      # beyond 64 jiwer's library takes another way
        yield [" ".join(rng.choice(words) for _ in range(rng.randint(low, longest))) for low in (1, 0)]
    texts = [json.loads(line)["text"] for line in (SPEECH / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    yield from ((one, other) for one in texts for other in texts)


def test_counts_and_rates_are_jiwer_s_to_the_digit():
    everything = list(pairs_of_words())
    for reference, hypothesis in everything:
        ours, theirs = word_edits(reference, hypothesis), jiwer.process_words(reference, hypothesis)
        assert ours == counts_of(theirs), (reference, hypothesis)
        assert (ours.rate, ours.information_lost) == (theirs.wer, theirs.wil)
        assert character_edits(reference, hypothesis) == counts_of(jiwer.process_characters(reference, hypothesis))
    whole = jiwer.process_words(*map(list, zip(*everything)))
    summary = summarise_edits([word_edits(*pair) for pair in everything])
    assert (summary["value"], summary["wil"]) == (100 * whole.wer, 100 * whole.wil)
    mean = math.fsum(jiwer.wer(*pair) for pair in everything) / len(everything)
    assert summary["macro"] == pytest.approx(100 * mean, rel=1e-12)
    assert summary["macro"] != pytest.approx(summary["value"], rel=1e-3)


def test_long_texts_are_jiwer_s_too():
    rng = random.Random(1)
    one, other = ([rng.choice("abcdefgh") for _ in range(n)] for n in (1200, 1100))
    assert count_edits(one, other) == counts_of(jiwer.process_words(" ".join(one), " ".join(other)))


@pytest.mark.parametrize(("reference", "hypothesis"), [("", ""), ("", "a b"), ("a", "")])
def test_empty_texts(reference, hypothesis):
    ours, theirs = word_edits(reference, hypothesis), jiwer.process_words(reference, hypothesis)
    assert (ours.rate, ours.information_lost) == (theirs.wer, theirs.wil)


def test_a_corpus_without_references_has_no_rate():
    for counts in ([], [word_edits("", "a")]):
        with pytest.raises(InputError, match="not empty"):
            summarise_edits(counts)


def test_interval_of_the_corpus_rate():
    """Utterances of one length: that of a mean. Equal rates at any length: no width, which a mean of counts would have."""
    from tokenizers_lab.eval.bootstrap import mean_interval

    errors = [0, 1, 2, 5, 1, 0, 3, 2]
    counts = [EditCounts(hits=10 - n, substitutions=n) for n in errors]
    mean, corpus = mean_interval([n / 10 for n in errors]), corpus_interval(counts)
    assert (corpus.low, corpus.high) == pytest.approx((mean.low, mean.high), rel=1e-12)
    assert corpus_interval(counts[::-1]) == corpus
    alike = [EditCounts(hits=4 * n, substitutions=n) for n in (1, 3, 7)]
    assert (corpus_interval(alike).low, corpus_interval(alike).high) == pytest.approx((0.2, 0.2))
    assert corpus_interval(counts[:1]) is None


def test_normalisers_are_whisper_s():
    english = normaliser_for("en-GB")
    assert english is normaliser_for("en_GB") and normaliser_for(None).name == english.name == "Whisper's English"
    assert english("Mr. Smith's colour won't cost  twenty-one dollars, [noise] hmm!") == "mister smith is color will not cost $21"
    assert normaliser_for("cs").name == "Whisper's basic" and normaliser_for("cs")("Ahoj, (hm) Světe!") == "ahoj světe"
    assert normaliser_for("ja")("今日は。") == "今 日 は"
    assert build_normaliser("none")(" A,  b ") == "A, b"
    with pytest.raises(InputError, match="known: english"):
        build_normaliser("whisper")


@pytest.fixture(scope="module")
def wer():
    return ErrorRate("words", "text", "whisper-tiny.en")


def test_rates_of_real_speech(wer):
    audio, about = spoken("en_US_f_Allison_43.flac")
    found = wer(audio, audio, about)
    assert found["value"] == 0 and found["hits"] == 7 and found["reference"] == found["hypothesis"]
    assert "tiny.en" in wer.provenance and found["normaliser"] == "Whisper's English"
    cut = audio[: len(audio) // 2]
    half = wer(audio, cut, about)
    assert half["value"] > 25 and half["deletions"] >= 2
    assert half["value"] == 100 * jiwer.wer(half["reference"], half["hypothesis"])
    of_original = ErrorRate("characters", "original", "whisper-tiny.en")
    assert of_original.transcriber is wer.transcriber      # one network, and no clip heard twice
    assert of_original(audio, cut, {**about, "text": None})["value"] == of_original(audio, cut, about)["value"] > 25
    assert summarise([found, half], 0)["value"] == half["value"] / 2      # both have the same reference


def test_what_cannot_be_measured_says_why(wer):
    audio, about = spoken("en_US_f_Allison_43.flac")
    czech = wer(audio, audio, {**about, "language": "cs"})
    assert czech["value"] is None and "English only" in czech["reason"]
    assert "normalised" in wer(audio, audio, {**about, "text": "[noise]"})["reason"]
    assert wer(torch.zeros(0), torch.zeros(0), about)["value"] == 100      # nothing is heard in nothing
