"""A griffe extension of mkdocs.yml: the arguments in a docstring become a list."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from griffe import Class, Docstring, Extension, Function

sys.path.insert(0, str(Path(__file__).parent))
from site_hooks import as_list


class ArgumentLists(Extension):
    """Rewrites docstrings for the site; in the code they stay plain text."""

    def on_function(self, *, func: Function, **kwargs: Any) -> None:
        rewrite(func.docstring, {parameter.name.lstrip("*") for parameter in func.parameters})

    def on_class(self, *, cls: Class, **kwargs: Any) -> None:
        init = cls.members.get("__init__")
        names = {parameter.name.lstrip("*") for parameter in init.parameters} if isinstance(init, Function) else set()
        rewrite(cls.docstring, names | {*cls.attributes})


def rewrite(docstring: Docstring | None, names: set[str]) -> None:
    if docstring is not None:
        docstring.value = "\n\n".join(as_list(paragraph, names) for paragraph in docstring.value.split("\n\n"))
