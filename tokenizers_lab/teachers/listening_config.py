"""Options of the language model that listens to a codec."""

from dataclasses import dataclass, field

from tokenizers_lab.errors import ConfigError
from tokenizers_lab.text_normalisers import NORMALISERS

BACKENDS, MODES = ("transformers", "bytes", "none"), ("frozen", "trained", "lora")


@dataclass
class ListenerConfig:
    """A causal language model that takes features of a codec as prefix and says the transcript."""

    backend: str = "transformers"     # transformers; bytes: a small Qwen2 of the sizes below over UTF-8; none: there is none
    source: str = "Qwen/Qwen2.5-0.5B" # transformers: hub id or local folder of the model and its tokenizer
    mode: str = "frozen"              # frozen: gradients go through it; trained; lora: low-rank adapters are (extra `lora`)
    prompt: str = ""                  # text between the sound and the transcript
    normaliser: str = "none"          # of transcripts: none, english, basic, letters (docs/evaluation.md)
    stack: int = 1                    # code frames that become one position of the language model
    adapter_width: int = 2048         # hidden channels of the input adapter: norm, linear, GELU, linear
    lora_rank: int = 8                # lora: rank
    lora_alpha: float = 16.0          # lora: scale · rank
    lora_targets: list[str] = field(default_factory=list)   # lora: names of linear layers; empty: peft's choice for the model
    width: int = 128                  # bytes: channels
    depth: int = 2                    # bytes: layers
    heads: int = 4                    # bytes: attention heads
    hidden: int = 512                 # bytes: channels inside the feed-forward network


def check_listener(cfg: ListenerConfig, where: str) -> None:
    """Raise ConfigError on an unknown choice or an impossible combination."""
    for name, known in (("backend", BACKENDS), ("mode", MODES), ("normaliser", NORMALISERS)):
        if getattr(cfg, name) not in known:
            raise ConfigError(f"{where}.{name} must be one of {', '.join(known)}; not '{getattr(cfg, name)}'")
    for name in ("stack", "adapter_width", "lora_rank", "width", "depth", "heads", "hidden"):
        if getattr(cfg, name) < 1:
            raise ConfigError(f"{where}.{name} must be at least 1, not {getattr(cfg, name)}")
    if cfg.backend == "bytes" and cfg.mode != "trained":
        raise ConfigError(f"{where}.mode must be trained: the bytes model starts at random, and {cfg.mode} teaches nothing")
    if cfg.backend == "bytes" and (cfg.width % cfg.heads or cfg.width // cfg.heads % 2):
        raise ConfigError(f"{where}.width {cfg.width} must be a multiple of 2 · {where}.heads, {cfg.heads}")
