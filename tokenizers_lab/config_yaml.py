"""YAML read as data: plain values with the line of every key.

Scalars follow YAML 1.2: only true and false are booleans (so `precision: no` is the word no), 1e-4 is a number, dates are text.
"""

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from tokenizers_lab.errors import ConfigError


class Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}


Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?((0|[1-9][0-9]*)?\.[0-9]+([eE][-+]?[0-9]+)?|(0|[1-9][0-9]*)(\.([eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)|\.inf)$|^\.nan$"),
    list("-+.0123456789"),
)
Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^(?:<<)$"), ["<"])


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Values of a YAML file, and the line of every dotted key. Raises ConfigError if it is no mapping or no YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from error
    try:
        node = yaml.compose(text, Loader=Loader)
        if node is None:
            raise ConfigError(f"the config is empty ({path})")
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"a config is a mapping of options to values ({path}, line {node.start_mark.line + 1})")
        lines: dict[str, int] = {}
        collect_lines(node, "", lines, str(path))
        return yaml.load(text, Loader=Loader), lines
    except yaml.YAMLError as error:
        raise ConfigError(yaml_message(error, str(path))) from error


def parse_value(text: str, override: str) -> Any:
    """The YAML value of an override. Raises ConfigError."""
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"the value of the override '{override}' is not YAML: {problem}") from error


def collect_lines(node: yaml.Node, key: str, lines: dict[str, int], source: str) -> None:
    """Fill `lines` with dotted key: line; a key that is said twice in one section is an error."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            line = name.start_mark.line + 1
            if not isinstance(name, yaml.ScalarNode):
                raise ConfigError(f"a key must be one word ({source}, line {line})")
            inner = f"{key}.{name.value}" if key else name.value
            if inner in lines and name.value != "<<":
                raise ConfigError(f"{inner} is said twice, in line {lines[inner]} and here ({source}, line {line})")
            lines[inner] = line
            collect_lines(value, inner, lines, source)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[f"{key}.{i}"] = value.start_mark.line + 1
            collect_lines(value, f"{key}.{i}", lines, source)


def yaml_message(error: yaml.YAMLError, source: str) -> str:
    """One line of PyYAML's message."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}" if mark else ""
        return f"not YAML: {error.problem or error.context} ({source}{place})"
    return f"not YAML: {' '.join(str(error).split())} ({source})"
