"""Replay buffer of earlier reconstructions, in bounded host memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vae3d.arguments import ArgumentError, short
from vae3d.restore import check_like
from vae3d.text import plural
from vae3d.transfer import to_device

Pair = tuple[Tensor, Tensor]


class ReplayBuffer:
    """Up to `length` pairs of an image [C, H, W] and its context [c, h, w], fp16 on the CPU.

    max_bytes: of all pairs, 2 per element; fewer pairs than `length` are kept if they reach it. None: no limit. Memory
    grows with the pairs. Pairs are replaced, never modified, so a state_dict stays valid.
    """

    def __init__(self, length: int, max_bytes: int | None = None) -> None:
        self.length, self.max_bytes = length, max_bytes
        self.pairs: list[Pair] = []

    @staticmethod
    def bytes_of(image: int, context: int) -> int:
        """Bytes of a pair, from the numbers of elements."""
        return (image + context) * torch.float16.itemsize

    def capacity(self, pair_bytes: int) -> int:
        """How many pairs are kept; 0 if a single one is larger than max_bytes."""
        return self.length if self.max_bytes is None else min(self.length, self.max_bytes // pair_bytes)

    def __len__(self) -> int:
        return len(self.pairs)

    def push(self, images: Tensor, contexts: Tensor, generator: torch.Generator) -> None:
        """Add [N, C, H, W] and [N, c, h, w]; once full, each pair replaces a random one.

        Pairs that are not finite in fp16 are skipped: they would be drawn for thousands of steps.
        """
        capacity = self.capacity(self.bytes_of(images[0].numel(), contexts[0].numel()))
        for pair in zip(images.to("cpu", torch.float16), contexts.to("cpu", torch.float16), strict=True):
            if not all(tensor.isfinite().all() for tensor in pair):
                continue
            image, context = (tensor.clone() for tensor in pair)  # a view would keep, and save, the whole batch
            if len(self.pairs) < capacity:
                self.pairs.append((image, context))
            else:
                self.pairs[int(torch.randint(capacity, (), generator=generator))] = image, context

    def gather(self, indices: Tensor, images: Tensor, contexts: Tensor) -> Pair:
        """Pairs by index, where indices from len(self) on refer to the given batch; in the batch's dtypes and device.

        indices: on the CPU.
        """
        kept = len(self.pairs)
        old = [self.pairs[i] for i in indices.tolist() if i < kept]
        # Positions in the batch followed by the old pairs that were drawn, which go to the device in one copy.
        fresh = indices >= kept
        places = torch.where(fresh, indices - kept, len(images) - 1 + (~fresh).cumsum(0))
        places = to_device(places, images.device)

        def chosen(batch: Tensor, drawn: list[Tensor]) -> Tensor:
            if drawn:
                batch = torch.cat([batch, to_device(torch.stack(drawn), batch.device).to(batch.dtype)])
            return batch.index_select(0, places)

        return chosen(images, [image for image, _ in old]), chosen(contexts, [context for _, context in old])

    def state_dict(self) -> dict[str, Any]:
        return {"images": [image for image, _ in self.pairs], "contexts": [context for _, context in self.pairs]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ArgumentError if it holds more pairs than this buffer may, or other things."""
        check_like(state, {"images": None, "contexts": None}, "buffer")
        for name in ("images", "contexts"):
            entries = state[name]
            if not isinstance(entries, list) or not all(isinstance(t, Tensor) and t.ndim == 3 for t in entries):
                raise ArgumentError(f"buffer.{name} is {short(entries)}, not a list of tensors [C, H, W]")
            check_like(entries, entries[:1] * len(entries), f"buffer.{name}")
        if len(state["images"]) != len(state["contexts"]):
            raise ArgumentError(
                f"buffer has {plural(len(state['images']), 'image')} and {len(state['contexts'])} contexts"
            )
        pairs = list(zip(state["images"], state["contexts"], strict=True))
        if len(pairs) > self.length:
            raise ArgumentError(
                f"the checkpoint's buffer holds {plural(len(pairs), 'image')}; set buffer_length to at least that"
            )
        if pairs and len(pairs) > self.capacity(pair := self.bytes_of(*(tensor.numel() for tensor in pairs[0]))):
            raise ArgumentError(
                f"the checkpoint's buffer holds {plural(len(pairs), 'image')}, {len(pairs) * pair / 2**30:.3g} GiB; "
                "set buffer_gib to at least that, or to null"
            )
        self.pairs = pairs
