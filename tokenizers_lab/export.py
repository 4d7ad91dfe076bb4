"""A tokenizer as files that run without this package: torch.export programs of encode and decode, and ONNX."""

import copy
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tokenizers_lab.errors import InputError, TokenizersLabError
from tokenizers_lab.tokenizer import ImageTokenizer, Tokenizer

EXPORT_FILE = "export.json"
ONNX_OPSET = 20
ONNX_ONE_FILE = 1_800_000_000      # bytes of weights; larger ones lie beside the .onnx, as protobuf allows 2 GB
TOLERANCE = 1e-4                   # of the check that each exported program gives what the tokenizer gives


class Encode(nn.Module):
    """`encode` with tensors only: images to deterministic latents, or codes of a discrete tokenizer."""

    def __init__(self, tokenizer: ImageTokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W) in [0, 1]."""
        encoding = self.tokenizer.encode(images)
        stored = encoding.codes if encoding.latents is None else encoding.latents
        assert stored is not None      # encode gives one of the two
        return stored


class Decode(nn.Module):
    """`decode` with tensors only."""

    def __init__(self, tokenizer: ImageTokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, stored: Tensor) -> Tensor:
        """stored: what Encode gives. Returns images (B, 3, H, W) in [0, 1]."""
        return self.tokenizer.decode(stored)


def export_tokenizer(
    tokenizer: Tokenizer, folder: str | os.PathLike[str], size: int | None = None, onnx: bool = False
) -> dict[str, Any]:
    """Write encode.pt2, decode.pt2 and export.json (shapes, ranges, origin) into a folder; returns what export.json says.

    size: pixels a side of the images, fixed in the files (default: the training size); any batch size from 1 on. The
    programs are for float32 on the CPU (torch.export.passes.move_to_device_pass moves them) and draw from torch's global
    generator where decoding is stochastic. onnx: encode.onnx and decode.onnx too.
    Raises InputError on a size that the tokenizer cannot take, TokenizersLabError where it cannot be exported.
    """
    if not isinstance(tokenizer, ImageTokenizer):
        raise InputError(f"a {tokenizer.system} tokenizer cannot be exported yet: only those of images can")
    size = size or int(getattr(tokenizer.cfg, "image_size", 256))
    if size < 1:
        raise InputError(f"the size of the images must be at least 1, not {size}")
    frozen = copy.deepcopy(tokenizer).requires_grad_(False).eval().to("cpu", torch.float32)
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, size, size, generator=draw)
    stored = run_seeded(Encode(frozen), images)
    name = "latents" if stored.is_floating_point() else "codes"
    parts = {"encode": (Encode(frozen), "images", images, name), "decode": (Decode(frozen), name, stored, "images")}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".exporting-", dir=folder))
    try:
        described = {part: export_part(staging, part, *what, onnx=onnx) for part, what in parts.items()}
        about = {
            "system": frozen.system, "size": size, "downsample": frozen.downsample, **described,
            "parameters": sum(p.numel() for p in frozen.parameters()), "provenance": frozen.provenance,
            "torch": torch.__version__,
        }
        (staging / EXPORT_FILE).write_text(json.dumps(about, indent=1) + "\n")
        for file in sorted(staging.iterdir()):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return about


def export_part(
    folder: Path, part: str, module: nn.Module, input_name: str, example: Tensor, output_name: str, onnx: bool
) -> dict[str, Any]:
    """Write one direction and check it against the module; returns its entry of export.json."""
    system = str(module.tokenizer.system)      # type: ignore[union-attr]
    batch = torch.export.Dim("batch", min=1)
    try:
        # two items to trace, three to check: a batch size that got fixed on the way is found out
        with torch.no_grad(), quiet(), GlobalGenerator():
            program = torch.export.export(module, (example[:2],), dynamic_shapes=({0: batch},))
    except Exception as error:      # dynamo raises many kinds
        raise TokenizersLabError(f"{system}: torch.export cannot express {part}: {first_line(error)}") from error
    slim(program)
    wanted, made = run_seeded(module, example), run_seeded(program.module(), example)
    if made.shape != wanted.shape or not torch.allclose(made.double(), wanted.double(), atol=TOLERANCE, rtol=TOLERANCE):
        raise TokenizersLabError(f"{system}: the exported {part} does not give what the tokenizer gives")
    torch.export.save(program, folder / f"{part}.pt2")
    files = {"torch": f"{part}.pt2"}
    if onnx:
        files["onnx"] = export_onnx(folder / f"{part}.onnx", program, system, input_name, output_name)
    return {
        "files": files, "input": describe_tensor(input_name, example), "output": describe_tensor(output_name, wanted),
        "stochastic": any("rand" in str(node.target) for node in program.graph.nodes),
    }


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


def export_onnx(file: Path, program: torch.export.ExportedProgram, system: str, input_name: str, output_name: str) -> str:
    """Write an exported program as ONNX; returns the file's name. Raises TokenizersLabError where ONNX cannot express it."""
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise TokenizersLabError("ONNX export needs onnxscript: pip install onnx onnxscript") from error
    weights = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    try:
        with quiet():
            torch.onnx.export(
                program, (), file, dynamo=True, dynamic_shapes=({0: "batch"},), input_names=[input_name],
                output_names=[output_name], opset_version=ONNX_OPSET, external_data=weights > ONNX_ONE_FILE, verbose=False)
    except Exception as error:      # an operator without translation, or one that the checker refuses
        raise TokenizersLabError(f"{system}: ONNX cannot express {file.stem}: {first_line(error)}") from error
    return file.name


@torch.no_grad()
def run_seeded(module: nn.Module, example: Tensor) -> Tensor:
    """The module's output, with torch's global generator at a fixed seed while it runs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return module(example)


def describe_tensor(name: str, example: Tensor) -> dict[str, Any]:
    """Name, shape, type and, of images, the range of an input or output."""
    about = {"name": name, "shape": ["batch", *example.shape[1:]], "dtype": str(example.dtype).removeprefix("torch.")}
    return about | ({"range": [0, 1]} if name == "images" else {})


class GlobalGenerator(TorchFunctionMode):
    """Leaves `generator=None` out of calls: with it, torch's random functions refuse a batch size that is a symbol."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{k: v for k, v in (kwargs or {}).items() if k != "generator" or v is not None})


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
