"""Rotary position embeddings as tables of cosines and sines."""

import functools
import math

import torch
from torch import Tensor


def axial_table(
    head_dim: int, rows: int, cols: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    low: float = 7e-4, high: float = 7.0,
) -> Tensor:
    """Table of a rows × cols token grid: (rows·cols, 2·head_dim), cosines then sines, tokens row by row.

    Coordinates run from 0 to 1 along each axis, whatever the grid; the first half of the channels turns with the row,
    the second with the column, at head_dim / 4 frequencies from `high` down to `low` (in turns) that repeat as a block.
    Raises ValueError if head_dim is no multiple of 4. Source: RecTok's released code.
    """
    if head_dim % 4:
        raise ValueError(f"axial rotary embeddings need a head width that is a multiple of 4, not {head_dim}")
    device = torch.device(device)
    if device.type == "meta" or torch.compiler.is_compiling():     # no cache of symbolic tensors
        return _axial_table(head_dim, rows, cols, device, dtype, low, high)
    return _cached_axial_table(head_dim, rows, cols, device, dtype, low, high)


def _axial_table(
    head_dim: int, rows: int, cols: int, device: torch.device, dtype: torch.dtype, low: float, high: float
) -> Tensor:
    count = head_dim // 4
    exponents = torch.linspace(0, -1, count, device=device, dtype=dtype)
    turns = high * (high / low) ** exponents
    frequencies = (turns * 2 * math.pi).repeat(2)             # (head_dim / 2,); rounded in the order of the released code
    row = torch.linspace(0, 1, rows, device=device, dtype=dtype)
    col = torch.linspace(0, 1, cols, device=device, dtype=dtype)
    by_row = (row[:, None] * frequencies)[:, None].expand(rows, cols, -1)
    by_col = (col[:, None] * frequencies)[None].expand(rows, cols, -1)
    angles = torch.cat([by_row, by_col], dim=-1).flatten(0, 1)                     # (rows · cols, head_dim)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@functools.lru_cache(maxsize=64)
def _cached_axial_table(
    head_dim: int, rows: int, cols: int, device: torch.device, dtype: torch.dtype, low: float, high: float
) -> Tensor:
    with torch.inference_mode(False):      # a table first made during inference must also serve training
        return _axial_table(head_dim, rows, cols, device, dtype, low, high)


def apply_paired(x: Tensor, table: Tensor) -> Tensor:
    """x·cos + R(x)·sin, where R turns each pair of neighbouring channels by 90 degrees: R(a, b) = (−b, a).

    x: (B, heads, N, d); table: (N, 2d) or (B, N, 2d). Returns x's shape and type. With a table whose frequencies repeat
    as a block, the two channels of a pair have different angles and the map is no rotation; RecTok's released weights
    need it so.
    """
    cos, sin = table.unsqueeze(-3).chunk(2, dim=-1)
    pairs = x.unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)
