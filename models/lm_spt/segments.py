"""A training segment of a clip in memory, as the parity set has them: cut as `data.speech` cuts files."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from tokenizers_lab.data.resample import resample
from tokenizers_lab.data.speech import span_at


@dataclass
class Segment:
    """A cut of one clip."""

    audio: Tensor          # (samples,) at the codec's rate, zeros behind a shorter clip
    teacher_audio: Tensor  # (samples,) the same seconds at the teacher's rate
    seconds: float         # length without the zeros


def cut_segment(clip: Tensor, rate: int, start: int, seconds: float, sample_rate: int, teacher_rate: int) -> Segment:
    """`seconds` of a mono clip (samples,) at `rate` Hz, from sample `start` (at `sample_rate`) on."""
    parts = []
    for target in (sample_rate, teacher_rate):
        first, samples = span_at(start, seconds, sample_rate, target)
        audio = resample(clip, rate, target)[first:]
        parts.append((F.pad(audio, (0, samples - len(audio))), min(len(audio), samples)))
    return Segment(parts[0][0], parts[1][0], parts[0][1] / sample_rate)
