"""The teachers of a DM-Codec parity folder and their tensors."""

import json
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tokenizers_lab.network import load_weights, read_weights
from tokenizers_lab.teachers.language import LanguageTeacher
from tokenizers_lab.teachers.ssl import CTCRecognizer, SSLTeacher


def teacher_tensors(folder: Path, config: dict[str, Any], audio: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of the teachers on audio (B, 1, samples), and their features by our names: sm (HuBERT), lm (BERT)."""
    clips = audio[:, 0]
    speech, recognizer, language = speech_teacher(folder, config), recognizer_of(folder, config), language_teacher(folder, config)
    logits = recognizer.logits(clips)
    texts = recognizer.transcribe(clips)
    tokens = language.tokens(texts, logits.shape[1])
    cut = language.tokens([config["truncation_text"]], config["truncation_max_length"])
    targets = {"sm": speech.features(clips), "lm": language.features(texts, logits.shape[1])}
    result = {
        "teacher.hubert.input_values": speech.input_values(clips), "teacher.hubert.hidden_states": speech.hidden_states(clips),
        "teacher.hubert.avg": targets["sm"], "teacher.stt.input_values": recognizer.input_values(clips),
        "teacher.stt.logits": logits, "teacher.stt.predicted_ids": logits.argmax(-1),
        "teacher.bert.hidden_states": language.hidden_states(tokens), "teacher.bert.avg": targets["lm"],
        "teacher.bert.truncated_input_ids": cut["input_ids"],
    }
    return result | {f"teacher.bert.{name}": value for name, value in tokens.items()}, targets


def network(folder: Path, config: dict[str, Any], name: str, config_class: str, model_class: str) -> nn.Module:
    """The folder's teacher of that name as a transformers network."""
    import transformers

    options = {k: v for k, v in config["teachers"][name].items() if k != "kind"}
    built = getattr(transformers, model_class)(getattr(transformers, config_class)(**options))
    load_weights(built, read_weights(folder / f"teacher_{name}.safetensors"), f"teacher_{name}.safetensors")
    return built


def speech_teacher(folder: Path, config: dict[str, Any]) -> SSLTeacher:
    """The folder's HuBERT."""
    return SSLTeacher(network(folder, config, "hubert", "HubertConfig", "HubertModel"), provenance="parity set")


def recognizer_of(folder: Path, config: dict[str, Any]) -> CTCRecognizer:
    """The folder's wav2vec 2.0 with its vocabulary."""
    from transformers import Wav2Vec2CTCTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "vocab.json"
        file.write_text(json.dumps({word: i for i, word in enumerate(config["stt_vocab"])}))
        tokenizer = Wav2Vec2CTCTokenizer(str(file))
    return CTCRecognizer(network(folder, config, "stt", "Wav2Vec2Config", "Wav2Vec2ForCTC"), tokenizer, "parity set")


def language_teacher(folder: Path, config: dict[str, Any]) -> LanguageTeacher:
    """The folder's BERT with its vocabulary."""
    from transformers import BertTokenizer

    vocabulary = {word: i for i, word in enumerate(config["bert_vocab"])}
    tokenizer = BertTokenizer(vocab=vocabulary, do_lower_case=config.get("bert_do_lower_case", True))
    return LanguageTeacher(network(folder, config, "bert", "BertConfig", "BertModel"), tokenizer, provenance="parity set")
