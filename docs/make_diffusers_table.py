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
        entry.latent,
        "ours" if entry.blocks else "diffusers'",
        entry.note[:1].upper() + entry.note[1:],
    ]
    return f"| {' | '.join(cells)} |"


def table() -> str:
    head = "| class | of | latents | frames | streams | tiles | encode returns | checkpointing | note |"
    rows = [row(kind, entry) for kind, entry in CLASSES.items()]
    reasons: dict[str, list[str]] = {}
    for kind, reason in NOT_SERVED.items():
        reasons.setdefault(reason, []).append(f"`{kind}`")
    refused = [f"- {', '.join(kinds)}: {reason}." for reason, kinds in reasons.items()]
    return "\n".join([head, "|---" * 9 + "|", *rows, "", "Not served:", "", *refused])


if __name__ == "__main__":
    print(table())
