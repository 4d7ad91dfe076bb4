"""TaDiCodec: text-aware diffusion speech tokenizer (arXiv 2508.16790)."""

from tokenizers_lab.registry import System

SYSTEM = System(
    name="tadicodec",
    kind="speech",
    paper="TaDiCodec: Text-aware Diffusion Speech Tokenizer for Speech Language Modeling, arXiv 2508.16790",
    summary="binary spherical codes at 6.25 Hz (24 kHz, 87.5 bit/s), a mel flow transformer that also reads the text, a vocoder",
    model_config="tokenizers_lab.models.tadicodec.config:ModelConfig",
    objective_config="tokenizers_lab.models.tadicodec.config:ObjectiveConfig",
    tokenizer="tokenizers_lab.models.tadicodec.model:TaDiCodec",
    objective="tokenizers_lab.models.tadicodec.objective:TaDiCodecObjective",
    convert="tokenizers_lab.models.tadicodec.convert",
    parity="tokenizers_lab.models.tadicodec.parity:compute",
)
