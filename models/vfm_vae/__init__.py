"""VFM-VAE: a frozen vision foundation model as the encoder of a latent tokenizer (arXiv 2510.18457)."""

from tokenizers_lab.registry import System

SYSTEM = System(
    name="vfm_vae",
    kind="image",
    paper="VFM-VAE: Vision Foundation Models Can Be Good Tokenizers for Latent Diffusion Models, arXiv 2510.18457",
    summary="frozen SigLIP2 as encoder, three layers fused; 32-channel Gaussian latent at 1/16; style-modulated decoder",
    model_config="tokenizers_lab.models.vfm_vae.config:ModelConfig",
    objective_config="tokenizers_lab.models.vfm_vae.config:ObjectiveConfig",
    tokenizer="tokenizers_lab.models.vfm_vae.model:VFMVAE",
    objective="tokenizers_lab.models.vfm_vae.objective:VFMVAEObjective",
    convert="tokenizers_lab.models.vfm_vae.convert",
    parity="tokenizers_lab.models.vfm_vae.parity:compute",
)
