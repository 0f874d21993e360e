"""Replay buffer of earlier reconstructions, in bounded host memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vae3d.arguments import ArgumentError, short
from vae3d.restore import check_like

Pair = tuple[Tensor, Tensor]


class ReplayBuffer:
    """Up to `length` pairs of an image [C, H, W] and its context [c, h, w], fp16 on the CPU.

    Memory grows with the pairs, 2 bytes per element. Pairs are replaced, never modified, so a state_dict stays valid.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.pairs: list[Pair] = []

    def __len__(self) -> int:
        return len(self.pairs)

    def push(self, images: Tensor, contexts: Tensor, generator: torch.Generator) -> None:
        """Add [N, C, H, W] and [N, c, h, w]; once full, each pair replaces a random one.

        Pairs that are not finite in fp16 are skipped: they would be drawn for thousands of steps.
        """
        for pair in zip(images.to("cpu", torch.float16), contexts.to("cpu", torch.float16), strict=True):
            if not all(tensor.isfinite().all() for tensor in pair):
                continue
            image, context = (tensor.clone() for tensor in pair)  # a view would keep, and save, the whole batch
            if len(self.pairs) < self.length:
                self.pairs.append((image, context))
            else:
                self.pairs[int(torch.randint(self.length, (), generator=generator))] = image, context

    def gather(self, indices: Tensor, images: Tensor, contexts: Tensor) -> Pair:
        """Pairs by index, where indices from len(self) on refer to the given batch; in the batch's dtypes."""
        kept = len(self.pairs)
        pairs = [self.pairs[i] if i < kept else (images[i - kept], contexts[i - kept]) for i in indices.tolist()]
        return torch.stack([image.to(images) for image, _ in pairs]), torch.stack([c.to(contexts) for _, c in pairs])

    def state_dict(self) -> dict[str, Any]:
        return {"images": [image for image, _ in self.pairs], "contexts": [context for _, context in self.pairs]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ArgumentError if it holds more than `length` pairs, or other things."""
        check_like(state, {"images": None, "contexts": None}, "buffer")
        for name in ("images", "contexts"):
            entries = state[name]
            if not isinstance(entries, list) or not all(isinstance(t, Tensor) and t.ndim == 3 for t in entries):
                raise ArgumentError(f"buffer.{name} is {short(entries)}, not a list of tensors [C, H, W]")
            check_like(entries, entries[:1] * len(entries), f"buffer.{name}")
        if len(state["images"]) != len(state["contexts"]):
            raise ArgumentError(f"buffer has {len(state['images'])} images and {len(state['contexts'])} contexts")
        pairs = list(zip(state["images"], state["contexts"], strict=True))
        if len(pairs) > self.length:
            raise ArgumentError(
                f"the checkpoint's buffer holds {len(pairs)} images; set buffer_length to at least that"
            )
        self.pairs = pairs
