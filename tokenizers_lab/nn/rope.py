"""Rotary position embeddings as tables of cosines and sines."""

import functools
import math

import torch
from torch import Tensor

SEQUENCE_BASE = 10_000.0      # periods of a sequence go up to 2π times this (Su et al. 2021)
GRID_BASE = 100.0             # periods of a centred grid go up to this, in half image sides (Siméoni et al. 2025, DINOv3)


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


def grid_periods(head_dim: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """Periods (head_dim / 4,) of one axis of a centred grid, from 1 up, computed in `dtype`."""
    exponents = 2 * torch.arange(head_dim // 4, device=device, dtype=dtype) / (head_dim // 2)
    return GRID_BASE**exponents


def centred_table(
    head_dim: int, rows: int, cols: int, device: torch.device | str = "cpu", prefix: int = 0,
    periods: torch.dtype = torch.float32, coordinates: torch.dtype = torch.float32,
) -> Tensor:
    """Table of a rows × cols token grid for `apply_by_halves`: (prefix + rows·cols, 2·head_dim), cosines then sines, row by row.

    The centres of the tokens are at −1 to 1 along each axis, whatever the grid; a quarter of the channels turns with the row,
    a quarter with the column, and both repeat as a block. The first `prefix` rows turn nothing (class tokens).
    periods: type in which the periods are held; coordinates: in which they are computed, and the coordinates too; what follows
    is in the wider of both. Released networks of this kind compute everything in bfloat16, in this very order.
    Raises ValueError if head_dim is no multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"axial rotary embeddings need a head width that is a multiple of 4, not {head_dim}")
    device = torch.device(device)
    if device.type == "meta" or torch.compiler.is_compiling():     # no cache of symbolic tensors
        return _centred_table(head_dim, rows, cols, device, prefix, periods, coordinates)
    return _cached_centred_table(head_dim, rows, cols, device, prefix, periods, coordinates)


def _centred_table(
    head_dim: int, rows: int, cols: int, device: torch.device, prefix: int, periods: torch.dtype, coordinates: torch.dtype
) -> Tensor:
    lengths = grid_periods(head_dim, coordinates, device).to(periods)
    row, col = (2 * math.pi * (2 * (torch.arange(0.5, n, device=device, dtype=coordinates) / n) - 1) for n in (rows, cols))
    by_row = (row[:, None] / lengths)[:, None].expand(rows, cols, -1)
    by_col = (col[:, None] / lengths)[None].expand(rows, cols, -1)
    angles = torch.cat([by_row, by_col], dim=-1).flatten(0, 1).repeat(1, 2)                 # (rows · cols, head_dim)
    table = torch.cat([angles.cos(), angles.sin()], dim=-1)
    still = torch.cat([table.new_ones(prefix, head_dim), table.new_zeros(prefix, head_dim)], dim=-1)
    return torch.cat([still, table])


@functools.lru_cache(maxsize=64)
def _cached_centred_table(
    head_dim: int, rows: int, cols: int, device: torch.device, prefix: int, periods: torch.dtype, coordinates: torch.dtype
) -> Tensor:
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        return _centred_table(head_dim, rows, cols, device, prefix, periods, coordinates)


def integer_table(head_dim: int, rows: int, cols: int, device: torch.device | str | None = None) -> Tensor:
    """Table of a rows × cols token grid for `apply_paired`: (rows·cols, 2·head_dim), cosines then sines, row by row, float32.

    Positions are integers; the first half of the channels turns with the row, the second with the column, each at
    head_dim / 4 frequencies from 1 down towards 1/10,000, the same for both channels of a pair (Fang et al. 2024, EVA-02;
    LightningDiT). Raises ValueError if head_dim is no multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"axial rotary embeddings need a head width that is a multiple of 4, not {head_dim}")
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float32, device=device) / half
    frequencies = (1 / SEQUENCE_BASE**exponents).repeat_interleave(2)                      # (head_dim / 2,)
    by_row, by_col = (torch.arange(n, dtype=torch.float32, device=device)[:, None] * frequencies for n in (rows, cols))
    angles = torch.cat([by_row[:, None].expand(rows, cols, -1), by_col[None].expand(rows, cols, -1)], dim=-1).flatten(0, 1)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


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


def rotary_table(positions: Tensor, head_dim: int) -> Tensor:
    """(..., 2 · head_dim) cosines, then sines, float32, of positions (...): head_dim / 2 frequencies, which repeat as a block."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[..., None].float() * SEQUENCE_BASE**-exponents
    angles = torch.cat([angles, angles], dim=-1)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def apply_by_halves(x: Tensor, table: Tensor) -> Tensor:
    """x·cos + R(x)·sin, where R turns each channel of the first half with its fellow of the second: R(a, b) = (−b, a).

    x: (B, heads, N, d); table: (N, 2d) or (B, N, 2d). Returns x's shape and type (Su et al. 2021).
    """
    cos, sin = table.unsqueeze(-3).chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
