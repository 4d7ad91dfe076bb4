"""Training segments of LM-SPT: the codec's and the teacher's audio, each resampled from the source on its own."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from tokenizers_lab.data.resample import resample


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
        audio = resample(clip, rate, target)[int(start * target / sample_rate) :]
        samples = int(seconds * target)
        parts.append((F.pad(audio, (0, samples - len(audio))), min(len(audio), samples)))
    return Segment(parts[0][0], parts[1][0], parts[0][1] / sample_rate)
