"""Predicted mean opinion scores, from 1 to 5: DNSMOS, DistillMOS, ViSQOL and UTMOS, for the table of metrics.

Their packages are an optional extra, `pip install tokenizers-lab[metrics]`; what is missing is said in one line.
"""

import importlib
import logging
import math
import threading
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizers_lab.errors import CheckpointError, WeightsMissing

from .bootstrap import mean_summary

SAMPLE_RATE = 16_000
UTMOS_REPOSITORY, UTMOS_FILE = "balacoon/utmos", "utmos.jit"
DNSMOS_SECONDS = 9.01                  # its window; a new one starts every second
# From the network's outputs to scores (Reddy et al. 2022, "DNSMOS P.835"; the published script's fit), highest power first.
DNSMOS_FITS = {
    "sig": (-0.08397278, 1.22083953, 0.0052439),
    "bak": (-0.13166888, 1.60915514, -0.39604546),
    "ovr": (-0.06766283, 1.11546468, 0.04602535),
}
SHORTEST_VISQOL = 0.5                  # seconds: shorter clips hold none of its patches


def optional_package(name: str, what: str) -> ModuleType:
    """A package of the extra `metrics`. Raises WeightsMissing that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise WeightsMissing(f"{what} needs the package {name}: pip install 'tokenizers-lab[metrics]' ({error})") from error


class DNSMOS:
    """DNSMOS P.835 (Reddy et al. 2022): overall quality, and that of the speech (sig) and of the background (bak).

    The published protocol: a clip shorter than 9.01 s is doubled until it is longer; the mean over windows of 9.01 s, one a
    second.
    """

    def __init__(self) -> None:
        """Raises WeightsMissing, CheckpointError."""
        from tokenizers_lab.assets import find

        runtime = optional_package("onnxruntime", "DNSMOS")
        found = find("dnsmos")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1      # the same digits on any machine
        self._session = runtime.InferenceSession(
            str(found.path / "sig_bak_ovr.onnx"), options, providers=["CPUExecutionProvider"])
        self.provenance = found.source

    def __call__(self, original: Tensor, made: Tensor, about: dict[str, Any]) -> dict[str, Any]:
        """{"value": overall, "sig", "bak"} of a reconstruction (samples,) at 16 kHz."""
        if not len(made):
            return {"value": None, "reason": "it is empty"}
        windows = dnsmos_windows(made.float().clamp(-1, 1).numpy())
        raw = np.concatenate([self._session.run(None, {"input_1": window[None]})[0] for window in windows])      # (windows, 3)
        scores = {name: float(np.polyval(DNSMOS_FITS[name], raw[:, i].astype(np.float64)).mean())
                  for i, name in enumerate(("sig", "bak", "ovr"))}
        return {"value": scores["ovr"], "sig": scores["sig"], "bak": scores["bak"]}


def means_of(*names: str) -> Callable[[Sequence[dict[str, Any]], int], dict[str, Any]]:
    """A summary that gives the means of these numbers too, each with its interval, over clips that have them."""

    def summary(values: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
        cells = [cell for value in values for cell in value.get("channels", [value])]
        return {name: mean_summary([cell[name] for cell in cells], seed) for name in names}

    return summary


def dnsmos_windows(audio: np.ndarray) -> list[np.ndarray]:
    """The windows of a clip (samples,), each of 9.01 s; see `DNSMOS`.

    In the published script the ends of some windows (those that begin at 7 to 23 s, and at 119 to 122 s) round down to a sample
    too few, and it leaves them out, so that of 30 s it hears the first 16. That is kept: its numbers are what others report.
    """
    length = int(DNSMOS_SECONDS * SAMPLE_RATE)
    while len(audio) < length:
        audio = np.concatenate([audio, audio])
    hops = int(math.floor(len(audio) / SAMPLE_RATE) - DNSMOS_SECONDS) + 1
    windows = [audio[i * SAMPLE_RATE : int((i + DNSMOS_SECONDS) * SAMPLE_RATE)].astype(np.float32) for i in range(hops)]
    return [window for window in windows if len(window) >= length]


class DistillMOS:
    """DistillMOS (Stahl and Gamper 2025): quality without a reference, by the package's network and weights."""

    def __init__(self, device: torch.device | str = "cpu"):
        """Raises WeightsMissing, CheckpointError."""
        from tokenizers_lab.assets import find_state_dict

        package = optional_package("distillmos", "DistillMOS")
        self._network = package.ConvTransformerSQAModel(load_weights=False)
        state, self.provenance = find_state_dict("distillmos")
        self._network.load_state_dict(state, strict=True)
        self._network.eval().requires_grad_(False).to(device)
        self._device = device

    def __call__(self, original: Tensor, made: Tensor, about: dict[str, Any]) -> Any:
        """The score of a reconstruction (samples,) at 16 kHz."""
        if not len(made):
            return {"value": None, "reason": "it is empty"}
        with torch.inference_mode():
            return float(self._network(made[None].float().to(self._device)).reshape(()))


class ViSQOL:
    """ViSQOL v3 (Chinen et al. 2020) in speech mode, as visqol-python computes it: similarity mapped to MOS-LQO.

    The mapping is the published lattice where its runtime (ai-edge-litert) is installed, else a polynomial, which gives up to
    2 points more: `provenance` names it. The lattice does not fall steadily: strong white noise scores 1.0 to 2.0 in any order
    (measured). The similarity itself (nsim, 1 for equal clips), which does, stands beside it.
    """

    def __init__(self) -> None:
        """Raises WeightsMissing."""
        package, mappers = optional_package("visqol", "ViSQOL"), optional_package("visqol.quality_mapper", "ViSQOL")
        logging.getLogger("visqol").setLevel(logging.ERROR)
        lattice = bool(mappers.has_lattice_runtime())
        self._api = package.VisqolApi()
        self._api.create(mode="speech", use_lattice_model=lattice)
        self._lock = threading.Lock()      # the mapping's interpreter serves one thread
        mapping = "lattice mapping" if lattice else "polynomial mapping (scores are higher than the lattice's)"
        self.provenance = f"visqol-python {version('visqol-python')}, speech mode, {mapping}"

    def __call__(self, original: Tensor, made: Tensor, about: dict[str, Any]) -> dict[str, Any]:
        """{"value": MOS-LQO, "nsim"} of a reconstruction and its original, both (samples,) at 16 kHz."""
        if len(original) < SHORTEST_VISQOL * SAMPLE_RATE:
            return {"value": None, "reason": f"ViSQOL needs {SHORTEST_VISQOL:g} s"}
        if not original.any():
            return {"value": None, "reason": "the original is silent"}
        with self._lock:
            try:
                found = self._api.measure_from_arrays(original.double().numpy(), made.double().numpy(), SAMPLE_RATE)
            except (ValueError, RuntimeError, IndexError) as error:      # an IndexError: no patch of it holds speech
                return {"value": None, "reason": f"ViSQOL finds nothing to compare in it ({error})"}
        return {"value": float(found.moslqo), "nsim": float(found.vnsim)}


class UTMOS:
    """UTMOS22 strong (Saeki et al. 2022) as TorchScript: a file of the user's, or utmos.jit of balacoon/utmos on the hub."""

    def __init__(self, file: str | None = None, device: torch.device | str = "cpu"):
        """Raises WeightsMissing if it is not here and cannot be fetched, CheckpointError if it cannot be read."""
        from tokenizers_lab.asset_readers import sha256_of

        path = find_utmos(file)
        try:
            self._network = torch.jit.load(str(path), map_location=device).eval()
        except RuntimeError as error:
            raise CheckpointError(f"{path} is no TorchScript file: {str(error).strip().splitlines()[0]}") from error
        self._device = device
        self.provenance = f"{path.name}{'' if file else f' of {UTMOS_REPOSITORY}'}, SHA-256 {sha256_of(path)}"

    def __call__(self, original: Tensor, made: Tensor, about: dict[str, Any]) -> Any:
        """The score of a reconstruction (samples,) at 16 kHz; the published file takes 16-bit integers."""
        if not len(made):
            return {"value": None, "reason": "it is empty"}
        pcm = (made.float().clamp(-1, 1) * 32767).to(torch.int16)
        with torch.inference_mode():
            return float(self._network(pcm[None].to(self._device)).reshape(-1)[0])


def find_utmos(file: str | None = None) -> Path:
    """The TorchScript file: the user's, the hub cache's, or the hub's. Raises WeightsMissing."""
    from huggingface_hub import hf_hub_download

    from tokenizers_lab.asset_fetch import describe_error, offline

    if file is not None:
        if not Path(file).expanduser().is_file():
            raise WeightsMissing(f"UTMOS: there is no file {file}; give the path of {UTMOS_FILE}")
        return Path(file).expanduser()
    try:
        return Path(hf_hub_download(UTMOS_REPOSITORY, UTMOS_FILE, local_files_only=offline()))
    except Exception as error:      # the client's errors are those of the HTTP library of its version
        raise WeightsMissing(
            f"UTMOS needs {UTMOS_FILE} of {UTMOS_REPOSITORY}: run hf download {UTMOS_REPOSITORY} {UTMOS_FILE} --local-dir FOLDER "
            f"where there is a network, and give the file ({describe_error(error)})") from error
