"""The rules of a config that types alone cannot say: choices, signs, and options that must fit together."""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Any

from tokenizers_lab.config_fill import Origins, nearest
from tokenizers_lab.errors import ConfigError
from tokenizers_lab.registry import get_system
from tokenizers_lab.settings import (
    GuardConfig,
    ImageDataConfig,
    LatentDataConfig,
    OptimizerConfig,
    RunConfig,
    SpeechDataConfig,
    StageConfig,
    TrainConfig,
)

CHOICES: dict[type, dict[str, tuple[str, ...]]] = {
    ImageDataConfig: {"crop": ("center", "random"), "crop_filter": ("bicubic", "lanczos")},
    SpeechDataConfig: {"crop": ("random", "fixed", "start")},
    TrainConfig: {"precision": ("no", "bf16")},
    StageConfig: {"schedule": ("cosine", "linear", "constant", "inverse_sqrt"), "discriminator_schedule": ("cosine", "constant")},
}
ABOVE_ZERO: dict[type, tuple[str, ...]] = {
    ImageDataConfig: ("size", "max_pixels"),
    SpeechDataConfig: ("sample_rate", "channels", "segment_seconds", "max_seconds", "val_seconds",
                       "teacher_rate", "batch_frames", "frame_rate"),
    TrainConfig: ("batch_size", "accumulate", "log_every", "checkpoint_every", "keep_last", "max_strikes", "max_minutes"),
    StageConfig: ("steps", "epochs"),
    OptimizerConfig: ("eps",),
}
NOT_NEGATIVE: dict[type, tuple[str, ...]] = {
    ImageDataConfig: ("crop_min", "crop_max", "crop_share", "workers", "bad_fraction", "shuffle_buffer"),
    SpeechDataConfig: ("min_seconds", "text_frames", "workers", "bad_fraction", "shuffle_buffer"),
    TrainConfig: ("validate_every", "keep_best", "ema", "ema_rampup"),
    GuardConfig: ("jump", "discriminator", "start"),
    StageConfig: ("lr", "discriminator_lr", "warmup", "min_lr", "decay_from", "decay_until"),
    OptimizerConfig: ("weight_decay", "clip"),
}
CHOICES[LatentDataConfig] = CHOICES[ImageDataConfig]
ABOVE_ZERO[LatentDataConfig] = ABOVE_ZERO[ImageDataConfig]
NOT_NEGATIVE[LatentDataConfig] = NOT_NEGATIVE[ImageDataConfig]


def check_values(section: Any, path: str, origins: Origins) -> None:
    """Enumerated choices and signs, in every section. Raises ConfigError."""
    cls = type(section)
    for f in fields(section):
        key, value = f"{path}{f.name}", getattr(section, f.name)
        choices = CHOICES.get(cls, {}).get(f.name)
        if choices and value is not None and value not in choices:
            raise origins.error(key, f"{key} must be one of {', '.join(choices)}; not '{value}'{hint(str(value), choices)}")
        if value is not None and f.name in ABOVE_ZERO.get(cls, ()) and not value > 0:
            raise origins.error(key, f"{key} must be above 0, not {value}")
        if value is not None and f.name in NOT_NEGATIVE.get(cls, ()) and not value >= 0:
            raise origins.error(key, f"{key} must not be negative, but is {value}")
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for k, v in [("", value), *((f".{k}", v) for k, v in items)]:
            if is_dataclass(v):
                check_values(v, f"{key}{k}.", origins)


def hint(name: str, known: Iterable[str]) -> str:
    """`; nearest: 'x'`, or nothing where no known name is near."""
    near = nearest(name, known)
    return f"; nearest: '{near}'" if near else ""


def check_run(cfg: RunConfig, origins: Origins, override_objective: Callable[[Any, dict[str, Any], str], Any]) -> None:
    """Rules over several options. The system's config module may add its own `validate(cfg: RunConfig)`. Raises ConfigError."""

    def refuse(key: str, message: str) -> None:
        raise origins.error(key, f"{key}: {message}")

    train, data = cfg.train, cfg.data
    if not cfg.name.strip() or "/" in cfg.name or cfg.name in (".", ".."):
        refuse("name", f"it is a part of the run's folder, so it must be one word without '/'; not '{cfg.name}'")
    if train.batch_size % train.accumulate:
        refuse("train.accumulate", f"train.batch_size {train.batch_size} is not a multiple of {train.accumulate}")
    if train.ema >= 1:
        refuse("train.ema", f"must be below 1, not {train.ema}")
    if 0 < train.guard.jump <= 1:
        refuse("train.guard.jump", f"must be above 1, or 0 for none, not {train.guard.jump:g}")
    if train.best is not None and not train.best.removeprefix("-"):
        refuse("train.best", "must name a validation metric, such as psnr")
    if isinstance(data, ImageDataConfig) and data.crop_max and data.crop_max < (data.crop_min or data.size):
        refuse("data.crop_max", f"{data.crop_max} is below the smallest crop, {data.crop_min or data.size}")
    if isinstance(data, SpeechDataConfig) and data.max_seconds <= data.min_seconds:
        refuse("data.max_seconds", f"{data.max_seconds:g} is not above data.min_seconds, {data.min_seconds:g}")
    if isinstance(data, SpeechDataConfig) and data.batch_frames is not None:
        for option in ("features", "teacher_rate"):
            if getattr(data, option) is not None:
                refuse(f"data.{option}", "it is of segments, and data.batch_frames gives whole clips; give one of the two")
    rate = getattr(cfg.model, "sample_rate", None)
    if isinstance(data, SpeechDataConfig) and rate is not None and data.sample_rate != rate:
        refuse("data.sample_rate", f"the data are read at {data.sample_rate} Hz, but the model takes {rate}")
    if not cfg.stages:
        refuse("stages", "a run needs at least one stage")
    names = [s.name for s in cfg.stages]
    for i, stage in enumerate(cfg.stages):
        if names.index(stage.name) != i:
            refuse(f"stages.{i}.name", f"'{stage.name}' is the name of another stage")
        check_stage(stage, f"stages.{i}", origins)
        try:
            override_objective(cfg.objective, stage.objective, f"stages.{i}.objective")
        except ConfigError as error:
            raise origins.error(error.key, str(error)) from error
    validate_system(cfg, origins)


def validate_system(cfg: RunConfig, origins: Origins) -> None:
    """Call the `validate(cfg: RunConfig)` of the system's config module, if it has one."""
    module = importlib.import_module(get_system(cfg.system).model_config.partition(":")[0])
    validate = getattr(module, "validate", None)
    if validate is not None:
        try:
            validate(cfg)
        except ConfigError as error:
            key = error.key or str(error).split(maxsplit=1)[0].rstrip(":")       # its messages start with the key
            raise origins.error(key, str(error)) from error


def check_stage(stage: StageConfig, path: str, origins: Origins) -> None:
    """One stage: a length, named parts, weights and starts that fit together. Raises ConfigError."""

    def refuse(option: str, message: str) -> None:
        key = f"{path}.{option}" if option else path
        raise origins.error(key, f"{key}: {message}")

    if stage.steps is not None and stage.epochs is not None:
        refuse("", f"stage '{stage.name}' has its length in both steps and epochs; give one")
    if stage.steps is None and stage.epochs is None:
        refuse("", f"stage '{stage.name}' needs its length in steps or epochs")
    for option in ("parts", "fresh"):
        for i, part in enumerate(getattr(stage, option)):
            if not part.strip():
                refuse(f"{option}.{i}", "an empty name")
    if not stage.weights:
        refuse("weights", "empty; name the loss terms that count, such as mse: 1.0")
    for term, weight in stage.weights.items():
        if not 0 <= weight < float("inf"):
            refuse(f"weights.{term}", f"must be finite and not negative, but is {weight}")
    for term, start in stage.starts.items():
        if term not in stage.weights:
            refuse(f"starts.{term}", f"the stage has no weight for '{term}'{hint(term, stage.weights)}")
        if not start >= 0:
            refuse(f"starts.{term}", f"must not be negative, but is {start}")
    if stage.schedule == "inverse_sqrt" and not stage.warmup:
        refuse("warmup", "must be above 0 for schedule=inverse_sqrt, which falls as √(warmup / done)")
    if stage.schedule != "linear" and (stage.decay_from or stage.decay_until is not None):
        refuse("decay_from" if stage.decay_from else "decay_until", f"is of schedule=linear, not of {stage.schedule}")
    if stage.decay_until is not None and stage.decay_until <= max(stage.decay_from, stage.warmup):
        refuse("decay_until", f"{stage.decay_until:g} is not behind decay_from {stage.decay_from:g} and warmup {stage.warmup:g}")
    if stage.min_lr > stage.lr:
        refuse("min_lr", f"{stage.min_lr:g} is above lr {stage.lr:g}")
