"""A causal language model that listens to a codec: it takes features as prefix and is asked for the transcript."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.errors import CheckpointError, ConfigError, InputError
from tokenizers_lab.text import TextConfig, build_text_tokenizer

from .listening_config import ListenerConfig
from .networks import local_folder, missing_teacher

BEGIN, END = 256, 257      # of the bytes model, beside the 256 bytes
NO_TARGET = -100


@dataclass
class Heard:
    """What the language model made of a batch. Items without a text count for nothing."""

    loss: Tensor              # scalar: mean cross-entropy in nats over all tokens of all known transcripts; 0 without any
    item_losses: Tensor       # (B,) the same over each item's tokens, however it is batched; 0 where no text is known
    tokens: Tensor            # (B,) int64 tokens of each transcript, its end included; 0 where no text is known


class InputAdapter(nn.Module):
    """From features to the language model's inputs: `stack` frames each, layer norm, linear, GELU, linear (its shape is ours)."""

    def __init__(self, channels: int, width: int, hidden: int, stack: int = 1):
        """channels: of the features; width: of the language model."""
        super().__init__()
        self.stack = stack
        self.layers = nn.Sequential(
            nn.LayerNorm(channels * stack), nn.Linear(channels * stack, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, ⌈T / stack⌉, width) and lengths of features (B, C, T); frames behind an item's end count as 0."""
        frames = features.shape[2]
        inside = torch.arange(frames, device=features.device) < lengths[:, None]                   # (B, T)
        x = (features * inside[:, None]).transpose(1, 2)                                            # (B, T, C)
        x = F.pad(x, (0, 0, 0, -frames % self.stack)).unflatten(1, (-1, self.stack)).flatten(2)    # (B, T / stack, stack · C)
        return self.layers(x), -(-lengths // self.stack)


class ListeningLM(nn.Module):
    """The language model behind its input adapter. Parts that train are in `trainable`; nothing else has gradients.

    An item is laid out as features, prompt, transcript, with padding behind: causal attention never looks at padding, so that an
    item's loss does not depend on the batch. Made by `build_listener`.
    """

    def __init__(self, cfg: ListenerConfig, channels: int, network: Any, text: Any, prompt: list[int], end: int, provenance: str):
        """channels: of the features; network: of transformers, with `logits_to_keep`; text: encodes transcripts to ids."""
        super().__init__()
        self.network = network.requires_grad_(cfg.mode == "trained")
        if cfg.mode == "lora":
            add_lora(network, cfg)
        self.adapter = InputAdapter(channels, network.get_input_embeddings().embedding_dim, cfg.adapter_width, cfg.stack)
        self.text, self.prompt, self.end = text, prompt, end
        self.positions = getattr(network.config, "max_position_embeddings", None)
        self.provenance = provenance
        self.eval()

    def train(self, mode: bool = True) -> "ListeningLM":
        """Always in eval mode: the model's dropout would only blur what it is asked."""
        return super().train(False)

    def trainable(self) -> nn.ModuleDict:
        """The adapter and, as the mode says, the model or its low-rank adapters: to be put among an objective's heads."""
        parts = nn.ModuleDict({"adapter": self.adapter})
        if all(p.requires_grad for p in self.network.parameters()):
            parts["model"] = self.network.base_model
            output = self.network.get_output_embeddings()
            if output.weight is not self.network.get_input_embeddings().weight:      # a tied one cannot be saved twice
                parts["output"] = output
        elif any(p.requires_grad for p in self.network.parameters()):      # peft's: of each adapted layer, two ModuleDicts
            parts["lora"] = nn.ModuleList(m for name, m in self.network.named_modules() if name.endswith(("lora_A", "lora_B")))
        return parts

    def forward(self, features: Tensor, lengths: Tensor, texts: Sequence[str | None] | None) -> Heard:
        """features: (B, C, T); lengths: (B,) frames of each; texts: None or "" where nothing is known, none: nowhere.

        Raises InputError for more positions than the model has.
        """
        batch = len(features)
        device = features.device
        prefix, prefix_lengths = self.adapter(features, lengths.to(device))
        ids, text_lengths = (x.to(device) for x in self.text.encode(texts if texts is not None else [None] * batch))
        text_lengths = torch.where(prefix_lengths + len(self.prompt) > 0, text_lengths, 0)      # nothing to say it after
        tokens = torch.where(text_lengths > 0, text_lengths + 1, 0)
        if not bool(tokens.any()):
            zero = prefix.float().sum() * 0 + features.float().sum() * 0
            return Heard(zero, zero.expand(batch), tokens)
        inputs, targets = self.lay_out(prefix, prefix_lengths, ids, text_lengths)
        first = int((targets != NO_TARGET).any(0).nonzero()[0])      # nothing is said before: no logits there
        if self.positions is not None and inputs.shape[1] > self.positions:
            raise InputError(f"sound and transcript take {inputs.shape[1]} positions, the language model has {self.positions}: "
                             "leave out long clips (data.max_seconds)")
        keep = torch.arange(first, inputs.shape[1], device=device)
        logits = self.network(inputs_embeds=inputs, use_cache=False, logits_to_keep=keep).logits           # (B, L − first, ids)
        losses = F.cross_entropy(logits.float().transpose(1, 2), targets[:, first:], ignore_index=NO_TARGET, reduction="none")
        sums = losses.sum(1)                                                                               # (B,)
        return Heard(sums.sum() / tokens.sum(), sums / tokens.clamp_min(1), tokens)

    def lay_out(self, prefix: Tensor, prefix_lengths: Tensor, ids: Tensor, text_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(inputs (B, L, D), targets (B, L)): position n of the targets is what is to be said after position n of the inputs.

        prefix: (B, T, D); ids: (B, N), padded. An unknown text has no targets.
        """
        embed, device = self.network.get_input_embeddings(), ids.device
        prompt = torch.tensor(self.prompt, dtype=torch.int64, device=device)
        rows, targets = [], []
        for frames, n, item, words in zip(prefix_lengths.tolist(), text_lengths.tolist(), prefix, ids):
            said = words[:n]
            before = torch.cat([item[:frames], embed(torch.cat([prompt, said])).to(item.dtype)])           # (T + P + N, D)
            answer = torch.full((len(before),), NO_TARGET, dtype=torch.int64, device=device)
            if n:
                answer[frames + len(prompt) - 1 :] = torch.cat([said, said.new_tensor([self.end])])
            rows.append(before)
            targets.append(answer)
        return (nn.utils.rnn.pad_sequence(rows, batch_first=True),
                nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=NO_TARGET))


def build_listener(cfg: ListenerConfig, channels: int) -> ListeningLM:
    """The listener of a config (`backend` other than none) for features of that many channels.

    Raises WeightsMissing, CheckpointError; ConfigError if peft is missing or the model has no end of text.
    """
    if cfg.mode == "lora":
        require_peft()
    if cfg.backend == "bytes":
        text = build_text_tokenizer(TextConfig(normaliser=cfg.normaliser, vocabulary=END + 1, pad=END))
        prompt = [BEGIN, *cfg.prompt.encode()]
        return ListeningLM(cfg, channels, bytes_network(cfg), text, prompt, END,
                           f"bytes model ({cfg.depth} layers, {cfg.width} wide) from a random start, trained with the codec")
    network = causal_network(cfg.source)
    end = network.config.eos_token_id
    end = end[0] if isinstance(end, list) else end
    if end is None:
        raise ConfigError(f"the language model '{cfg.source}' names no end of text (eos_token_id in its config.json)")
    size = network.get_input_embeddings().num_embeddings
    folder = str(local_folder(cfg.source))
    text = build_text_tokenizer(TextConfig(folder, cfg.normaliser, size, pad=0))
    prompt = build_text_tokenizer(TextConfig(folder, "none", size, pad=0)).encode([cfg.prompt])[0][0].tolist()
    return ListeningLM(cfg, channels, network, text, prompt, int(end), f"{cfg.source} (transformers), {cfg.mode}")


def bytes_network(cfg: ListenerConfig) -> Any:
    """A Qwen2 of the config's sizes over 256 bytes, begin and end, with random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=END + 1, hidden_size=cfg.width, intermediate_size=cfg.hidden, num_hidden_layers=cfg.depth,
        num_attention_heads=cfg.heads, num_key_value_heads=cfg.heads, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=BEGIN, eos_token_id=END, attention_dropout=0.0))


def causal_network(source: str) -> Any:
    """A causal language model by hub id or local folder, float32; code from the hub is never run. Raises WeightsMissing,
    CheckpointError."""
    from transformers import AutoModelForCausalLM

    folder = local_folder(source)
    options: dict[str, Any] = {"trust_remote_code": False, "use_safetensors": True, "dtype": torch.float32,
                               "output_loading_info": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
        network, info = loaded
    except (OSError, ValueError) as error:
        raise missing_teacher(source, error) from error
    if info["missing_keys"]:
        raise CheckpointError(f"the weights of '{source}' lack {sorted(info['missing_keys'])[0]}: not a whole language model")
    return network


def require_peft() -> Any:
    """peft. Raises ConfigError with the line that installs it."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError("a listener in mode lora needs peft: pip install 'tokenizers-lab[lora]'") from error
    return peft


def add_lora(network: Any, cfg: ListenerConfig) -> None:
    """Put low-rank adapters into the network, in place; they alone have gradients. Raises ConfigError if no layer fits."""
    peft = require_peft()
    options = peft.LoraConfig(r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, lora_dropout=0.0,
                              target_modules=list(cfg.lora_targets) or None)
    try:
        peft.inject_adapter_in_model(options, network)
    except ValueError as error:
        raise ConfigError(f"lora_targets: {str(error).splitlines()[0][:160]}") from error
