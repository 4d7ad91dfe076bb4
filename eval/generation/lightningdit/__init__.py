"""LightningDiT: a diffusion transformer of latents with rotary positions, SwiGLU and RMS norm (arXiv 2501.01423)."""

from tokenizers_lab.registry import System

SYSTEM = System(
    name="lightningdit",
    kind="generator",
    paper="Reconstruction vs. Generation: Taming Optimization Dilemma in Latent Diffusion Models, arXiv 2501.01423",
    summary="class-conditional flow transformer on a tokenizer's latents; judges VA-VAE and VTP",
    model_config="tokenizers_lab.eval.generation.lightningdit.config:ModelConfig",
    objective_config="tokenizers_lab.eval.generation.objective:LatentObjectiveConfig",
    tokenizer="tokenizers_lab.eval.generation.lightningdit.model:LightningDiT",
    objective="tokenizers_lab.eval.generation.objective:LatentFlowObjective",
    convert="tokenizers_lab.eval.generation.lightningdit.convert",
    parity="tokenizers_lab.eval.generation.lightningdit.parity:compute",
)
