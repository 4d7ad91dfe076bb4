"""VTP: visual tokenizer pre-training (arXiv 2512.13687)."""

from tokenizers_lab.registry import System

SYSTEM = System(
    name="vtp",
    kind="image",
    paper="Towards Scalable Pre-training of Visual Tokenizers for Generation, arXiv 2512.13687",
    summary="ViT pre-trained by contrast with texts, self-distillation and reconstruction; 64-channel latent at 1/16",
    model_config="tokenizers_lab.models.vtp.config:ModelConfig",
    objective_config="tokenizers_lab.models.vtp.objective_config:ObjectiveConfig",
    tokenizer="tokenizers_lab.models.vtp.model:VTP",
    objective="tokenizers_lab.models.vtp.objective:VTPObjective",
    convert="tokenizers_lab.models.vtp.convert",
    parity="tokenizers_lab.models.vtp.parity:compute",
)
