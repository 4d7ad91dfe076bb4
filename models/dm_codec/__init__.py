"""DM-Codec: distilling multimodal representations for speech tokenization (arXiv 2410.15017)."""

from tokenizers_lab.registry import System

SYSTEM = System(
    name="dm_codec",
    kind="speech",
    paper="DM-Codec: Distilling Multimodal Representations for Speech Tokenization, arXiv 2410.15017",
    summary="SEANet codec, 8 codebooks at 50 Hz (16 kHz, 4 kbit/s), the first led by a language and a speech model",
    model_config="tokenizers_lab.models.dm_codec.config:ModelConfig",
    objective_config="tokenizers_lab.models.dm_codec.config:ObjectiveConfig",
    tokenizer="tokenizers_lab.models.dm_codec.model:DMCodec",
    objective="tokenizers_lab.models.dm_codec.objective:DMCodecObjective",
    convert="tokenizers_lab.models.dm_codec.convert",
    parity="tokenizers_lab.models.dm_codec.parity:compute",
)
