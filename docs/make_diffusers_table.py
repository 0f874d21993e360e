"""Print the table of diffusers' autoencoders in docs/models.md; a test compares it.

python docs/make_diffusers_table.py
"""

from __future__ import annotations

from vae3d.models.diffusers_classes import CLASSES, NOT_SERVED, DiffusersClass

FRAMES = {
    "any_number": "any",
    "one_plus": "1 + n x stride",
    "multiples": "n x stride",
    "_cogvideox": "8 n, 1 + 8 n",
    "_kvae_video": "1 + 4 n, not 21 + 16 n",
    "_vidtok": "1 + n x stride",
    "_minimax": "5 + 17 n, from 22",
}


def row(kind: str, entry: DiffusersClass) -> str:
    cells = [
        f"`{kind}`",
        entry.of,
        entry.published,
        FRAMES[entry.frames.__name__],
        "exact" if entry.exact_stream else "whole",
        "blended" if entry.blended_tiles else "no",
        "open" if entry.open_seam else "closed",
        entry.latent,
        "ours" if entry.blocks else "diffusers'",
        entry.note[:1].upper() + entry.note[1:],
    ]
    return f"| {' | '.join(cells)} |"


def table() -> str:
    head = "| class | of | latents | frames | streams | tiles | seam | encode returns | checkpointing | note |"
    rows = [row(kind, entry) for kind, entry in CLASSES.items()]
    reasons: dict[str, list[str]] = {}
    for kind, reason in NOT_SERVED.items():
        reasons.setdefault(reason, []).append(f"`{kind}`")
    refused = [f"- {', '.join(kinds)}: {reason}." for reason, kinds in reasons.items()]
    seams: dict[str, list[str]] = {}
    for kind, entry in CLASSES.items():
        if entry.open_seam:
            seams.setdefault(entry.open_seam, []).append(f"`{kind}`")
    open_seams = [f"- {', '.join(kinds)}: {reason}." for reason, kinds in seams.items()]
    lines = [head, "|---" * 10 + "|", *rows, "", "The seam of a panorama stays open:", "", *open_seams]
    return "\n".join([*lines, "", "Not served:", "", *refused])


if __name__ == "__main__":
    print(table())
