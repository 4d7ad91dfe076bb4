"""The README.md of saved weights."""

import json
from typing import Any

from tokenizers_lab.registry import get_system

SPDX = {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-sa-4.0", "openrail"}


def model_card(system: str, config: dict[str, Any]) -> str:
    """Text of a model card. config: what config.json holds (`system`, `model`, `provenance`).

    Names the paper, where the weights come from and the upstream licence; weights without a known licence say so.
    """
    described = get_system(system)
    provenance = config.get("provenance") or {}
    licence = str(provenance.get("licence", "")).lower()
    name = "generator" if described.kind == "generator" else "tokenizer"
    tags = ", ".join(dict.fromkeys([name, described.kind, system]))
    header = ["---", "library_name: tokenizers-lab", f"tags: [{tags}]"]
    if licence:
        header.append(f"license: {licence if licence in SPDX else 'other'}")
    lines = [
        *header, "---", f"# {system}", "", f"{described.summary}. {described.paper}.", "",
        "```python", "import tokenizers_lab", "",
        f'{name} = tokenizers_lab.load("FOLDER_OR_HUB_ID")', *USAGE[described.kind], "```", "", "## Weights", "",
    ]
    about = provenance.get("tokenizer")
    if isinstance(about, dict):
        lines.append(f"Of the latents of {about.get('name')}, whose weights have the SHA-256 {about.get('sha256')}.")
    origin = provenance.get("converted_from")
    if origin:
        lines.append(f"Converted from the authors' release {origin} ({provenance.get('source', '')}), file "
                     f"{provenance.get('file', '')}, SHA-256 {provenance.get('file_sha256', '')}.")
        lines.append(f"Licence of the release: {provenance.get('licence', 'not stated')}.")
    if provenance.get("init_from"):
        lines.append(f"Training started from {provenance['init_from']}.")
    if not provenance:
        lines.append("Trained with tokenizers-lab.")
    if not licence:
        lines.append("Licence of the weights: not stated.")
    lines += ["", "## Options", "", "```json", json.dumps(config["model"], indent=1, sort_keys=True), "```", ""]
    return "\n".join(lines)


USAGE = {
    "image": ["latents = tokenizer.encode(images).latents     # images: float (B, 3, H, W) in [0, 1]",
              "images = tokenizer.decode(latents)"],
    "speech": ["codes = tokenizer.encode(audio).codes     # audio: float (B, channels, samples) in [-1, 1]",
               "audio = tokenizer.decode(codes)"],
    "generator": ["latents = generator.sample(labels, seeds)     # labels: int64 (B,); seeds: a number for each image",
                  "latents = generator.denormalise(latents)      # (B, C, h, w), for the tokenizer that config.json names"],
}
