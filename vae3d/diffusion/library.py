"""The library diffusers, an extra of this package."""

from __future__ import annotations

import importlib
from typing import Any

from vae3d.errors import UserError


def from_diffusers(name: str, module: str = "diffusers") -> Any:
    """A class of diffusers. Raises UserError if diffusers is not installed, or has no such class."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise UserError(
            f"{name} is a class of diffusers, which is not installed: pip install -e .[diffusion]"
        ) from error
    except AttributeError as error:
        raise UserError(f"the installed diffusers has no {name}: pip install --upgrade diffusers") from error
