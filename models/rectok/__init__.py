"""RecTok: reconstruction distillation along rectified flow (arXiv 2512.13421)."""

from tokenizers_lab.registry import System

SYSTEM = System(
    name="rectok",
    kind="image",
    paper="RecTok: Reconstruction Distillation along Rectified Flow, arXiv 2512.13421",
    summary="ViT autoencoder whose noised latents stay semantic; 128-channel Gaussian latent at 1/16",
    model_config="tokenizers_lab.models.rectok.config:ModelConfig",
    objective_config="tokenizers_lab.models.rectok.config:ObjectiveConfig",
    tokenizer="tokenizers_lab.models.rectok.model:RecTok",
    objective="tokenizers_lab.models.rectok.objective:RecTokObjective",
    convert="tokenizers_lab.models.rectok.convert",
    parity="tokenizers_lab.models.rectok.parity:compute",
)
