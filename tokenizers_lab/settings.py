"""The typed settings of a run. The comment behind a field is the help that `toklab config` shows."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class ImageDataConfig:
    """Images for training and validation. A source is `sample:photos`, a folder, a manifest (.jsonl, .csv, .tsv: file, text,
    label), or webdataset shards: a .tar path, a glob, a brace range (shard-{000..099}.tar) or a URL that fsspec reads."""

    train: str = MISSING             # source of the training images
    val: str | None = None           # source of the held-out images; none: no validation
    size: int = 256                  # pixels a side of the square crop
    train_size: int | None = None    # training: pixels a side, where the objective cuts crops of its own; none: size
    texts: bool = False              # give captions too, from manifests or the .txt or .json files of shards; images without
                                     # one are left out
    crop: str = "center"             # center: ADM's centre crop; random: a random square of crop_min to crop_max pixels
    crop_min: int = 0                # random crop: smallest side in pixels of the source image; 0: size
    crop_share: float = 0.0          # random crop: smallest side as a share of the short side, in place of crop_min; 0: none
    crop_filter: str = "bicubic"     # random crop: how it is scaled, bicubic or lanczos
    crop_max: int = 0                # random crop: largest side in pixels; 0: the image's short side
    flip: bool = True                # mirror half of the training images
    val_limit: int | None = None     # at most this many validation images; none: all
    samples: int | None = None       # number of training samples, needed by shards when a stage is given in epochs
    shuffle_buffer: int = 1000       # shards: samples shuffled together inside one shard
    max_pixels: int = 100_000_000    # larger images are refused by their header, before decoding
    bad_fraction: float = 0.01       # unreadable samples above this share of those seen end the run
    workers: int = 4                 # decoding processes for each rank; 0: in the training process


@dataclass
class LatentDataConfig(ImageDataConfig):
    """What a generator of latents learns from. A source is a folder of cached latents that `toklab latents` wrote, or images with
    classes as above, which `objective.tokenizer` encodes in each step. Of cached latents only `flip`, `val_limit`, `samples`,
    `shuffle_buffer`, `bad_fraction` and `workers` count."""


@dataclass
class SpeechDataConfig:
    """Speech for training and validation. A source is `sample:speech`, a folder, a manifest (.jsonl, .csv, .tsv),
    or webdataset shards as for images: a sound file and a JSON file for each clip, as Emilia has them."""

    train: str = MISSING             # source of the training clips
    val: str | None = None           # source of the held-out clips; none: no validation
    sample_rate: int = 16_000        # Hz to which every clip is resampled
    teacher_rate: int | None = None  # Hz of a second copy of each training segment, for a teacher; none: no copy
    channels: int = 1                # 1: the mean of a clip's channels; more: as many as the clip has, or one repeated
    features: str | None = None      # folder of teachers' features that `toklab features` made; none: they are computed
    segment_seconds: float = 3.0     # length of a training segment; shorter clips are followed by zeros
    crop: str = "random"             # random: another stretch each time; fixed: one random stretch a clip; start: the beginning
    batch_frames: int | None = None  # whole clips of similar length in place of segments: clips of a micro-batch × the longest
                                     # stay within so many frames; train.batch_size only limits how many clips they are
    frame_rate: float = 50.0         # batch_frames: frames of a second
    text_frames: float = 0.0         # batch_frames: frames that each byte of a clip's text counts as
    min_seconds: float = 0.0         # shorter clips are left out
    max_seconds: float = 3600.0      # longer clips are left out
    val_limit: int | None = None     # at most this many validation clips; none: all
    val_seconds: float | None = None   # validation clips are cut to this length; none: whole
    samples: int | None = None       # number of training clips, needed by shards when a stage is given in epochs
    shuffle_buffer: int = 1000       # shards: clips shuffled together inside one shard
    bad_fraction: float = 0.01       # unreadable clips above this share of those seen end the run
    workers: int = 2                 # decoding processes for each rank; 0: in the training process


@dataclass
class OptimizerConfig:
    """AdamW of the generator and of the discriminators."""

    betas: tuple[float, float] = (0.9, 0.95)   # AdamW's moment decays
    eps: float = 1e-8                          # AdamW's epsilon
    weight_decay: float = 1e-4                 # decoupled weight decay
    no_decay: list[str] = field(default_factory=list)   # parts of names that are not decayed
    decay_vectors: bool = False                # decay tensors with < 2 axes too, as PyTorch's AdamW does unasked
    clip: float = 3.0                          # global L2 norm to which gradients are clipped; 0: none


@dataclass
class GuardConfig:
    """Steps whose losses are too large are skipped, on all processes. (Those that are not finite always are.)"""

    jump: float = 0.0                # generator: no update where a loss, the mean over processes, is more than so many times
                                     # what it was in the step before; 0: there is no such rule
    terms: list[str] = field(default_factory=list)   # jump: the losses that it looks at; empty: all of the stage
    discriminator: float = 0.0       # discriminators: no update where one of their losses is larger; 0: there is no such rule
    start: int = 0                   # step of the run from which on both count


@dataclass
class TrainConfig:
    """What all stages share. One step is one optimiser update."""

    batch_size: int = 32               # samples of a step over all processes and micro-batches
    accumulate: int = 1                # micro-batches of a step
    precision: str = "no"              # accelerate's mixed precision: no, bf16
    seed: int = 0                      # every random draw follows from it
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    discriminator_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: float = 0.999                 # decay of the moving average of the weights, which is what load() gives
    ema_rampup: float = 0.0            # its half-life is at most this share of the steps so far; 0: there is no ramp
    guard: GuardConfig = field(default_factory=GuardConfig)
    max_minutes: float | None = None   # stop, saved and resumable, after this much training time in one session
    log_every: int = 10                # steps between two lines of metrics.jsonl
    validate_every: int = 1000         # steps between two validations (and one at the end of a stage); 0: at the end only
    checkpoint_every: int = 1000       # steps between two checkpoints (and one at the end of a stage)
    keep_last: int = 2                 # newest checkpoints that are kept
    keep_best: int = 1                 # best checkpoints by `best` that are kept beside them
    best: str | None = None            # validation metric of the best checkpoint; a leading minus: smaller is better;
                                       # none: psnr for images, -mel for speech
    max_strikes: int = 5               # non-finite steps in a row that end the run
    compile: bool = False              # torch.compile the parts that training calls
    activation_checkpointing: bool = False   # recompute block activations in the backward pass: less memory, more time
    trackers: list[str] = field(default_factory=list)   # tensorboard, wandb: beside the JSONL file, through accelerate


@dataclass
class StageConfig:
    """One stage of training. `warmup` and `starts` count in the unit of the length: steps, or epochs if `epochs` is given."""

    name: str = MISSING                # shown in logs
    steps: int | None = None           # length in steps
    epochs: float | None = None        # or in passes over the training data
    parts: list[str] = field(default_factory=list)   # submodules that train, e.g. encoder, decoder, heads; empty: all
    lr: float = 1e-4                   # peak learning rate of the generator
    lr_scale: dict[str, float] = field(default_factory=dict)   # part of a parameter's name: factor of its learning rate
    discriminator_lr: float | None = None   # peak learning rate of the discriminators; none: the same
    warmup: float = 0.0                # linear warm-up
    schedule: str = "cosine"           # then cosine or linear (to min_lr), constant or inverse_sqrt (lr · √(warmup / done))
    decay_from: float = 0.0            # linear: until when the rate stays at lr
    decay_until: float | None = None   # linear: from when on it is min_lr; none: the stage's end
    discriminator_schedule: str | None = None   # the discriminators' own: cosine or constant, without warm-up; none: the same
    min_lr: float = 0.0                # end of the cosine, and of the line
    weights: dict[str, float] = field(default_factory=dict)   # loss term: weight; a term that is not named is not computed
    starts: dict[str, float] = field(default_factory=dict)    # loss term: when in the stage it begins; default 0
    objective: dict[str, Any] = field(default_factory=dict)   # options of the objective that this stage changes
    fresh: list[str] = field(default_factory=list)   # parts initialised anew when the stage starts, e.g. discriminators


@dataclass
class RunConfig:
    """A training run. `model` and `objective` take the types of the system, `data` that of its kind."""

    system: str = MISSING              # which system: rectok, …
    name: str = MISSING                # the run's folder is OUT/<system>-<name>
    out: str = "runs"                  # folder of runs
    init_from: str | None = None       # start from these weights: a run, a checkpoint, a saved folder, a hub id
    init_parts: dict[str, str] = field(default_factory=dict)   # part of the tokenizer: where its first weights come from
    model: Any = MISSING               # the network that ships
    objective: Any = MISSING           # what training needs beside it
    data: Any = MISSING                # training and validation data
    train: TrainConfig = field(default_factory=TrainConfig)
    stages: list[StageConfig] = field(default_factory=list)
