"""Recognizers: the real Whisper reads held-out clips, each as if alone; other networks by folder; wrong inputs."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2ForCTC, WhisperFeatureExtractor

import tokenizers_lab
from tokenizers_lab.errors import ConfigError, InputError, WeightsMissing
from tokenizers_lab.eval.wer import EditCounts, word_edits
from tokenizers_lab.nn.mel import whisper_log_mel
from tokenizers_lab.teachers import asr as asr_module
from tokenizers_lab.teachers.asr import CTCASR, WINDOW, build_asr, split_windows

VAL = Path(tokenizers_lab.__file__).parent / "data" / "samples" / "speech" / "val"


def sounds(language: str, number: int) -> tuple[list[torch.Tensor], list[str]]:
    """The first held-out clips of a language, (samples,) at 16 kHz, and their transcripts."""
    rows = [json.loads(line) for line in (VAL / "manifest.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["language"] == language][:number]
    clips = [torch.from_numpy(soundfile.read(VAL / row["file"], dtype="float32")[0]) for row in rows]
    return clips, [row["text"] for row in rows]


def words(text: str) -> str:
    """Lower case, letters and spaces only."""
    return "".join(c for c in text.lower() if c.isalpha() or c.isspace())


def word_error_rate(texts: list[str], heard: list[str]) -> float:
    """Errors for each word of the transcripts, over all clips."""
    return sum((word_edits(words(text), words(said)) for text, said in zip(texts, heard)), EditCounts()).rate


@pytest.fixture(scope="module")
def tiny():
    torch.set_num_threads(1)
    return build_asr("whisper-tiny.en")


def test_whisper_reads_held_out_clips_each_as_if_alone(tiny):
    clips, texts = sounds("en", 6)
    heard = tiny.transcribe(clips)
    assert word_error_rate(texts, heard) < 0.1
    assert all(text == text.strip() and "<|" not in text for text in heard)
    assert tiny.transcribe([clips[4]]) == [heard[4]]                 # beside others, shorter and longer, or alone
    assert "SHA-256 1a5afae06a4d" in tiny.provenance and tiny.sample_rate == 16_000
    assert tiny.transcribe([]) == [] and tiny.transcribe([clips[0][:0]]) == [""]
    for wrong in (clips[0][None], torch.zeros(800, dtype=torch.int64), torch.full((800,), float("nan"))):
        with pytest.raises(InputError, match=r"clip 1 must be finite float \(samples,\)"):
            tiny.transcribe([clips[0], wrong])


def test_noise_is_not_read_as_the_text(tiny):
    """The rate of errors is no constant: a clip under loud noise is not understood."""
    clips, texts = sounds("en", 1)
    noise = torch.randn(len(clips[0]), generator=torch.Generator().manual_seed(0))
    assert word_error_rate(texts, tiny.transcribe([noise * 0.3 + clips[0] * 0.01])) > 0.5


def test_what_whisper_is_given_is_what_transformers_gives():
    clip = sounds("en", 1)[0][0]
    expected = WhisperFeatureExtractor()(clip.numpy(), sampling_rate=16_000, return_tensors="np")["input_features"]
    np.testing.assert_allclose(whisper_log_mel(clip[None], 80, WINDOW).numpy(), expected, atol=2e-4)


def test_long_clips_are_cut_at_quiet_places():
    clips, _ = sounds("en", 3)
    gap = torch.zeros(8_000)
    long = torch.cat([torch.cat([clip, gap]) for clip in (clips * 6)])[: WINDOW + 100_000]
    pieces = split_windows(long)
    assert torch.equal(torch.cat(pieces), long) and all(len(piece) <= WINDOW for piece in pieces) and len(pieces) == 2
    border = len(pieces[0])
    assert border >= WINDOW - 80_000 and not long[border - 800 : border + 800].any()        # within a gap
    assert len(split_windows(long[:WINDOW])) == 1


def test_texts_of_windows_are_joined_in_order():
    class Counting(asr_module.ASR):
        def __init__(self):
            super().__init__("none", batch=2)
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def hear(self, windows):
            return [f" {len(window)} " for window in windows]

    first, long, last = torch.ones(500), torch.ones(WINDOW + 1_000), torch.ones(700)
    cut = WINDOW - 80_000 + 800                                     # all is equally loud: in the first tenth of a second
    assert Counting().transcribe([first, long, last]) == ["500", f"{cut} {WINDOW + 1_000 - cut}", "700"]


def test_whisper_hears_a_text_through_windows(tiny, monkeypatch):
    """Two clips that are cut apart again are read as the two clips."""
    clips, texts = sounds("en", 2)
    monkeypatch.setattr(asr_module, "WINDOW", len(clips[0]) + 4_000)
    monkeypatch.setattr(asr_module, "SEARCH", 8_000)
    monkeypatch.setattr(asr_module, "whisper_log_mel", lambda audio, bands, _: whisper_log_mel(audio, bands, WINDOW))
    joined = torch.cat([clips[0], torch.zeros(8_000), clips[1]])
    heard = tiny.transcribe([joined])
    assert word_error_rate([" ".join(texts)], heard) < 0.15


def test_languages(tiny):
    from tokenizers_lab.teachers.asr import WhisperASR
    from tokenizers_lab.teachers.whisper import Whisper

    whole = Whisper(tiny.network, tiny.tokenizer, tiny.provenance)
    assert WhisperASR(whole, "en").options == {}
    with pytest.raises(ConfigError, match="English only, not 'nl': take whisper-base"):
        WhisperASR(whole, "nl")


@pytest.mark.slow
def test_whisper_base_reads_languages():
    torch.set_num_threads(1)
    french, texts = sounds("fr", 2)
    asr = build_asr("whisper-base", language="fr")
    assert word_error_rate(texts, asr.transcribe(french)) < 0.5
    english, texts = sounds("en", 2)
    asr = build_asr("whisper-base")                                  # the language of each clip is detected
    heard = asr.transcribe([*english, french[0]])
    assert word_error_rate(texts, heard[:2]) < 0.1
    assert asr.transcribe(english[1:]) + asr.transcribe(french[:1]) == heard[1:]
    with pytest.raises(ConfigError, match="no language 'xx'"):
        build_asr("whisper-base", language="xx")


def test_ctc_networks_by_folder(tmp_path):
    torch.manual_seed(0)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5, "B": 6, "C": 7}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json")).save_pretrained(tmp_path)
    config = Wav2Vec2Config(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, conv_dim=(8,) * 7)
    Wav2Vec2ForCTC(config).save_pretrained(tmp_path)
    asr = build_asr(str(tmp_path))
    assert isinstance(asr, CTCASR) and str(tmp_path) in asr.provenance
    clips = [torch.randn(length) * 0.1 for length in (16_000, 9_000, 16_000)]
    assert asr.transcribe(clips) == [asr.transcribe([clip])[0] for clip in clips] == [
        asr.recognizer.transcribe(clip[None])[0] for clip in clips]
    assert asr.transcribe(torch.stack(clips[::2])) == asr.transcribe(clips)[::2]
    with pytest.raises(ConfigError, match="one language"):
        build_asr(str(tmp_path), language="en")


def test_a_saved_whisper_reads_as_the_one_that_was_saved(tiny, tmp_path):
    from transformers import PreTrainedTokenizerFast

    tiny.network.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tiny.tokenizer).save_pretrained(tmp_path)
    clips, _ = sounds("en", 1)
    assert build_asr(str(tmp_path)).transcribe(clips) == tiny.transcribe(clips)


def test_what_is_no_recognizer_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_LAB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"no recognizer 'whisper-tiny': use whisper-tiny\.en"):
        build_asr("whisper-tiny")
    with pytest.raises(WeightsMissing, match="hf download"):
        build_asr("openai/whisper-of-nobody")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    with pytest.raises(ConfigError, match="neither a Whisper nor"):
        build_asr(str(tmp_path))
