"""diffusers' flow-matching schedulers in the place of our samplers."""

import copy
from typing import Any

import torch
from torch import Tensor

from tokenizers_lab.diffusion.flow import Velocity, mirrored
from tokenizers_lab.diffusion.samplers import Sampler, Times, at_time, steps_of
from tokenizers_lab.errors import InputError

SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")


def scheduler_sampler(
    scheduler: Any, own_times: bool = False, generator: torch.Generator | None = None, **options: Any
) -> Sampler:
    """A sampler that steps by a diffusers FlowMatchEulerDiscreteScheduler or FlowMatchHeunDiscreteScheduler.

    The sampler's times go from noise to data, by either clock: rising ones are the data clock's, falling ones the noise clock's,
    whose time is the scheduler's sigma. They are taken as they are; the scheduler's shift and the like do not apply to them.
    own_times: the scheduler's own sigmas instead (its shift, Karras sigmas, …; `options` such as `mu` go to its set_timesteps),
        as many steps as the times have. diffusers spaces them from 1 to 1/1000 and appends 0: the last step is very small.
    generator: for stochastic schedulers. The given scheduler is copied, and left as it is. Heun's last step is one of Euler.
    Raises InputError on a scheduler of another kind.
    """
    name = type(scheduler).__name__
    if name not in SCHEDULERS:
        raise InputError(f"only flow-matching schedulers can sample a flow, {' or '.join(SCHEDULERS)}, got {name}")
    if own_times and scheduler.config.get("invert_sigmas"):
        raise InputError("a scheduler with invert_sigmas counts by the other clock: give it times, or set it without")

    def sample(velocity: Velocity, noise: Tensor, times: Times) -> Tensor:
        """As all samplers: velocity (x, t) → dx/dt, noise (B, ...), times (n + 1,)."""
        steps = list(steps_of(times))
        by_data = steps[0][0] < steps[0][1]
        flow = mirrored(velocity) if by_data else velocity      # by the noise clock
        stepper, trained = copy.deepcopy(scheduler), scheduler.config.num_train_timesteps
        if own_times:
            stepper.set_timesteps(len(steps), **options)
        else:
            points = [steps[0][0], *(end for _, end in steps)]
            set_sigmas(stepper, torch.tensor([1 - t for t in points] if by_data else points))
        stepper.set_begin_index(0)
        x = noise
        for timestep in stepper.timesteps:
            v = flow(x, at_time(float(timestep) / trained, x)).to(x.dtype)      # the scheduler casts x to the velocity's type
            x = stepper.step(v, timestep, x, generator=generator, return_dict=False)[0]
        return x

    return sample


def set_sigmas(scheduler: Any, sigmas: Tensor) -> None:
    """Give a scheduler exactly these n + 1 sigmas, from noise to data, as if it had made them itself.

    Its set_timesteps would shift them and append 0, and Heun's takes none; both classes step by the two lists set here.
    """
    scheduler._step_index = None
    if scheduler.order == 2:     # inner points stand twice: as the end of a step, and as the beginning of the next
        scheduler.prev_derivative = scheduler.dt = None
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    scheduler.sigmas, scheduler.timesteps = sigmas, sigmas[:-1] * scheduler.config.num_train_timesteps
