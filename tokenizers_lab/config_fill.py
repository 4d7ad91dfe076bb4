"""Puts plain values into the typed tree of a config, every key and type checked, every error with its place."""

import difflib
import types
import typing
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tokenizers_lab.errors import ConfigError


@dataclass
class Layer:
    """One source of values: a file or an override, and where each of its keys is said."""

    values: dict[str, Any]
    lines: dict[str, int]             # dotted key: line in the file
    source: str                       # the file's path

    def where(self, key: str) -> str:
        """`configs/my.yaml, line 7`: the line of the key or of the nearest key around it."""
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        return f"{self.source}, line {self.lines[key]}" if key else self.source


@dataclass
class Origins:
    """Where the value of each dotted key was said last, for error messages."""

    of: dict[str, str] = field(default_factory=dict)

    def set(self, key: str, where: str) -> None:
        """Remember the key's place."""
        self.of[key] = where

    def forget_below(self, key: str) -> None:
        """Drop the keys inside a value that is replaced."""
        self.of = {k: v for k, v in self.of.items() if not k.startswith(key + ".")}

    def error(self, key: str, message: str) -> ConfigError:
        """The message with the place of the key, or of the nearest key around it, in parentheses."""
        while key and key not in self.of:
            key = key.rpartition(".")[0]
        return ConfigError(f"{message} ({self.of[key]})" if key else message)


def shape_of(hint: Any) -> tuple[str, Any]:
    """What a type hint holds: ("section", dataclass), ("list" or "dict", dataclass or None of its items), ("leaf", None)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        return shape_of(inner[0]) if len(inner) == 1 else ("leaf", None)
    if is_dataclass(hint):
        return "section", hint
    kind = {list: "list", dict: "dict"}.get(typing.get_origin(hint) or hint)
    if kind is None:
        return "leaf", None
    arguments = typing.get_args(hint)
    return kind, arguments[-1] if arguments and is_dataclass(arguments[-1]) else None


def fill(node: DictConfig, values: Any, cls: type, path: str, layer: Layer, origins: Origins) -> None:
    """Put a layer's values into the typed node of a dataclass, each checked by its name and type."""
    hints = typing.get_type_hints(cls)
    if not isinstance(values, dict):
        shown = "is empty" if values is None else f"is {values!r}"
        message = f"{path or 'the config'} is a section of options, but {shown}; options: {', '.join(hints)}"
        raise layer_error(layer, path, message)
    for name, value in values.items():
        key = f"{path}.{name}" if path else str(name)
        if name not in hints:
            raise layer_error(layer, key, unknown(str(name), path, hints, cls))
        kind, item = shape_of(hints[name])
        absent = value is None and type(None) in typing.get_args(hints[name])
        if kind == "section" and not absent and not is_interpolation(value):
            if node[name] is None:
                node[name] = OmegaConf.structured(item)
            fill(node[name], value, item, key, layer, origins)
        elif kind in ("list", "dict") and item is not None and isinstance(value, list if kind == "list" else dict):
            origins.forget_below(key)
            fill_items(node, name, value, item, key, layer, origins)
        else:
            origins.forget_below(key)
            assign(node, name, value, key, layer)
        origins.set(key, layer.where(key))
        note_lines(value, key, layer, origins)


def fill_items(node: DictConfig, name: str, value: Any, item: type, key: str, layer: Layer, origins: Origins) -> None:
    """Replace a list or a dict of dataclasses."""
    if isinstance(value, list):
        node[name] = [OmegaConf.structured(item) for _ in value]
        pairs: Iterable[tuple[Any, Any]] = enumerate(value)
    else:
        node[name] = {str(k): OmegaConf.structured(item) for k in value}
        pairs = ((str(k), v) for k, v in value.items())
    for k, v in pairs:
        fill(node[name][k], v, item, f"{key}.{k}", layer, origins)


def note_lines(value: Any, key: str, layer: Layer, origins: Origins) -> None:
    """Remember the places inside a plain value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for k, v in items:
        origins.set(f"{key}.{k}", layer.where(f"{key}.{k}"))
        note_lines(v, f"{key}.{k}", layer, origins)


def assign(node: Any, name: Any, value: Any, key: str, layer: Layer) -> None:
    """Set one option or item, checked by OmegaConf against its type."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)      # an int for a float is what a person means
            node[name] = value
    except OmegaConfBaseException as error:
        parts = str(getattr(error, "full_key", None) or name).replace("[", ".").replace("]", "").split(".")
        below = parts[parts.index(str(name)) + 1:] if str(name) in parts else []      # inside a list or dict
        full = ".".join([key, *below])
        raise layer_error(layer, full, f"{full}: {first_line(error)}") from error


def override(root: DictConfig, cls: type, key: str, value: Any, where: str, origins: Origins) -> None:
    """Apply one `key=value`: walk to what holds the key, through lists and dicts too, and set it."""
    layer = Layer({}, {}, where)
    node, hint, parts = root, cls, key.split(".")
    for depth, part in enumerate(parts):
        path = ".".join(parts[:depth])
        index = check_part(node, hint, part, path, layer)
        kind, item = shape_of(hint)
        last = depth == len(parts) - 1
        if kind == "section" and last:
            fill(node, {part: value}, item, path, layer, origins)
        elif kind == "section":
            node, hint = node[part], typing.get_type_hints(item)[part]
        elif last and item is None:
            assign(node, index, value, key, layer)
        else:
            if isinstance(node, DictConfig) and index not in node:
                node[index] = {} if item is None else OmegaConf.structured(item)
            node, hint = node[index], item
            if last:
                fill(node, value, item, key, layer, origins)
    origins.set(key, where)


def check_part(node: Any, hint: Any, part: str, path: str, layer: Layer) -> Any:
    """The part of an override's key as the node's index. Raises ConfigError if the node has no such part."""
    kind, item = shape_of(hint)
    if kind == "section":
        hints = typing.get_type_hints(item)
        if part not in hints:
            raise layer_error(layer, "", unknown(part, path, hints, item))
        return part
    if isinstance(node, ListConfig):
        if not part.isdigit() or int(part) >= len(node):
            raise layer_error(layer, "", f"{path} has no item '{part}': it has {len(node)}, counted from 0")
        return int(part)
    if not isinstance(node, DictConfig):
        raise layer_error(layer, "", f"{path} is one value and has no options, so no '{part}'")
    return part


def is_interpolation(value: Any) -> bool:
    """Whether the value refers to another option, as `${model.encoder}` does."""
    return isinstance(value, str) and value.startswith("${")


def layer_error(layer: Layer, key: str, message: str) -> ConfigError:
    """The message with its place, where there is one."""
    where = layer.where(key)
    error = ConfigError(f"{message} ({where})" if where else message)
    error.key = key
    return error


def first_line(error: Exception) -> str:
    """OmegaConf adds lines about its own objects; the first says what is wrong."""
    return str(error).splitlines()[0].rstrip(".")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like `name`, if any does."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return found[0] if found else None


def unknown(name: str, path: str, hints: dict[str, Any], cls: type) -> str:
    """The message for an unknown option: the nearest one here, or the same name in another section below."""
    near = nearest(name, hints) or next((k for k in all_keys(cls) if k.rpartition(".")[2] == name), None)
    hint = f"nearest: '{near}'" if near else f"options: {', '.join(hints)}"
    return f"{path or 'the config'} has no option '{name}'; {hint}"


def all_keys(cls: type) -> list[str]:
    """Every dotted key below a dataclass, without lists and dicts."""
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        kind, item = shape_of(hint)
        keys += [name] if kind != "section" else [f"{name}.{k}" for k in all_keys(item)]
    return keys


