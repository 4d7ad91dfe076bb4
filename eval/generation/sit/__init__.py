"""SiT with or without REG's class token: the judge of VFM-VAE's latents."""

from tokenizers_lab.registry import System

SYSTEM = System(
    name="sit",
    kind="generator",
    paper="Representation Entanglement for Generation, arXiv 2507.01467, on SiT, arXiv 2401.08740",
    summary="Scalable interpolant transformer; REG denoises a vision network's class token beside the latents",
    model_config="tokenizers_lab.eval.generation.sit.config:ModelConfig",
    objective_config="tokenizers_lab.eval.generation.sit.config:ObjectiveConfig",
    tokenizer="tokenizers_lab.eval.generation.sit.model:SiT",
    objective="tokenizers_lab.eval.generation.sit.objective:SiTObjective",
    convert="tokenizers_lab.eval.generation.sit.convert",
)
