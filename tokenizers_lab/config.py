"""Reads a run's config: YAML with inheritance and `key=value` overrides into the typed dataclasses of settings.py.

Layers are applied from the bottom: the dataclasses' defaults, what `inherit:` names (a path relative to the file, or a recipe
such as rectok/tiny; and so on down), the file, the overrides. One rule says what a layer does to those below it: a section (a
dataclass) merges option by option; everything else is a value and is replaced whole, lists and dicts with keys of the user's own
(`objective.teachers`, a stage's `weights`) among them. So a file that names teachers has exactly those teachers. An override
reaches into such values: `objective.teachers.dinov3.input_size=64`, `stages.0.steps=10`.
"""

import dataclasses
import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tokenizers_lab.config_check import check_run, check_values
from tokenizers_lab.config_fill import Layer, Origins, fill, first_line, nearest, override
from tokenizers_lab.config_help import field_help
from tokenizers_lab.config_yaml import parse_value, read_yaml
from tokenizers_lab.errors import ConfigError
from tokenizers_lab.registry import System, get_system
from tokenizers_lab.settings import ImageDataConfig, LatentDataConfig, RunConfig, SpeechDataConfig, StageConfig

DATA_CONFIGS: dict[str, type] = {      # by the system's kind
    "image": ImageDataConfig, "speech": SpeechDataConfig, "generator": LatentDataConfig,
}


def load_config(path_or_name: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a YAML file or a packaged recipe (`rectok/tiny`) describes, with `key=value` overrides.

    `model` and `objective` are instances of the system's dataclasses, `data` of its kind's. Raises ConfigError, one line with
    the full key, the nearest valid key, the file and the line.
    """
    layers = read_layers(find_recipe(os.fspath(path_or_name)))
    pairs = [split_override(o) for o in overrides]
    names = [(layer.values["system"], layer.where("system")) for layer in layers if "system" in layer.values]
    names += [(value, f"override '{text}'") for key, value, text in pairs if key == "system"]
    origins = Origins()
    if not names:
        raise ConfigError(f"system is missing: say which system the run trains ({layers[-1].source})")
    run_type = typed_run(system_of(*names[-1]))
    root = OmegaConf.structured(run_type)
    for layer in layers:
        fill(root, layer.values, run_type, "", layer, origins)
    for key, value, text in pairs:
        override(root, run_type, key, value, f"override '{text}'", origins)
    return finish(root, origins, layers[-1].source)


def save_config(cfg: RunConfig, path: str | os.PathLike[str]) -> Path:
    """Write the config with every option as YAML that `load_config` reads back equal. Returns the path."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.tmp")      # other processes may read the file meanwhile
    draft.write_text(to_yaml(cfg), encoding="utf-8")
    os.replace(draft, path)
    return path


def to_yaml(cfg: RunConfig) -> str:
    """Every option of the config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(cfg)))


def recipes_folder() -> Path:
    """The folder of the packaged recipes."""
    return Path(importlib.import_module("tokenizers_lab.configs").__path__[0])


def list_recipes() -> list[str]:
    """Names of the packaged recipes, such as `rectok/tiny`."""
    root = recipes_folder()
    return sorted(p.relative_to(root).with_suffix("").as_posix() for p in root.glob("*/*.yaml"))


def find_recipe(name: str) -> Path:
    """An existing file, or a packaged recipe by its name. Raises ConfigError with the nearest recipe."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    short = name.removeprefix("configs/").removesuffix(".yaml")
    known = list_recipes()
    if short in known:
        return recipes_folder() / f"{short}.yaml"
    if path.is_dir():
        inside = path / "config.yaml"
        hint = f"; did you mean {inside}?" if inside.is_file() else "; give a YAML file or a recipe's name"
        raise ConfigError(f"'{name}' is a folder, not a config{hint}")
    near = nearest(short, known)
    raise ConfigError(f"there is no config file and no recipe '{name}'; {f'nearest: {near!r}' if near else f'recipes: {known}'}")


def override_objective(cfg_objective: Any, changes: dict[str, Any], where: str = "objective") -> Any:
    """A new objective config with a stage's changes, validated as a file is. `where` is the key that errors name."""
    cls = type(cfg_objective)
    root = OmegaConf.structured(cfg_objective)
    fill(root, changes, cls, where, Layer({}, {}, ""), Origins())
    try:
        return OmegaConf.to_object(root)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {first_line(error)}") from error


def stage_objectives(
    cfg: RunConfig, terms: Sequence[str], may_change: Sequence[str] | None = None
) -> Iterator[tuple[int, StageConfig, Any, str]]:
    """(number, stage, its objective config, the key that errors about that name) of each stage, for a system's `validate`.

    terms: the system's losses. may_change: options of the objective that a stage may change, as networks are built once; none:
    all. Raises ConfigError on another loss or option.
    """
    for i, stage in enumerate(cfg.stages):
        fixed = [] if may_change is None else sorted(set(stage.objective) - set(may_change))
        if fixed:
            allowed = f"it may change {', '.join(may_change)}" if may_change else "it may change nothing"
            raise ConfigError(f"stages.{i}.objective cannot change '{fixed[0]}'; {allowed}")
        unknown = sorted(set(stage.weights) - set(terms))
        if unknown:
            raise ConfigError(f"stages.{i}.weights: {cfg.system} has no loss '{unknown[0]}'; it has {', '.join(terms)}")
        where = f"stages.{i}.objective"
        yield i, stage, override_objective(cfg.objective, stage.objective, where), where if stage.objective else "objective"


def describe(cfg: Any, prefix: str = "") -> list[tuple[str, Any, str]]:
    """Rows (dotted key, value, help) of every option; the help is the comment behind the dataclass's field."""
    rows = []
    cls: Any = type(cfg)
    for name, text in field_help(cls).items():
        rows += _describe_value(f"{prefix}{name}", getattr(cfg, name), text)
    return rows


def _describe_value(key: str, value: Any, text: str) -> list[tuple[str, Any, str]]:
    if is_dataclass(value):
        return describe(value, f"{key}.")
    if isinstance(value, list | dict) and value:
        items = list(enumerate(value) if isinstance(value, list) else value.items())
        if any(is_dataclass(v) for _, v in items):
            return [row for k, v in items for row in _describe_value(f"{key}.{k}", v, text)]
    return [(key, value, text)]


# --- the layers -------------------------------------------------------------------------------------------------------------

def read_layers(path: Path, seen: tuple[Path, ...] = ()) -> list[Layer]:
    """The file and those it inherits from, the lowest first. Raises ConfigError on a cycle or a missing file."""
    if path.resolve() in seen:
        chain = " -> ".join(p.name for p in (*seen, path.resolve()))
        raise ConfigError(f"configs inherit from each other in a circle: {chain} ({path})")
    values, lines = read_yaml(path)
    layer = Layer(values, lines, str(path))
    if "inherit" not in values:
        return [layer]
    parent = values.pop("inherit")
    if not isinstance(parent, str):
        raise ConfigError(f"inherit must be the path of one file, not {parent!r} ({layer.where('inherit')})")
    base = path.parent / parent
    if not base.is_file() and parent in list_recipes():
        base = find_recipe(parent)
    if not base.is_file():
        near = nearest(parent, [p.name for p in base.parent.glob("*.yaml")] if base.parent.is_dir() else [])
        raise ConfigError(f"inherit: there is no file {base}{f'; nearest: {near!r}' if near else ''} ({layer.where('inherit')})")
    return [*read_layers(base, (*seen, path.resolve())), layer]


def split_override(text: str) -> tuple[str, Any, str]:
    """(dotted key, value, text) of `key=value`. Raises ConfigError."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"an override is key=value, such as train.batch_size=8; not '{text}'")
    return key.strip(), parse_value(value, text), text


def system_of(name: Any, where: str) -> System:
    """The system of that name; the error says where it was named."""
    try:
        return get_system(str(name))
    except ConfigError as error:
        raise ConfigError(f"{error} ({where})") from None


def typed_run(system: System) -> type:
    """RunConfig with the system's own types of `model`, `objective` and `data`."""
    if system.kind not in DATA_CONFIGS:
        raise ConfigError(f"{system.name}: training of {system.kind} systems is not here yet")
    types = [system.resolve("model_config"), system.resolve("objective_config"), DATA_CONFIGS[system.kind]]
    parts = [(name, cls, field(default_factory=cls)) for name, cls in zip(("model", "objective", "data"), types)]
    return dataclasses.make_dataclass("TypedRun", parts, bases=(RunConfig,))


def finish(root: DictConfig, origins: Origins, source: str) -> RunConfig:
    """Resolve references, refuse what is missing, and check what types cannot say."""
    try:
        missing = sorted(OmegaConf.missing_keys(root), key=lambda k: (k.count("."), k))
        if missing:
            keys = ", ".join(k.replace("[", ".").replace("]", "") for k in missing)
            raise ConfigError(f"{keys}: needs a value ({source})")
        typed = OmegaConf.to_object(root)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", "") or "").replace("[", ".").replace("]", "")
        raise origins.error(key, f"{key}: {first_line(error)}") from error
    cfg = RunConfig(**{f.name: getattr(typed, f.name) for f in fields(RunConfig)})
    check_values(cfg, "", origins)
    check_run(cfg, origins, override_objective)
    return cfg
