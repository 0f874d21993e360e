"""Print the table of diffusers' autoencoders in docs/models.md; a test compares it.

python docs/make_diffusers_table.py
"""

from __future__ import annotations

from vae3d.models.diffusers_classes import CLASSES, NOT_SERVED, DiffusersClass


def row(kind: str, entry: DiffusersClass) -> str:
    cells = [
        f"`{kind}`",
        entry.of,
        entry.published,
        entry.frames.text,
        "exact" if entry.exact_stream else "whole",
        "no" if entry.fixed_size else "blended" if entry.whole_frames else "exact",
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
