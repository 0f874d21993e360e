"""A griffe extension for mkdocs.yml: "name: meaning." sentences of a docstring become a list of arguments."""

from __future__ import annotations

import re
from typing import Any

from griffe import Class, Docstring, Extension, Function


class ArgumentLists(Extension):
    """Rewrites docstrings for the site; in the code they stay plain text."""

    def on_function(self, *, func: Function, **kwargs: Any) -> None:
        rewrite(func.docstring, {parameter.name.lstrip("*") for parameter in func.parameters})

    def on_class(self, *, cls: Class, **kwargs: Any) -> None:
        rewrite(cls.docstring, {*cls.attributes})
        init = cls.members.get("__init__")
        if isinstance(init, Function):
            names = {parameter.name.lstrip("*") for parameter in init.parameters}
            for docstring in (cls.docstring, init.docstring):
                rewrite(docstring, names)


def rewrite(docstring: Docstring | None, names: set[str]) -> None:
    if docstring is not None:
        docstring.value = "\n\n".join(as_list(part, names) for part in docstring.value.split("\n\n"))


def as_list(paragraph: str, names: set[str]) -> str:
    """A paragraph with its arguments as list items, and what it raises as one of its own."""
    if not names or paragraph.startswith(("    ", "- ")):  # code, or a list
        return paragraph
    name = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    text = " ".join(paragraph.splitlines())
    text = re.sub(r"(?:^|(?<=[.:] ))Raises (?=[A-Z])", "\n\nRaises ", text)
    item = rf"(?:^|(?<=\. )|(?<=\n\n))((?:{name})(?:, (?:{name}))*): "
    listed = re.sub(item, lambda m: "\n\n- " + ", ".join(f"`{n}`" for n in m[1].split(", ")) + ": ", text)
    return listed.strip() if listed != text or "\n\nRaises" in text else paragraph
