"""CLIP's byte-pair encoding (Radford et al. 2021), from the list of merges that open_clip's package carries."""

import functools
import gzip
import html
from collections.abc import Callable
from pathlib import Path

from tokenizers_lab.errors import CheckpointError

ASSET = "clip-bpe"
VOCABULARY = 49_408
START, END = VOCABULARY - 2, VOCABULARY - 1
MERGES = VOCABULARY - 2 * 256 - 2          # the file has more; CLIP takes the first
# Letters, single digits, punctuation, and English endings, each a word of its own; the same in Rust's and Python's syntax
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# CLIP mends texts by ftfy first. Of that we do what captions need often: quotation marks become straight. Broken encodings
# ("â€™") are not mended.
QUOTES = str.maketrans({"‘": "'", "’": "'", "‚": "'", "‛": "'", "“": '"', "”": '"', "„": '"', "‟": '"'})


def clean(text: str) -> str:
    """HTML's entities resolved (twice, as captions need), quotation marks straight, single spaces, lower case."""
    return " ".join(html.unescape(html.unescape(text.translate(QUOTES))).split()).lower()


def byte_symbols() -> list[str]:
    """A printable symbol for every byte, in the order of CLIP's vocabulary: printable bytes are themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]


def read_merges(file: Path) -> list[tuple[str, str]]:
    """The merges of CLIP's list, the earlier ones first. Raises CheckpointError if the file is no such list."""
    try:
        lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")[1 : MERGES + 1]
    except (OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as CLIP's list of merges: {error}") from error
    pairs = [(line.split()[0], line.split()[-1]) for line in lines if len(line.split()) == 2]
    if len(pairs) != MERGES:
        raise CheckpointError(f"{file} holds {len(pairs)} merges where CLIP's list has {MERGES}")
    return pairs


@functools.cache
def clip_encoder() -> Callable[[list[str]], list[list[int]]]:
    """A function from texts to ids, without start and end. Raises WeightsMissing if the list of merges cannot be had."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    from tokenizers_lab.assets import find

    merges = read_merges(find(ASSET).path)
    symbols = byte_symbols()
    words = symbols + [symbol + "</w>" for symbol in symbols] + ["".join(pair) for pair in merges]
    model = models.BPE({word: i for i, word in enumerate(words)}, merges, end_of_word_suffix="</w>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    return lambda texts: [found.ids for found in tokenizer.encode_batch([clean(text) for text in texts])]
