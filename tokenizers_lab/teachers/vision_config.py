"""Which frozen vision network `teachers.vision.build_vision_teacher` loads. Light to import, for configs."""

from dataclasses import dataclass, field


@dataclass
class VisionTeacherConfig:
    """A frozen network whose patch features a tokenizer learns to predict."""

    backend: str = "transformers"     # transformers, timm, asset (see `toklab assets`), random (transformers config, seeded)
    source: str = "facebook/dinov3-vitl16-pretrain-lvd1689m"   # hub id, local path, timm name or asset name
    input_size: int = 0               # pixels a side given to the network; 0: as published for this kind of teacher
    config: dict[str, str] = field(default_factory=dict)       # backend random: the network's config
