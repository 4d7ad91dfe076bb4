"""Texts as ids: bytes, a real tokenizer, normalisers, padding, and what is refused."""

import pytest
import torch

from tokenizers_lab.assets import find
from tokenizers_lab.errors import ConfigError, WeightsMissing
from tokenizers_lab.text import TextConfig, build_text_tokenizer


def test_bytes_with_padding_and_without_text():
    texts = ["Hé  llo.\n", None, "你好，世界", ""]
    ids, lengths = build_text_tokenizer(TextConfig()).encode(texts)
    assert ids.dtype == lengths.dtype == torch.int64 and ids.shape == (4, 15) and lengths.tolist() == [10, 0, 15, 0]
    for row, length, text in zip(ids, lengths, texts):
        assert bytes(row[:length].tolist()).decode() == (text or "") and (row[length:] == 256).all()      # nothing normalised
    ids, lengths = build_text_tokenizer(TextConfig(pad=3)).encode([None, ""])
    assert ids.shape == (2, 0) and lengths.tolist() == [0, 0]
    assert build_text_tokenizer(TextConfig(pad=3)).encode(["ab", "c"])[0].tolist() == [[97, 98], [99, 3]]


def test_a_transformers_tokenizer():
    folder = find("minilm-l6").path
    words = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    ids, lengths = build_text_tokenizer(TextConfig(str(folder), vocabulary=30_522, pad=7)).encode(["hello world", None, "世"])
    assert lengths.tolist() == [2, 0, 1] and [words[i] for i in ids[0]] == ["hello", "world"]      # no [CLS], no [SEP]
    assert words[ids[2, 0]] == "世" and ids[2, 1] == 7 and ids[1].tolist() == [7, 7]
    long, lengths = build_text_tokenizer(TextConfig(str(folder), vocabulary=30_522, pad=0)).encode(["world " * 700])
    assert lengths.item() == 700 and long.shape == (1, 700)                                         # nothing is cut off
    with pytest.raises(ConfigError, match=r"the id 2088, but .* has 2000 rows"):
        build_text_tokenizer(TextConfig(str(folder), vocabulary=2000, pad=0)).encode(["world"])


def test_normalisers():
    def ids(name):
        found, (length,) = build_text_tokenizer(TextConfig(normaliser=name)).encode([" Ahoj, (hm) Světe! "])
        return bytes(found[0, :length].tolist()).decode()

    assert ids("none") == " Ahoj, (hm) Světe! " and ids("basic") == "ahoj světe" and ids("letters") == "a h o j s v ě t e"
    _, lengths = build_text_tokenizer(TextConfig(normaliser="basic")).encode(["(hm)"])
    assert lengths.tolist() == [0]      # nothing is left


@pytest.mark.parametrize(("options", "what"), [
    ({"normaliser": "whisper"}, "english, basic, letters, none"), ({"pad": 257}, "0 to 256"), ({"pad": -1}, "0 to 256"),
])
def test_wrong_configs(options, what):
    with pytest.raises(ConfigError, match=what):
        build_text_tokenizer(TextConfig(**options))


def test_what_is_not_here_is_missed_at_the_first_text(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_LAB_OFFLINE", "1")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    for source in (str(tmp_path / "absent"), str(tmp_path / "broken"), "nobody/nothing"):
        tokenizer = build_text_tokenizer(TextConfig(source))
        assert tokenizer.encode([None])[1].tolist() == [0]
        with pytest.raises(WeightsMissing, match="hf download") as error:
            tokenizer.encode(["a"])
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="the id 97"):
        build_text_tokenizer(TextConfig(vocabulary=90, pad=0)).encode(["a"])
