"""UniFlow: a pretrained vision transformer tuned under self-distillation, with a pixel flow decoder (arXiv 2510.10575)."""

from tokenizers_lab.registry import System

SYSTEM = System(
    name="uniflow",
    kind="image",
    paper="UniFlow: A Unified Pixel Flow Tokenizer for Visual Understanding and Generation, arXiv 2510.10575",
    summary="pretrained ViT kept semantic by self-distillation; 64 channels at 1/14; patch-wise pixel flow decoder",
    model_config="tokenizers_lab.models.uniflow.config:ModelConfig",
    objective_config="tokenizers_lab.models.uniflow.config:ObjectiveConfig",
    tokenizer="tokenizers_lab.models.uniflow.model:UniFlow",
    objective="tokenizers_lab.models.uniflow.objective:UniFlowObjective",
    convert="tokenizers_lab.models.uniflow.convert",
    parity="tokenizers_lab.models.uniflow.parity:compute",
)
