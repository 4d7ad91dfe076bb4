"""The help of an option is the comment behind its field in the dataclass's source."""

import ast
import functools
import inspect
import io
import textwrap
import tokenize
from dataclasses import fields


@functools.cache
def field_help(cls: type) -> dict[str, str]:
    """Help of every field of a dataclass, in the order of its fields; empty where there is no comment or no source."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base is not object:
            found |= comments_of(base)
    return {f.name: found.get(f.name, "") for f in fields(cls)}


def comments_of(cls: type) -> dict[str, str]:
    """Comments behind the annotated names of one class: at the end of the field's last line, and on lines of their own below
    it that are indented deeper than the field."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    comments, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = (token.start[1], token.string.lstrip("#").strip())
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    found = {}
    body = ast.parse(source).body[0]
    for item in getattr(body, "body", ()):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            line = item.end_lineno or item.lineno
            words = [comments[line][1]] if line in comments else []
            while (line := line + 1) in alone and comments[line][0] > item.col_offset:
                words.append(comments[line][1])
            found[item.target.id] = " ".join(words)
    return found
