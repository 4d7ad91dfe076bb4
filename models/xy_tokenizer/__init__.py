"""XY-Tokenizer: mitigating the semantic-acoustic conflict in low-bitrate speech codecs (arXiv 2506.23325)."""

from tokenizers_lab.registry import System

SYSTEM = System(
    name="xy_tokenizer",
    kind="speech",
    paper="XY-Tokenizer: Mitigating the Semantic-Acoustic Conflict in Low-Bitrate Speech Codecs, arXiv 2506.23325",
    summary="two Whisper-shaped encoders, 8 codebooks at 12.5 Hz (16 kHz, 1 kbit/s), trained to be understood and heard",
    model_config="tokenizers_lab.models.xy_tokenizer.config:ModelConfig",
    objective_config="tokenizers_lab.models.xy_tokenizer.objective_config:ObjectiveConfig",
    tokenizer="tokenizers_lab.models.xy_tokenizer.model:XYTokenizer",
    objective="tokenizers_lab.models.xy_tokenizer.objective:XYTokenizerObjective",
    convert="tokenizers_lab.models.xy_tokenizer.convert",
    parity="tokenizers_lab.models.xy_tokenizer.parity:compute",
)
