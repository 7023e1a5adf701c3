"""Rewards: any callable ``(images float32 [N, 3, H, W] in 0..1, N prompts) -> Tensor[N]``."""
