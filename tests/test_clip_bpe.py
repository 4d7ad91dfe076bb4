"""CLIP's byte pairs: known ids, cleaning, the end that is kept, and a list that is none."""

import gzip

import pytest
import torch

from tokenizers_lab.clip_bpe import byte_symbols, clean, clip_encoder, read_merges
from tokenizers_lab.errors import CheckpointError, ConfigError
from tokenizers_lab.text import TextConfig, build_text_tokenizer

CLIP = TextConfig("clip", vocabulary=49_408, pad=0, context=77)


def test_known_ids_framed_and_padded():
    ids, lengths = build_text_tokenizer(CLIP).encode(["a photo of a cat", "A  Photo of\na CAT ", "", None])
    assert ids.shape == (4, 77) and ids.dtype == torch.int64 and lengths.tolist() == [7, 7, 2, 2]
    assert ids[0].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407] + [0] * 70 and torch.equal(ids[0], ids[1])
    assert ids[2].tolist() == ids[3].tolist() == [49406, 49407] + [0] * 75


def test_a_long_text_keeps_its_end():
    ids, lengths = build_text_tokenizer(TextConfig("clip", vocabulary=49_408, pad=0, context=6)).encode(["cat " * 9, "a cat"])
    assert ids.tolist() == [[49406, 2368, 2368, 2368, 2368, 49407], [49406, 320, 2368, 49407, 0, 0]]
    assert lengths.tolist() == [6, 4]
    whole = build_text_tokenizer(TextConfig("clip", vocabulary=49_408, pad=0)).encode(["cat " * 99])[0]
    assert whole.shape == (1, 101)


def test_ids_that_open_clip_gives():      # its own tokenizer, run on these texts with ftfy replaced by nothing
    english, others, marks = clip_encoder()(["it's 2025 größe", "你好 🐱", "&lt;b&gt; x_y"])
    assert english == [585, 568, 273, 271, 273, 276, 709, 7255, 127, 253, 324]
    assert others == [47466, 254, 29290, 377, 22979] and marks == [283, 321, 285, 343, 318, 344]


def test_texts_are_cleaned():
    assert clean(" Don’t &amp;amp; “STOP”\t\nnow ") == "don't & \"stop\" now"


def test_every_byte_has_a_symbol_of_its_own():
    symbols = byte_symbols()
    assert len(set(symbols)) == 256 and symbols[0] == "!" and not any(symbol.isspace() for symbol in symbols)
    assert all(clip_encoder()([chr(code)])[0] for code in (0x1F431, 0xE9, 0x7E))


def test_a_list_that_is_none_is_refused(tmp_path):
    for content in (b"no archive", gzip.compress(b"#version\na b\nc d\n")):
        (tmp_path / "merges.gz").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"merges\.gz"):
            read_merges(tmp_path / "merges.gz")


@pytest.mark.parametrize(("changes", "what"), [({"vocabulary": 49_407}, "49408 rows"), ({"context": 2}, "at least 3")])
def test_wrong_configs(changes, what):
    with pytest.raises(ConfigError, match=what):
        build_text_tokenizer(TextConfig(**{**CLIP.__dict__, **changes}))
