"""Image encoders behind one interface: images [N, 3, H, W] in 0..1 to features [N, D]."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from driftrl.preprocess import preprocess, statistics


class TransformersEncoder:
    """Pooled features of any image model that `transformers.AutoModel` loads (ResNet, DINOv2, CLIP vision)."""

    def __init__(self, folder: Path | str, device: torch.device | str = "cpu", batch_size: int = 128) -> None:
        """Load the model from a folder or the hub, in float32."""
        from transformers import AutoModel

        model = AutoModel.from_pretrained(folder, dtype=torch.float32)
        self.model = getattr(model, "vision_model", model).to(device).eval().requires_grad_(False)
        config = getattr(model.config, "vision_config", model.config)
        self.device, self.batch_size = torch.device(device), batch_size
        self.size = int(getattr(config, "image_size", 64) or 64)
        self.mean, self.std = statistics(folder)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 [N, D]."""
        parts = []
        for chunk in images.split(self.batch_size):
            pixels = preprocess(chunk.to(self.device), self.size, self.mean, self.std)
            parts.append(self.model(pixel_values=pixels).pooler_output.flatten(1).float())
        return torch.cat(parts)
