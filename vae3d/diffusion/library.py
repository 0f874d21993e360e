"""Access to diffusers, an optional dependency."""

from __future__ import annotations

import importlib
from typing import Any

from vae3d.errors import UserError


def from_diffusers(name: str, module: str = "diffusers") -> Any:
    """Import a class of diffusers. Raises UserError if diffusers is not installed, or is too old to have it."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise UserError(f"{name} needs diffusers, which is not installed: pip install -e .[diffusion]") from error
    except AttributeError as error:
        raise UserError(f"the installed diffusers has no {name}: pip install --upgrade diffusers") from error
