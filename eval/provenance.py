"""What every result carries: versions, commit, machine, and the hash of the weights."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

import tokenizers_lab

PACKAGES = ("torch", "torchvision", "torchmetrics", "timm", "transformers", "diffusers", "accelerate", "lpips", "torch-fidelity",
            "numpy", "scipy", "pillow", "safetensors", "torchaudio", "soundfile", "pesq", "pystoi", "onnxruntime", "distillmos",
            "visqol-python")


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that can change a number."""
    found = {"tokenizers-lab": tokenizers_lab.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_commit(folder: Path | None = None) -> str | None:
    """Commit of the checkout that the package runs from, with "-dirty" if tracked files differ; none for an installed wheel."""
    root = (folder or Path(tokenizers_lab.__file__).parent.parent).resolve()
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (subprocess.SubprocessError, OSError):
        return None


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Machine, interpreter, package versions and commit, as JSON data. No host, user or path."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(device),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "packages": package_versions(),
        "commit": git_commit(),
    }


def processor_name(device: torch.device | str = "cpu") -> str:
    """Name of the GPU, or of the CPU where the system tells it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    if sys.platform == "linux":
        try:
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
        except OSError:
            pass
    return platform.processor() or platform.machine()


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 of the weights as `save_pretrained` would write them: equal to `sha256sum model.safetensors`."""
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
    return hashlib.sha256(save(state, metadata={"format": "pt"})).hexdigest()


def pixels_sha256(image: torch.Tensor) -> str:
    """SHA-256 of an image (3, H, W) in [0, 1] as uint8, rows of RGB."""
    return hashlib.sha256((image * 255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy().tobytes()).hexdigest()


def samples_sha256(audio: torch.Tensor) -> str:
    """SHA-256 of a clip (channels, samples) as little-endian float32."""
    return hashlib.sha256(audio.float().contiguous().cpu().numpy().astype("<f4").tobytes()).hexdigest()


def text_sha256(lines: list[str]) -> str:
    """SHA-256 of lines of text, such as the hashes of a data set's images."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def write_json(value: Any, path: Path) -> Path:
    """Write JSON in one piece (aside, then renamed); NaN and infinities are refused with ValueError."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)     # temporary files are private; a result is not
    os.replace(file.name, path)
    return path
