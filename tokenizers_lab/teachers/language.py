"""Frozen language models whose hidden states a codec follows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenizers_lab.errors import ConfigError

from .hidden import AVERAGE, pick_layer
from .networks import local_folder, missing_teacher

LANGUAGE_ASSETS = ("mpnet-base", "minilm-l6")


class LanguageTeacher(nn.Module):
    """Features of transcripts, stretched by padding to a number of frames. `width`: their channels.

    layer: which hidden state; −1: the mean of all of them, the embeddings included.
    """

    def __init__(self, network: Any, tokenizer: Any, layer: int = AVERAGE, provenance: str = "network given by the caller"):
        """network, tokenizer: transformers' BertModel and BertTokenizer, or alike."""
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        layers = int(network.config.num_hidden_layers)
        if not AVERAGE <= layer <= layers:
            raise ConfigError(f"a language teacher's layer must be 0 to {layers}, or -1 for the mean, not {layer}")
        self.tokenizer, self.layer, self.provenance = tokenizer, layer, provenance
        self.width = int(network.config.hidden_size)
        self.eval()

    def train(self, mode: bool = True) -> "LanguageTeacher":
        """A teacher stays in eval mode."""
        return super().train(False)

    def tokens(self, texts: Sequence[str], frames: int) -> dict[str, Tensor]:
        """Token ids, mask and so on, (B, frames) int64 each: the transcripts padded or cut to exactly `frames` tokens."""
        encoded = self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=frames, return_tensors="pt")
        return dict(encoded)

    @torch.no_grad()
    def hidden_states(self, tokens: dict[str, Tensor]) -> Tensor:
        """(layers + 1, B, frames, D) of `tokens`, padding positions included: the embeddings, then each layer's output."""
        device = next(self.network.parameters()).device
        given = {name: value.to(device) for name, value in tokens.items()}
        return torch.stack(self.network(**given, output_hidden_states=True).hidden_states)

    def features(self, texts: Sequence[str], frames: int) -> Tensor:
        """(B, frames, D): token n of a transcript meets frame n of the audio, with no alignment (DM-Codec, section 3)."""
        return pick_layer(self.hidden_states(self.tokens(texts, frames)), self.layer)


def build_language_teacher(source: str, layer: int = AVERAGE) -> LanguageTeacher:
    """A teacher by hub id or local folder, or mpnet-base or minilm-l6 of the assets table, which stand in for BERT.

    Raises WeightsMissing if it is not here and cannot be fetched.
    """
    from transformers import AutoModel, AutoTokenizer

    from tokenizers_lab.assets import find

    provenance = f"{source} (transformers)"
    if source in LANGUAGE_ASSETS:
        found = find(source)
        folder, provenance = found.path, f"{source}, {found.source}; stands in for BERT"
    else:
        folder = local_folder(source)
    try:
        network, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise missing_teacher(source, error) from error
    return LanguageTeacher(network, tokenizer, layer, provenance)
