"""An image tokenizer with continuous latents as diffusers' AutoencoderKL, for diffusers' pipelines and training scripts."""

import os
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor

from tokenizers_lab.errors import CheckpointError, InputError
from tokenizers_lab.network import CONFIG_FILE, WEIGHTS_FILE
from tokenizers_lab.tokenizer import ImageTokenizer

WAYS_OF_READING = {      # options of diffusers' from_pretrained that change how files are read, not what is loaded
    "disable_mmap", "low_cpu_mem_usage", "max_memory", "offload_folder", "offload_state_dict", "use_flashpack", "use_safetensors",
}
POINT_LOGVAR = -30.0      # log-variance that diffusers' distribution calls the smallest; of latents without a spread


class DiffusersAutoencoder(ModelMixin, ConfigMixin):
    """Answers AutoencoderKL's protocol: images in [-1, 1], `encode(x).latent_dist`, `decode(z).sample`, `config`.

    Latents are those of `ImageTokenizer.encode`, normalised by the saved statistics, hence scaling_factor 1 and
    shift_factor 0. A pipeline takes it as `vae=DiffusersAutoencoder(tokenizer)`; saved with the pipeline, its folder is
    an ordinary saved tokenizer. Raises InputError if the tokenizer has no continuous latents, or if its downsampling is
    no power of two, which is all that `config.block_out_channels` can express.
    """

    def __init__(self, tokenizer: ImageTokenizer):
        super().__init__()
        channels = latent_channels(tokenizer)
        halvings = tokenizer.downsample.bit_length() - 1
        if tokenizer.downsample != 2**halvings:
            raise InputError(f"diffusers' pipelines need a downsampling that is a power of two, not {tokenizer.downsample}")
        self.tokenizer = tokenizer
        self.register_to_config(
            in_channels=3,
            out_channels=3,
            latent_channels=channels,
            scaling_factor=1.0,
            shift_factor=0.0,
            sample_size=getattr(tokenizer.cfg, "image_size", 256),
            # pipelines compute 2 ** (len − 1) as the downsampling and never look at the numbers themselves
            block_out_channels=(channels,) * (halvings + 1),
            force_upcast=False,
        )

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """x: (B, 3, H, W) in [-1, 1]. Returns AutoencoderKLOutput, whose `latent_dist` is over (B, C, h, w), or a 1-tuple.

        Raises InputError on unusable images.
        """
        images = x / 2 + 0.5
        try:
            encoding = self.tokenizer.encode(images)
        except InputError as error:
            raise InputError(f"{error} (in diffusers' convention, that is [-1, 1] here)") from error
        assert encoding.latents is not None
        mean, posterior = encoding.latents, encoding.posterior
        spread = None if posterior is None else posterior.logvar
        if spread is None:
            logvar = torch.full_like(mean, POINT_LOGVAR)
        else:      # the posterior is over un-normalised latents: Var(z / s) = Var(z) / s²
            logvar = spread - 2 * latent_std(self.tokenizer).to(spread).log()
        parameters = torch.cat([mean, logvar], dim=1).to(self.dtype)
        latent_dist = DiagonalGaussianDistribution(parameters, deterministic=spread is None)
        return AutoencoderKLOutput(latent_dist=latent_dist) if return_dict else (latent_dist,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> Any:
        """z: (B, C, h, w). Returns DecoderOutput, whose `sample` is (B, 3, H, W) in [-1, 1], or a 1-tuple.

        generator: for stochastic decoders; a list has one for each item.
        """
        if isinstance(generator, list):
            images = torch.cat([self.tokenizer.decode(z[i : i + 1], one) for i, one in enumerate(generator)])
        else:
            images = self.tokenizer.decode(z, generator)
        sample = (images * 2 - 1).to(self.dtype)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self, sample: Tensor, sample_posterior: bool = False, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> Any:
        """The reconstruction of images in [-1, 1], as `decode` gives it."""
        latent_dist = self.encode(sample).latent_dist
        latents = latent_dist.sample(generator) if sample_posterior else latent_dist.mode()
        return self.decode(latents, return_dict, generator)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Save the tokenizer as `tokenizer.save_pretrained` does; diffusers' options of file formats do not apply."""
        self.tokenizer.save_pretrained(os.fspath(save_directory))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], torch_dtype: torch.dtype | None = None,
        subfolder: str | None = None, **options: Any,
    ) -> "DiffusersAutoencoder":
        """The adapter of whatever `tokenizers_lab.load` takes, or of a subfolder of a folder or of a hub repository.

        Other options of diffusers are taken where they cannot change what is loaded, or where they are None. Raises InputError
        on any other (`revision`, `variant`), and on a tokenizer of audio; CheckpointError, WeightsMissing as `load`.
        """
        from tokenizers_lab.hub import load

        given = [name for name, value in options.items() if value is not None and name not in WAYS_OF_READING]
        if given:
            raise InputError(f"from_pretrained cannot honour {', '.join(given)}: leave it out, and load a folder with that")
        name = os.fspath(pretrained_model_name_or_path)
        tokenizer = load(name if subfolder is None else saved_subfolder(name, subfolder))
        if not isinstance(tokenizer, ImageTokenizer):
            raise InputError(f"{pretrained_model_name_or_path} is a {tokenizer.system} tokenizer: diffusers needs one of images")
        adapter = cls(tokenizer)
        return adapter if torch_dtype is None else adapter.to(torch_dtype)


def saved_subfolder(name: str, subfolder: str) -> Path:
    """A subfolder of a local folder, or of a hub repository, of which only that is fetched. Raises as `hub_snapshot`."""
    from tokenizers_lab.hub import hub_snapshot

    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.count("/") != 1 or name.endswith("/official"):
            raise CheckpointError(f"{name} is no folder and no hub id, so it has no subfolder {subfolder}")
        folder = hub_snapshot(name, [f"{subfolder}/{file}" for file in (CONFIG_FILE, WEIGHTS_FILE)])
    if not (folder / subfolder).is_dir():
        raise CheckpointError(f"{name} has no subfolder {subfolder}")
    return folder / subfolder


def latent_channels(tokenizer: ImageTokenizer) -> int:
    """C of the continuous latents, by the buffer `latent_mean` or the option `latent_channels`. Raises InputError without."""
    mean: Any = getattr(tokenizer, "latent_mean", None)
    if mean is not None:
        return int(mean.numel())
    if hasattr(tokenizer.cfg, "latent_channels"):
        return int(tokenizer.cfg.latent_channels)
    raise InputError(f"a {tokenizer.system} tokenizer has no continuous latents, which diffusers' AutoencoderKL protocol needs")


def latent_std(tokenizer: ImageTokenizer) -> Tensor:
    """The standard deviation by which `encode` divides each channel: (C, 1, 1); 1 where latents are not normalised."""
    std: Any = getattr(tokenizer, "latent_std", None)
    return (torch.ones(latent_channels(tokenizer)) if std is None else std).reshape(-1, 1, 1)
