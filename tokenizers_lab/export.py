"""A tokenizer as files that run without this package: torch.export programs of encode and decode, and ONNX."""

import copy
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tokenizers_lab.errors import InputError, TokenizersLabError
from tokenizers_lab.export_lstm import replace_lstms
from tokenizers_lab.tokenizer import ImageTokenizer, SpeechTokenizer, Tokenizer

EXPORT_FILE = "export.json"
ONNX_OPSET = 20
ONNX_ONE_FILE = 1_800_000_000      # bytes of weights; larger ones lie beside the .onnx, as protobuf allows 2 GB
TOLERANCE = 1e-4                   # of the check that each exported program gives what the tokenizer gives
EQUAL_CODES = 0.99                 # share of codes that must be equal in it: sums in another order turn near ties
SHORTEST = (2, 8)                  # frames that an open length begins with: the second where reflected padding needs them
TRACED, CHECKED = 24, 37           # frames of an open length with which it is traced and checked


@dataclass(frozen=True)
class Side:
    """What enters or leaves one direction."""

    name: str                                             # images, latents, codes or audio
    axes: dict[int, str] = field(default_factory=dict)    # which axes are open, by name
    about: dict[str, Any] = field(default_factory=dict)   # what else export.json says of it


class Encode(nn.Module):
    """`encode` with tensors only: images to deterministic latents, or codes of a discrete tokenizer; audio to codes."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, x: Tensor) -> Tensor:
        """x: images (B, 3, H, W) in [0, 1], or audio (B, channels, samples) in [−1, 1]."""
        return self.tokenizer.encode(x).code      # type: ignore[operator]


class Decode(nn.Module):
    """`decode` with tensors only."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, stored: Tensor) -> Tensor:
        """stored: what Encode gives. Returns images (B, 3, H, W) in [0, 1], or audio in [−1, 1]."""
        return self.tokenizer.decode(stored)      # type: ignore[operator]


def export_tokenizer(
    tokenizer: Tokenizer, folder: str | os.PathLike[str], size: int | None = None, onnx: bool = False,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Write encode.pt2, decode.pt2 and export.json (shapes, ranges, origin) into a folder; returns what export.json says.

    Any batch size from 1 on. size: pixels a side of the images, fixed in the files (default: the training size). Audio has any
    length in whole frames from export.json's `shortest_frames` on (fill the last frame with zeros), or `seconds` if given,
    rounded up to whole frames, where a network cannot leave its length open; all items of a batch are whole. The programs are
    for float32 on the CPU (torch.export.passes.move_to_device_pass moves them) and draw from torch's global generator where
    decoding is stochastic. onnx: encode.onnx and decode.onnx too.
    Raises InputError on a size that the tokenizer cannot take, TokenizersLabError where it cannot be exported.
    """
    frozen = copy.deepcopy(tokenizer).requires_grad_(False).eval().to("cpu", torch.float32)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".exporting-", dir=folder))
    try:
        if isinstance(frozen, ImageTokenizer):
            about = export_image(frozen, staging, size, onnx)
        elif isinstance(frozen, SpeechTokenizer):
            about = export_speech(frozen, staging, seconds, onnx)
        else:
            raise InputError(f"a {tokenizer.system} tokenizer cannot be exported: only those of images and of speech can")
        about = {"system": frozen.system, **about, "parameters": sum(p.numel() for p in tokenizer.parameters()),
                 "provenance": frozen.provenance, "torch": torch.__version__}
        (staging / EXPORT_FILE).write_text(json.dumps(about, indent=1) + "\n")
        for file in sorted(staging.iterdir()):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return about


def export_image(frozen: ImageTokenizer, folder: Path, size: int | None, onnx: bool) -> dict[str, Any]:
    """Both directions for images of one size; what export.json says of them."""
    size = size or int(getattr(frozen.cfg, "image_size", 256))
    if size < 1:
        raise InputError(f"the size of the images must be at least 1, not {size}")
    images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    stored = run_seeded(Encode(frozen), images)
    pixels = Side("images", {0: "batch"}, {"range": [0, 1]})
    code = Side("latents" if stored.is_floating_point() else "codes", {0: "batch"})
    batch = {0: torch.export.Dim("batch", min=1)}
    # two items to trace, three to check: a batch size that got fixed on the way is found out
    return {
        "size": size, "downsample": frozen.downsample,
        "encode": export_part(folder, "encode", Encode(frozen), pixels, code, images[:2], images, batch, onnx),
        "decode": export_part(folder, "decode", Decode(frozen), code, pixels, stored[:2], stored, batch, onnx),
    }


def export_speech(frozen: SpeechTokenizer, folder: Path, seconds: float | None, onnx: bool) -> dict[str, Any]:
    """Both directions for audio of any length in whole frames, or of one length; what export.json says of them."""
    if seconds is not None and seconds <= 0:
        raise InputError(f"the seconds of the audio must be above 0, not {seconds:g}")
    frozen.fuse()
    length = None if seconds is None else frozen.frames(max(1, round(seconds * frozen.sample_rate)))
    traced, checked = (length or TRACED), (length or CHECKED)
    audio = torch.rand(3, frozen.channels, checked * frozen.hop, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9
    sound, frames = ({0: "batch", 2: "samples"}, {0: "batch", 2: "frames"}) if length is None else ({0: "batch"}, {0: "batch"})
    given = Side("audio", sound, {"range": [-1, 1], "sample_rate": frozen.sample_rate, "multiple": frozen.hop})
    made = Side("audio", sound, {"range": [-1, 1], "sample_rate": frozen.output_rate(), "multiple": frozen.frame_samples()})
    reference = copy.deepcopy(frozen)      # with its own LSTMs, against which the program is checked
    replace_lstms(frozen)
    stored = run_seeded(Encode(reference), audio)
    code = Side("codes" if not stored.is_floating_point() else "latents", frames)
    described, shortest = {}, 1
    for part, module, check, sides, example, whole in (
        ("encode", Encode(frozen), Encode(reference), (given, code), audio, frozen.hop),
        ("decode", Decode(frozen), Decode(reference), (code, made), stored, 1),
    ):
        for fewest in SHORTEST:
            open_axes: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
            if length is None:
                open_axes[2] = whole * torch.export.Dim("frames", min=fewest)
            try:
                described[part] = export_part(
                    folder, part, module, *sides, example[:2, :, : traced * whole], example, open_axes, onnx, check)
            except TokenizersLabError as error:
                if length is None and fewest == SHORTEST[-1]:
                    raise TokenizersLabError(f"{error}; a fixed length (seconds) may work") from error
                if length is not None:
                    raise
                continue
            shortest = max(shortest, 1 if length else fewest)
            break
    return {
        "seconds": None if length is None else length * frozen.hop / frozen.sample_rate, "hop": frozen.hop,
        "shortest_frames": length or shortest, "codebook_sizes": frozen.codebook_sizes, **described,
    }


def export_part(
    folder: Path, part: str, module: nn.Module, given: Side, made: Side, traced: Tensor, example: Tensor,
    open_axes: dict[int, Any], onnx: bool, reference: nn.Module | None = None,
) -> dict[str, Any]:
    """Write one direction, traced with one input, and check it with another against the reference (none: the module itself).

    open_axes: torch.export's name of each axis whose size is open. Returns its entry of export.json.
    Raises TokenizersLabError where it cannot be expressed or does not give the same.
    """
    system = str(module.tokenizer.system)      # type: ignore[union-attr]
    try:
        with torch.no_grad(), quiet(), GlobalGenerator(), no_autocast():
            # whole in memory: otherwise its strides become conditions on the length
            program = torch.export.export(module, (traced.contiguous(),), dynamic_shapes=(open_axes,))
    except Exception as error:      # dynamo raises many kinds
        raise TokenizersLabError(f"{system}: torch.export cannot express {part}: {first_line(error)}") from error
    slim(program)
    wanted = run_seeded(reference or module, example)
    check_program(program, reference or module, (example, example[:1].contiguous()), f"{system}: the exported {part}")
    torch.export.save(program, folder / f"{part}.pt2")
    files = {"torch": f"{part}.pt2"}
    if onnx:
        files["onnx"] = export_onnx(folder / f"{part}.onnx", program, system, given, made)
    return {
        "files": files, "input": describe_tensor(given, example), "output": describe_tensor(made, wanted),
        "stochastic": any("rand" in str(node.target) for node in program.graph.nodes),
    }


def check_program(program: torch.export.ExportedProgram, reference: nn.Module, examples: Iterable[Tensor], what: str) -> None:
    """Raise TokenizersLabError unless a program takes each example, one of a single item too, and gives what the module gives."""
    run = program.module()
    for example in examples:
        try:
            found = run_seeded(run, example)
        except AssertionError as error:      # a condition on sizes that tracing left behind
            raise TokenizersLabError(f"{what} does not take {tuple(example.shape)}: {first_line(error)}") from error
        if not same(found, run_seeded(reference, example)):
            raise TokenizersLabError(f"{what} does not give what the tokenizer gives")


def same(found: Tensor, wanted: Tensor) -> bool:
    """Whether two outputs are equal up to TOLERANCE, codes up to a few ties."""
    if found.shape != wanted.shape:
        return False
    if not wanted.is_floating_point():
        return float((found == wanted).double().mean()) >= EQUAL_CODES
    return torch.allclose(found.double(), wanted.double(), atol=TOLERANCE, rtol=TOLERANCE)


def slim(program: torch.export.ExportedProgram) -> None:
    """Drop, in place, the weights that this direction does not use, and the paths and source lines of this machine."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    signature = program.graph_signature
    weights = {spec.arg.name: spec for spec in signature.input_specs if spec.target is not None}
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name in weights and not node.users:
            signature.input_specs.remove(weights[node.name])
            program.state_dict.pop(weights[node.name].target, None)
            program.graph.erase_node(node)
    program.graph_module.recompile()


def export_onnx(file: Path, program: torch.export.ExportedProgram, system: str, given: Side, made: Side) -> str:
    """Write an exported program as ONNX; returns the file's name. Raises TokenizersLabError where ONNX cannot express it."""
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise TokenizersLabError("ONNX export needs onnxscript: pip install onnx onnxscript") from error
    weights = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    try:
        with quiet():
            torch.onnx.export(
                program, (), file, dynamo=True, dynamic_shapes=(given.axes,), input_names=[given.name],
                output_names=[made.name], opset_version=ONNX_OPSET, external_data=weights > ONNX_ONE_FILE, verbose=False)
    except Exception as error:      # an operator without translation, or one that the checker refuses
        raise TokenizersLabError(f"{system}: ONNX cannot express {file.stem}: {first_line(error)}") from error
    return file.name


@torch.no_grad()
def run_seeded(module: nn.Module, example: Tensor) -> Tensor:
    """The module's output, with torch's global generator at a fixed seed while it runs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return module(example)


def describe_tensor(side: Side, example: Tensor) -> dict[str, Any]:
    """Name, shape, type and what else is known of an input or output."""
    shape = [side.axes.get(axis, size) for axis, size in enumerate(example.shape)]
    return {"name": side.name, "shape": shape, "dtype": str(example.dtype).removeprefix("torch."), **side.about}


class GlobalGenerator(TorchFunctionMode):
    """Leaves `generator=None` out of calls: with it, torch's random functions refuse a batch size that is a symbol."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{k: v for k, v in (kwargs or {}).items() if k != "generator" or v is not None})


@contextmanager
def no_autocast() -> Iterator[None]:
    """Regions that turn autocast off leave no trace: it is off, and torch saves such regions in a form that it cannot load."""
    before = torch.autocast
    torch.autocast = lambda *args, **kwargs: nullcontext()      # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.autocast = before      # type: ignore[misc]


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' remarks about themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def first_line(error: Exception) -> str:
    """What an error says first, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
