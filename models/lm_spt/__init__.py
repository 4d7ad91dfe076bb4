"""LM-SPT: semantic distillation by resynthesis for speech tokenization (arXiv 2506.16738)."""

from tokenizers_lab.registry import System

SYSTEM = System(
    name="lm_spt",
    kind="speech",
    paper="LM-SPT: LM-Aligned Semantic Distillation for Speech Tokenization, arXiv 2506.16738",
    summary="24 kHz codec at 25, 12.5 or 6.25 Hz; one semantic codebook that an ASR encoder understands, 7 acoustic",
    model_config="tokenizers_lab.models.lm_spt.config:ModelConfig",
    objective_config="tokenizers_lab.models.lm_spt.config:ObjectiveConfig",
    tokenizer="tokenizers_lab.models.lm_spt.model:LMSPT",
    objective="tokenizers_lab.models.lm_spt.objective:LMSPTObjective",
    convert="tokenizers_lab.models.lm_spt.convert",
    parity="tokenizers_lab.models.lm_spt.parity:compute",
)
