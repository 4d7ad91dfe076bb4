"""The training loop: one function, read from top to bottom."""

import json
import math
import time
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed.nn.functional  # before there are processes: see cli/common.process_group
from accelerate import Accelerator, DistributedDataParallelKwargs

from tokenizers_lab.config import override_objective
from tokenizers_lab.data.loader import build_loader
from tokenizers_lab.draw import Draw, stable_seed
from tokenizers_lab.errors import ConfigError, TrainingError
from tokenizers_lab.settings import RunConfig
from tokenizers_lab.training import run as run_parts
from tokenizers_lab.training.checkpoint import prune_checkpoints
from tokenizers_lab.training.guard import find_jump, mean_terms
from tokenizers_lab.training.objective import ADVERSARIAL, weighted_sum
from tokenizers_lab.training.optim import (
    build_optimizer,
    discriminator_learning_rate,
    ema_decay,
    learning_rate,
    set_learning_rate,
    update_ema,
)
from tokenizers_lab.training.run import Adversary, GeneratorStep, RunResult, State
from tokenizers_lab.training.signals import StopFlag
from tokenizers_lab.training.tracking import Meter, Tracker, check_trackers


def train(cfg: RunConfig, resume: run_parts.Resume = "never") -> RunResult:
    """Train `cfg` to its end, a signal or its time limit; the run's folder then holds a checkpoint of the last step.

    resume: never, must, auto or fresh, see `prepare_run_folder`. A resumed run is the same run, bit for bit, on the same
    number of processes. Raises TrainingError, CheckpointError, ConfigError, DataError, WeightsMissing.
    """
    began = time.monotonic()
    check_trackers(cfg.train.trackers)
    best, sign = run_parts.best_metric(cfg)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),      # else accelerate leaves torchrun's processes on a CPU unjoined
        mixed_precision=cfg.train.precision, log_with=cfg.train.trackers or None, project_dir=cfg.out,
        # batch-norm buffers stay per rank (broadcasting them breaks a backward after two forwards);
        # a stage may leave parameters unused, as the mask token without a mask
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)],
    )
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    micro_batch, left_over = divmod(cfg.train.batch_size, world * cfg.train.accumulate)
    if left_over or not micro_batch:
        raise ConfigError(f"train.batch_size {cfg.train.batch_size} does not divide into {world} processes × "
                          f"{cfg.train.accumulate} micro-batches")

    def agree(ok: bool) -> bool:      # also a barrier
        return bool(accelerator.reduce(torch.tensor(float(not ok), device=device), "sum") == 0)

    # --- folder, networks, checkpoint -------------------------------------------------------------------------------
    run, checkpoint = run_parts.prepare_run_folder(cfg, resume, main=rank == 0)
    agree(True)      # all ranks have looked before rank 0 writes
    nets = run_parts.build_networks(cfg, device, resumed=checkpoint is not None)
    state, data_state = State(), None
    saved_optimizers: dict[str, Any] = {}
    if checkpoint is not None:
        state, saved_optimizers, data_state = run_parts.read_checkpoint(checkpoint, nets, accelerator)
    saved_step = state.step if checkpoint is not None else -1
    lengths = run_parts.stage_lengths(cfg, world)
    total_steps = sum(steps for steps, _ in lengths)
    unvalidated = cfg.data.val and state.validated != state.step      # a signal came while it was validating
    if state.step >= total_steps and not unvalidated:
        return RunResult(run, state.step, total_steps, "finished")
    if cfg.train.trackers:
        accelerator.init_trackers(run.name, config={"system": cfg.system, "name": cfg.name})
    loader = build_loader(cfg.data, micro_batch, cfg.train.seed, rank, world, start_step=state.step * cfg.train.accumulate,
                          state=data_state, quarantine=run / "quarantine.jsonl")
    batches = iter(loader)
    tracker = Tracker(run, total_steps, state.step, rank == 0, accelerator)
    for name, source in nets.objective.provenance().items():
        tracker.say(f"{name}: {source}")
    if rank == 0:
        (run / "provenance.json").write_text(json.dumps(nets.objective.provenance(), indent=1) + "\n")
    if checkpoint is not None:
        tracker.say(f"resumed from {checkpoint}")
    meter = Meter()
    intervals = {"validate": cfg.train.validate_every, "save": cfg.train.checkpoint_every}
    interval_began, interval_samples = time.monotonic(), 0

    with StopFlag() as stop:
        first = 0
        for stage, (steps, unit) in zip(cfg.stages, lengths):
            first, last = first + steps, first + steps      # `last`: global step at which the stage ends
            if state.step > last or (state.step == last and not unvalidated):
                continue
            start = last - steps

            # --- stage: which parts train, which options and optimisers ---------------------------------------------
            nets.objective.cfg = override_objective(cfg.objective, stage.objective)
            if state.step == start:
                for part in stage.fresh:
                    nets.part(part).load_state_dict(nets.initial[part])
                nets.objective.begin_stage(nets.tokenizer, stage)
            nets.select(stage.parts)
            if cfg.train.compile:
                torch.compiler.reset()      # compiled code does not notice that other parts train now
            nets.tokenizer.train()
            nets.objective.train()
            generator = GeneratorStep(nets.tokenizer, nets.objective)
            generator_params = [p for p in generator.parameters() if p.requires_grad]
            optimizers: dict[str, Any] = {}
            optimizers["generator"] = build_optimizer(generator.named_parameters(), cfg.train.optimizer, stage.lr_scale)
            generator, optimizers["generator"] = accelerator.prepare(generator, optimizers["generator"])
            adversary = None
            if any(stage.weights.get(term) for term in ADVERSARIAL) and len(nets.objective.discriminators):
                nets.objective.discriminators.requires_grad_(True)
                adversary = Adversary(nets.objective, cfg.train, accelerator, agree)
                optimizers["discriminator"] = adversary.optimizer
            if state.step > start:
                for name, optimizer in optimizers.items():
                    optimizer.load_state_dict(saved_optimizers[name])
            size = sum(p.numel() for p in generator_params)
            tracker.say(f"stage {stage.name}: steps {state.step} to {last}, {size:,} parameters train")

            while True:
                # --- boundary: validate, save, stop; the state is whole here ----------------------------------------
                out_of_time = cfg.train.max_minutes is not None and time.monotonic() - began > 60 * cfg.train.max_minutes
                flags = accelerator.reduce(torch.tensor([float(stop.raised), float(out_of_time)], device=device), "sum").tolist()
                interrupted, ends = flags[0] > 0, state.step == last
                due = {name: state.step > 0 and every > 0 and state.step % every == 0 for name, every in intervals.items()}
                if cfg.data.val and (ends or due["validate"]) and state.validated != state.step and not interrupted:
                    metrics = run_parts.validate(nets, cfg, accelerator, stop)
                    if metrics is None:      # a signal came while validating; a resumed run validates first
                        interrupted = True
                    else:
                        tracker.log(state.step, stage.name, "val", metrics)
                        state.validated, state.validation, unvalidated = state.step, metrics, False
                        if saved_step == state.step:      # resumed after a signal in the middle of validating
                            saved_step, due["save"] = -1, True
                        value = sign * metrics[best]
                        if state.best is None or value > state.best:
                            state.best, due["save"] = value, True
                stops = interrupted or flags[1] > 0
                if (ends or stops or due["save"]) and state.step != saved_step:
                    state.stage = stage.name
                    run_parts.write_checkpoint(run, cfg, state, nets, optimizers, data_state, accelerator, agree)
                    saved_step = state.step
                    if rank == 0:
                        prune_checkpoints(run, cfg.train.keep_last, cfg.train.keep_best, "-" * (sign < 0) + best)
                if stops and (state.step < total_steps or (cfg.data.val and state.validated != state.step)):
                    tracker.close()
                    return RunResult(run, state.step, total_steps, "interrupted" if interrupted else "out of time", stop.raised)
                if ends:
                    break

                # --- one step ---------------------------------------------------------------------------------------
                done, length = (state.step - start) * unit, steps * unit
                nets.objective.progress = (state.step - start) / steps
                lr = learning_rate(stage, stage.lr, done, length)
                set_learning_rate(optimizers["generator"], lr)
                active = run_parts.active_terms(stage, done)
                rival = adversary if active & ADVERSARIAL else None
                if rival is not None:
                    rival.begin(state.step)
                    set_learning_rate(rival.optimizer, discriminator_learning_rate(stage, done, length))
                draw = Draw(cfg.train.seed, rank, state.step, device)
                torch.manual_seed(stable_seed(cfg.train.seed, rank, state.step, "dropout"))      # for dropout inside backbones
                before = [b.clone() for b in nets.buffers()]
                finite, taken, all_logs = torch.ones((), device=device), [], []
                for micro in range(cfg.train.accumulate):
                    batch, data_state = next(batches)
                    batch = batch.to(device)
                    taken.append(batch)
                    synchronise = micro == cfg.train.accumulate - 1
                    with nullcontext() if synchronise else accelerator.no_sync(generator):
                        judge = rival.judge if rival is not None and rival.first else None
                        losses = generator(batch, draw.within(f"micro{micro}"), active, judge)
                        loss = weighted_sum(losses.terms, stage.weights)
                        accelerator.backward(loss / cfg.train.accumulate)
                    if rival is not None and not rival.first:
                        rival.judge(losses.real, losses.fake)
                    finite = finite * loss.detach().isfinite()
                    all_logs.append({"loss": loss, **losses.terms, **losses.logs})
                norms = {"grad_norm": accelerator.clip_grad_norm_(generator_params, cfg.train.optimizer.clip or float("inf"))}
                finite = finite * norms["grad_norm"].isfinite()
                jump, guard = None, cfg.train.guard
                if guard.jump:
                    values = mean_terms(all_logs, guard.terms or sorted(active), accelerator)
                    jump = find_jump(guard, values, state.terms, state.step)
                    state.terms |= {name: value for name, value in values.items() if math.isfinite(value)}
                if rival is not None:
                    assert rival.norm is not None      # the objective has called judge
                    norms["discriminator_grad_norm"], finite = rival.norm, finite * rival.finite
                    all_logs += rival.logs
                if agree(bool(finite)):      # no rank updates unless all can
                    state.strikes = 0
                    for logs in [*all_logs, norms]:
                        meter.add(logs)
                    if rival is not None:
                        rival.update()
                    if rival is not None and rival.large:
                        tracker.say(f"step {state.step}: a loss of the discriminators is too large; they are not updated")
                    if jump is not None:
                        tracker.say(f"step {state.step}: {jump}; no update")
                    else:
                        optimizers["generator"].step()
                        update_ema(nets.ema, nets.tokenizer, ema_decay(cfg.train.ema, cfg.train.ema_rampup, state.step))
                        nets.objective.after_step(nets.tokenizer)
                else:
                    state.strikes += 1
                    for buffer, old in zip(nets.buffers(), before):
                        buffer.copy_(old)
                    kept = run_parts.save_bad_batches(run, state.step, rank, taken)
                    tracker.say(f"step {state.step}: a loss or gradient is not finite; no update; the batch is kept in {kept}")
                    if state.strikes >= cfg.train.max_strikes:
                        tracker.close()
                        raise TrainingError(f"{state.strikes} steps in a row were not finite: look at {run}/nonfinite, lower the "
                                            "learning rate, or go on from the last checkpoint with --resume")
                optimizers["generator"].zero_grad(set_to_none=True)
                state.step += 1
                state.validation = {}

                # --- numbers ----------------------------------------------------------------------------------------
                interval_samples += sum(map(len, taken))
                if state.step % cfg.train.log_every == 0 or state.step == last:
                    means = meter.read()
                    row = accelerator.reduce(torch.stack(list(means.values())), "mean").tolist() if means else []
                    record = dict(zip(means, row))      # empty where no step of the interval was finite
                    seconds = time.monotonic() - interval_began
                    speed = float(accelerator.reduce(torch.tensor(float(interval_samples), device=device), "sum")) / seconds
                    waiting = loader.wait_seconds() / seconds
                    record |= {"lr": lr, "samples_per_second": speed, "waiting": waiting}
                    tracker.log(state.step, stage.name, "train", record)
                    note = f"loss {record.get('loss', float('nan')):.4f}  {speed:.1f}/s  data {waiting:.0%}"
                    if device.type == "cuda":
                        note += f"  GPU {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
                    tracker.progress(state.step, stage.name, note)
                    interval_began, interval_samples = time.monotonic(), 0
                else:
                    tracker.progress(state.step, stage.name)
            accelerator.free_memory()
    tracker.close()
    return RunResult(run, state.step, total_steps, "finished")

