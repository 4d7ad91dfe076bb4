"""What surrounds the loop: the run's folder, its networks, and what a checkpoint of it holds."""

import copy
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenizers_lab.config import load_config, save_config
from tokenizers_lab.data.loader import len_batches, len_samples, validation_batches
from tokenizers_lab.draw import stable_seed
from tokenizers_lab.errors import CheckpointError, ConfigError, TrainingError
from tokenizers_lab.metrics import GENERATOR_METRICS, IMAGE_METRICS, SPEECH_METRICS
from tokenizers_lab.network import Network, load_weights, read_config, read_weights, write_network_files
from tokenizers_lab.registry import get_system
from tokenizers_lab.settings import RunConfig, StageConfig, TrainConfig
from tokenizers_lab.teachers.cache import cached_provenance, check_sources
from tokenizers_lab.training.checkpoint import (
    STATE,
    list_checkpoints,
    load_torch,
    newest_checkpoint,
    read_state,
    save_checkpoint,
    set_aside_newer,
)
from tokenizers_lab.training.guard import too_large
from tokenizers_lab.training.objective import Judge, Losses, Objective
from tokenizers_lab.training.optim import build_optimizer
from tokenizers_lab.training.signals import StopFlag

# options that do not change what is learned; the data's own checks notice when other data stand at the place
MAY_CHANGE = {"out", "name", "data.train", "data.val", "data.features", "data.workers", "data.bad_fraction", "data.max_pixels",
              "data.samples",
              *(f"train.{name}" for name in ("max_minutes", "log_every", "validate_every", "checkpoint_every", "keep_last",
                                             "keep_best", "best", "max_strikes", "compile", "trackers"))}
VALIDATION_METRICS = {"image": IMAGE_METRICS, "speech": SPEECH_METRICS, "generator": GENERATOR_METRICS}
DEFAULT_BEST = {"image": "psnr", "speech": "-mel", "generator": "-velocity_mse"}
Resume = Literal["never", "must", "auto", "fresh"]


@dataclass
class State:
    """The small numbers that a checkpoint carries."""

    step: int = 0                     # finished steps
    stage: str = ""                   # stage of the last finished step
    strikes: int = 0                  # non-finite steps in a row
    validated: int = -1               # step of the last validation
    validation: dict[str, float] = field(default_factory=dict)   # its metrics, if it was at `step`
    terms: dict[str, float] = field(default_factory=dict)        # last values of the losses that train.guard looks at
    best: float | None = None         # best value of the metric `train.best` so far


@dataclass
class RunResult:
    """How a call of `train` ended."""

    folder: Path
    step: int
    total: int
    status: Literal["finished", "interrupted", "out of time"]
    signal: int = 0                   # number of the signal that interrupted it


class GeneratorStep(nn.Module):
    """Tokenizer (or generator) and heads as one module with one forward, as DDP needs it."""

    def __init__(self, tokenizer: Network, objective: Objective):
        super().__init__()
        self.tokenizer, self.heads = tokenizer, objective.heads
        self._losses = objective.generator_losses      # not a submodule: discriminators and frozen networks stay outside

    def forward(self, batch: Any, draw: Any, active: frozenset[str], judge: Judge | None = None) -> Losses:
        """The objective's generator losses."""
        return self._losses(self.tokenizer, batch, draw, active, judge)


class DiscriminatorStep(nn.Module):
    """The discriminators as one module with one forward."""

    def __init__(self, objective: Objective):
        super().__init__()
        self.discriminators = objective.discriminators
        self._losses = objective.discriminator_losses

    def forward(self, real: Tensor, fake: Tensor) -> Losses:
        """The objective's discriminator losses."""
        return self._losses(real, fake)


class Adversary:
    """The discriminators' half of a step: their loss and gradient for each micro-batch, then their update.

    Where they come first, `judge` is called in the middle of the generator's forward pass and updates after the last
    micro-batch, if their own loss and gradient are finite; the generator's, which follow, cannot take that back. Else the loop
    calls `update` together with the generator's.
    """

    def __init__(self, objective: Objective, cfg: TrainConfig, accelerator: Accelerator, agree: Callable[[bool], bool]):
        step = DiscriminatorStep(objective)
        self.first = objective.discriminators_first
        self.parameters = list(step.parameters())
        optimizer = build_optimizer(step.named_parameters(), cfg.discriminator_optimizer)
        self.step, self.optimizer = accelerator.prepare(step, optimizer)
        self.clip, self.accumulate = cfg.discriminator_optimizer.clip or float("inf"), cfg.accumulate
        self.guard = cfg.guard
        self.accelerator, self.agree = accelerator, agree
        self.begin()

    def begin(self, step: int = 0) -> None:
        """Forget the last step. step: number of the one that begins; `large` says in its end whether a loss was too large."""
        self.number, self.large = step, False
        self.logs: list[dict[str, Tensor]] = []
        self.finite: Tensor | float = 1.0
        self.norm: Tensor | None = None
        self.optimizer.zero_grad(set_to_none=True)

    def judge(self, real: Tensor, fake: Tensor) -> None:
        """Loss and gradient of a micro-batch; fake is detached."""
        last = len(self.logs) == self.accumulate - 1
        with nullcontext() if last else self.accelerator.no_sync(self.step):
            judged = self.step(real, fake.detach())
            loss = torch.stack(list(judged.terms.values())).sum()
            self.accelerator.backward(loss / self.accumulate)
        self.logs.append({**judged.terms, **judged.logs})
        self.finite = self.finite * loss.detach().isfinite()
        self.large = self.large or too_large(self.guard, judged.terms, self.number)
        if last:
            self.norm = self.accelerator.clip_grad_norm_(self.parameters, self.clip)
            self.finite = self.finite * self.norm.isfinite()
            if self.guard.discriminator:
                self.large = not self.agree(not self.large)
            if self.first and self.agree(bool(self.finite)) and not self.large:
                self.optimizer.step()

    def update(self) -> None:
        """Step, unless that was done already."""
        if not self.first and not self.large:
            self.optimizer.step()


@dataclass
class Networks:
    """Everything with weights, by role."""

    tokenizer: Network
    ema: Network
    objective: Objective
    initial: dict[str, dict[str, Tensor]]      # first weights of the parts that a stage makes `fresh`

    def part(self, name: str) -> nn.Module:
        """`heads` and `discriminators` of the objective, else a submodule of the tokenizer."""
        if name in ("heads", "discriminators"):
            return getattr(self.objective, name)
        try:
            return self.tokenizer.get_submodule(name)
        except AttributeError:
            known = ", ".join(n for n, _ in self.tokenizer.named_children())
            raise ConfigError(f"a stage names the part '{name}'; there are: {known}, heads, discriminators") from None

    def select(self, parts: list[str]) -> None:
        """Let only these parts train (empty: all)."""
        self.tokenizer.requires_grad_(not parts)
        self.objective.heads.requires_grad_(not parts)
        for name in parts:
            self.part(name).requires_grad_(True)

    def trained_state(self) -> dict[str, Tensor]:
        """Heads, discriminators and copies; the frozen networks are not saved."""
        return {k: v for k, v in self.objective.state_dict().items() if not k.startswith("frozen.")}

    def buffers(self) -> list[Tensor]:
        """Tensors that a forward pass may change: codebook statistics, batch-norm means."""
        return [*self.tokenizer.buffers(), *self.objective.heads.buffers(), *self.objective.discriminators.buffers()]


def build_networks(cfg: RunConfig, device: torch.device, resumed: bool = False) -> Networks:
    """The network that ships, its moving average and the objective, with seeded first weights or those of `init_from` (unless
    resumed)."""
    system = get_system(cfg.system)
    torch.manual_seed(stable_seed(cfg.train.seed, "init") % 2**63)
    tokenizer = system.resolve("tokenizer")(cfg.model)
    objective = build_objective(cfg)
    initial: dict[str, dict[str, Tensor]] = {}
    networks = Networks(tokenizer, tokenizer, objective, initial)
    for part in {name for stage in cfg.stages for name in stage.fresh}:
        initial[part] = {k: v.clone() for k, v in networks.part(part).state_dict().items()}
    if cfg.init_from and not resumed:
        init_from(networks, cfg.init_from)
    for part, source in cfg.init_parts.items() if not resumed else ():
        networks.part(part)      # refuses one that is not there
        tokenizer.provenance = {**tokenizer.provenance, f"init_parts.{part}": tokenizer.start_part(part, source)}
    if not resumed:
        tokenizer.start_run(cfg)
    networks.tokenizer.to(device)
    networks.objective.to(device)
    networks.ema = copy.deepcopy(tokenizer).requires_grad_(False).eval()
    if cfg.train.activation_checkpointing:
        from tokenizers_lab.nn.transformer import set_activation_checkpointing

        set_activation_checkpointing(tokenizer, True)
    if cfg.train.compile:      # forward alone would leave encode and decode eager: compile what they call
        wrapped = objective.frozen.children()      # teachers and LPIPS are called by other methods; their networks by forward
        for group in (tokenizer, objective.heads, objective.discriminators, objective.copies, *wrapped):
            for module in group.children():
                module.compile()
    return networks


def build_objective(cfg: RunConfig) -> Objective:
    """The objective of a run; teachers whose features are cached are not loaded. Raises ConfigError if the cache does not fit."""
    kind = get_system(cfg.system).resolve("objective")
    features = getattr(cfg.data, "features", None)
    if features is None:
        return kind(cfg.objective, cfg.model)
    if not hasattr(kind, "precompute"):
        raise ConfigError(f"{cfg.system} takes no cached features: leave data.features out")
    objective = kind(cfg.objective, cfg.model, cached=cached_provenance(Path(features)))
    check_sources(Path(features), objective.feature_sources())
    return objective


def init_from(networks: Networks, source: str) -> None:
    """Start from a run, checkpoint, saved folder or hub id: its weights for tokenizer and EMA alike, its heads if they fit."""
    from tokenizers_lab.hub import load, resolve_folder

    loaded = load(source)
    if loaded.system != networks.tokenizer.system:
        raise CheckpointError(f"init_from: {source} is a {loaded.system} tokenizer, not {networks.tokenizer.system}")
    load_weights(networks.tokenizer, loaded.state_dict(), f"init_from: {source}")
    networks.tokenizer.provenance = {**loaded.provenance, "init_from": source}
    folder = resolve_folder(source)
    for file in (folder / "heads.safetensors", folder / "training" / "objective.safetensors"):
        if file.exists():
            others = ("discriminators.", "copies.")
            heads = {k.removeprefix("heads."): v for k, v in read_weights(file).items() if not k.startswith(others)}
            own = networks.objective.heads.state_dict()
            if heads.keys() == own.keys() and all(own[k].shape == v.shape for k, v in heads.items()):
                networks.objective.heads.load_state_dict(heads)
            elif own:
                warnings.warn(f"init_from: the heads in {file} do not fit this objective and start anew", stacklevel=2)


def stage_lengths(cfg: RunConfig, world: int = 1) -> list[tuple[int, float]]:
    """(steps, units a step) of each stage: the unit is a step, or an epoch where the stage is given in epochs.

    world: number of processes; with data.batch_frames an epoch has steps according to it. Raises ConfigError, DataError.
    """
    units = None      # samples of an epoch, or batches of whole clips; and of a step
    lengths = []
    for stage in cfg.stages:
        if stage.steps is not None:
            lengths.append((stage.steps, 1.0))
            continue
        units = units or _units(cfg, world, stage.name)
        assert stage.epochs is not None      # checked when the config was loaded
        lengths.append((round(stage.epochs * units[0] / units[1]), units[1] / units[0]))
    return lengths


def _units(cfg: RunConfig, world: int, stage: str) -> tuple[int, int]:
    """Samples of an epoch and of a step; with data.batch_frames, micro-batches of both."""
    if getattr(cfg.data, "batch_frames", None) is None:
        samples = len_samples(cfg.data)
        if samples is None:
            raise ConfigError(f"stage '{stage}' is given in epochs, but shards do not tell their size: set data.samples")
        return samples, cfg.train.batch_size
    micro_batches = world * cfg.train.accumulate
    batches = len_batches(cfg.data, cfg.train.batch_size // micro_batches)
    if batches is None:
        raise ConfigError(f"stage '{stage}' is given in epochs, but shards do not tell how many batches of data.batch_frames "
                          "they make: give its length in steps, or list the clips in a manifest")
    return batches, micro_batches


def active_terms(stage: StageConfig, done: float) -> frozenset[str]:
    """Loss terms that count after `done` of the stage, in its unit."""
    return frozenset(k for k, weight in stage.weights.items() if weight and done >= stage.starts.get(k, 0.0))


def prepare_run_folder(cfg: RunConfig, resume: Resume, main: bool) -> tuple[Path, Path | None]:
    """The run's folder and the checkpoint to go on from. A fresh start never happens by accident.

    never: an existing run is an error; must: so is a missing one; auto: go on if there is one; fresh: delete the old run.
    """
    run = Path(cfg.out) / f"{cfg.system}-{cfg.name}"
    found = list_checkpoints(run)
    if resume == "fresh" and main and run.exists():
        shutil.rmtree(run)
    if resume == "fresh":
        found = []
    if found and resume == "never":
        raise TrainingError(f"{run} holds a run already: go on with --resume, delete it with --fresh, or choose another name=…")
    if not found and resume == "must":
        raise TrainingError(f"there is nothing to resume in {run}: leave --resume out to start")
    checkpoint = newest_checkpoint(run) if found else None
    if found and checkpoint is None:
        raise CheckpointError(f"every checkpoint in {run}/checkpoints is damaged: restore one, or start again with --fresh")
    if checkpoint is not None:
        refuse_other_config(cfg, run / "config.yaml")
        if main:
            set_aside_newer(run, checkpoint)
    if main:
        run.mkdir(parents=True, exist_ok=True)
        save_config(cfg, run / "config.yaml")
    return run, checkpoint


def refuse_other_config(cfg: RunConfig, saved: Path) -> None:
    """A resumed run is the same run. Raises ConfigError naming the first option that would make another of it."""
    old, new = (dict(_options(asdict(c))) for c in (load_config(str(saved)), cfg))
    for key in sorted(old.keys() | new.keys()):
        if key not in MAY_CHANGE and old.get(key) != new.get(key):
            raise ConfigError(f"{saved} has {key}={old.get(key)}, not {new.get(key)}: resume with the same value, choose another "
                              "name=…, or start anew with --fresh")


def _options(section: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _options(value, f"{path}{name}.")
        elif isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            for number, item in enumerate(value):
                yield from _options(item, f"{path}{name}.{number}.")
        else:
            yield f"{path}{name}", list(value) if isinstance(value, tuple) else value


def write_checkpoint(run: Path, cfg: RunConfig, state: State, nets: Networks, optimizers: dict[str, Any], data_state: Any,
                     accelerator: Accelerator, agree: Callable[[bool], bool]) -> None:
    """Save everything that a bit-exact resume needs; each rank adds its own buffers and place in the data."""

    def shared(folder: Path) -> None:
        write_network_files(folder, cfg.system, cfg.model, nets.ema.state_dict(), nets.tokenizer.provenance)
        for name, tensors in (("raw", nets.tokenizer.state_dict()), ("objective", nets.trained_state())):
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / "training" / f"{name}.safetensors")
        torch.save(interned({k: o.state_dict() for k, o in optimizers.items()}), folder / "training" / "optimizers.pt")
        (folder / STATE).write_text(json.dumps(asdict(state), indent=1) + "\n")

    def own(folder: Path) -> None:
        buffers = [b.detach().cpu() for b in nets.buffers()]
        torch.save({"buffers": buffers, "data": data_state, "world": accelerator.num_processes},
                   folder / "training" / f"rank_{accelerator.process_index}.pt")

    save_checkpoint(run, state.step, shared, own, accelerator.process_index, agree)


def interned(value: Any) -> Any:
    """The same dicts and lists with one object for equal keys: pickle writes a string that it has seen as a reference, so that
    the bytes of equal states would depend on which of them were once loaded."""
    if isinstance(value, dict):
        return {sys.intern(k) if isinstance(k, str) else k: interned(v) for k, v in value.items()}
    return [interned(v) for v in value] if isinstance(value, list) else value


def read_checkpoint(folder: Path, nets: Networks, accelerator: Accelerator) -> tuple[State, dict[str, Any], Any]:
    """Load the networks in place; returns the state, the optimisers' states by name, and this rank's place in the data."""
    state = State(**read_state(folder))
    nets.tokenizer.provenance = read_config(folder)["provenance"]
    load_weights(nets.tokenizer, read_weights(folder / "training/raw.safetensors"), str(folder))
    load_weights(nets.ema, read_weights(folder / "model.safetensors"), str(folder))
    saved = read_weights(folder / "training/objective.safetensors")
    own = nets.trained_state()
    if saved.keys() != own.keys():
        raise CheckpointError(f"{folder} was made with another objective: {sorted(saved.keys() ^ own.keys())[0]} does not fit")
    nets.objective.load_state_dict(saved, strict=False)
    rank_file = folder / "training" / f"rank_{accelerator.process_index}.pt"
    if not rank_file.exists():      # more processes than before: start from the first one's buffers
        rank_file = folder / "training" / "rank_0.pt"
    rank = load_torch(rank_file)
    if rank["world"] != accelerator.num_processes:
        warnings.warn(f"{folder} was made by {rank['world']} processes, this is {accelerator.num_processes}: "
                      "the run goes on, but not bit for bit", stacklevel=2)
    for target, source in zip(nets.buffers(), rank["buffers"], strict=True):
        target.copy_(source)
    return state, load_torch(folder / "training/optimizers.pt"), rank["data"]


def save_bad_batches(run: Path, step: int, rank: int, batches: list[Any]) -> Path:
    """Keep the inputs of a non-finite step for inspection: tensors as safetensors, the samples' keys in its header."""
    folder = run / "nonfinite"
    folder.mkdir(exist_ok=True)
    tensors: dict[str, Tensor] = {}
    keys: list[str] = []
    for number, batch in enumerate(batches):
        keys += batch.keys
        tensors |= {f"{number}.{k}": v.cpu() for k, v in vars(batch).items() if isinstance(v, Tensor)}
    path = folder / f"step_{step:08d}_rank_{rank}.safetensors"
    save_file(tensors, path, metadata={"keys": "\n".join(keys)})
    with safe_open(path, "pt"):
        return path


@torch.no_grad()
def validate(nets: Networks, cfg: RunConfig, accelerator: Accelerator, stop: StopFlag) -> dict[str, float] | None:
    """Held-out means of the metrics with the EMA weights, each sample once over all ranks. None if a signal came."""
    names = VALIDATION_METRICS[get_system(cfg.system).kind]
    sums = torch.zeros(len(names) + 2, dtype=torch.float64)      # the metrics, the samples, the signal
    micro_batch = max(cfg.train.batch_size // (cfg.train.accumulate * accelerator.num_processes), 1)
    for batch in validation_batches(cfg.data, micro_batch, accelerator.process_index, accelerator.num_processes):
        if stop.raised:
            break
        values = nets.objective.held_out_metrics(nets.ema, batch.to(accelerator.device))
        sums[:-2] += torch.stack([values[name].double().sum().cpu() for name in names])
        sums[-2] += len(batch)
    sums[-1] = stop.raised
    *totals, count, signals = accelerator.reduce(sums.to(accelerator.device), "sum").tolist()
    return None if signals else {name: total / count for name, total in zip(names, totals)}


def best_metric(cfg: RunConfig) -> tuple[str, int]:
    """(the validation metric of the best checkpoint, 1 where greater is better or −1). Raises ConfigError if there is none."""
    kind = get_system(cfg.system).kind
    wanted = cfg.train.best or DEFAULT_BEST[kind]
    name = wanted.removeprefix("-")
    if name not in VALIDATION_METRICS[kind]:
        raise ConfigError(f"train.best must be one of {', '.join(VALIDATION_METRICS[kind])}, with a minus where smaller is "
                          f"better, not '{wanted}'")
    return name, -1 if wanted.startswith("-") else 1
