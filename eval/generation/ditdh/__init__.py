"""DiT-DH: a deep narrow transformer that makes a condition for each token, and a shallow wide head (arXiv 2510.11690)."""

from tokenizers_lab.registry import System

SYSTEM = System(
    name="ditdh",
    kind="generator",
    paper="Diffusion Transformers with Representation Autoencoders, arXiv 2510.11690",
    summary="class-conditional flow transformer with a wide head, for latents of many channels; judges RecTok and RAE",
    model_config="tokenizers_lab.eval.generation.ditdh.config:ModelConfig",
    objective_config="tokenizers_lab.eval.generation.objective:LatentObjectiveConfig",
    tokenizer="tokenizers_lab.eval.generation.ditdh.model:DiTDH",
    objective="tokenizers_lab.eval.generation.objective:LatentFlowObjective",
    convert="tokenizers_lab.eval.generation.ditdh.convert",
    parity="tokenizers_lab.eval.generation.ditdh.parity:compute",
)
