"""Hooks of mkdocs.yml: README.md and other files of the repository become part of the site, and links to them work."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
LINK = re.compile(r"(\]\()([^)\s]+)\)")
# The Python API, by the headings of its page. The names of vae3d.__all__ are all here (tests/test_docs.py).
API = {
    "Models": [
        *("vae3d.load", "vae3d.from_pretrained", "vae3d.build", "vae3d.list_models", "vae3d.save", "vae3d.push_to_hub"),
        *("vae3d.VideoAutoencoder", "vae3d.types.LatentSpec", "vae3d.types.Posterior", "vae3d.types.Delta"),
        *("vae3d.types.Reconstruction", "vae3d.models.interface.Stream"),
    ],
    "Networks": [
        *("vae3d.models.wan.WanVAE", "vae3d.models.opensora.OpenSoraVAE", "vae3d.models.temporal.TemporalVAE"),
        *("vae3d.models.spatial.SpatialVAE", "vae3d.models.taehv.TAEHV", "vae3d.models.taesd.TAESD"),
        "vae3d.models.diffusers_vae.DiffusersVAE",
    ],
    "Videos": ["vae3d.Video", "vae3d.read_video", "vae3d.write_video", "vae3d.reconstruct", "vae3d.score"],
    "Latents": ["vae3d.open_codec", "vae3d.LatentCodec", "vae3d.latents.cache.LatentCache"],
    "Losses": [
        *("vae3d.losses.objective.Objective", "vae3d.losses.objective.WeightedTerm", "vae3d.losses.objective.Term"),
        *("vae3d.losses.objective.PixelTerm", "vae3d.losses.objective.ErrorMap", "vae3d.types.ClipBatch"),
        *(f"vae3d.losses.pixel.{name}" for name in ("L1", "MSE", "Charbonnier", "Sobel", "Wavelet")),
        *("vae3d.losses.perceptual.LPIPS", "vae3d.losses.cube.CubeL1", "vae3d.losses.cube.CubeLPIPS"),
        *(f"vae3d.losses.latent.{name}" for name in ("KL", "LatentL1", "Identity")),
        *("vae3d.losses.distillation.LatentDistillation", "vae3d.losses.distillation.FeatureDistillation"),
        *("vae3d.losses.equivariance.Equivariance", "vae3d.losses.pixel_weights.ErpCosine"),
    ],
    "Adversaries": [
        *("vae3d.adversarial.base.Adversary", "vae3d.adversarial.gan.Gan", "vae3d.adversarial.seraena.Seraena"),
        "vae3d.adversarial.adaptive.AdaptiveWeight",
    ],
    "Metrics": [
        *("vae3d.metrics.build_metrics", "vae3d.metrics.MetricSet", "vae3d.metrics.VideoResult"),
        *("vae3d.metrics.Score", "vae3d.metrics.Metric", "vae3d.metrics.base.SeriesMetric"),
        *("vae3d.metrics.base.Chunk", "vae3d.metrics.MetricError"),
    ],
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File  # not for the tests of this file

    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text()))
    files.append(File.generated(config, "api.md", content=api_page()))
    for path in sorted((ROOT / "examples").glob("*.py")):
        files.append(File.generated(config, f"examples/{path.name}", content=path.read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return with_site_links(markdown, page.file.src_uri)


def with_site_links(markdown: str, page: str) -> str:
    """Links between files of the repository, as links between files of the site. page: path in the site."""
    source = {target: name for name, target in PAGES.items()}.get(page, f"docs/{page}")

    def site_link(match: re.Match[str]) -> str:
        path, hash_, anchor = match[2].partition("#")
        if not path or ":" in path:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        target = PAGES.get(target, target.removeprefix("docs/"))
        return f"{match[1]}{posixpath.relpath(target, posixpath.dirname(page) or '.')}{hash_}{anchor})"

    return LINK.sub(site_link, markdown)


def api_page() -> str:
    """A page for mkdocstrings."""
    lines = ["# Python API", "", "Generated from the docstrings. [Python](python.md) shows how to use it.", ""]
    for heading, names in API.items():
        lines += [f"## {heading}", "", *(f"::: {name}\n" for name in names)]
    return "\n".join(lines)


def as_list(paragraph: str, names: set[str]) -> str:
    """A paragraph with its arguments as list items, and what it raises as one of its own."""
    if not names or paragraph.startswith(("    ", "- ")):  # code, or a list
        return paragraph
    name = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    text = " ".join(paragraph.splitlines())
    text = re.sub(r"(?:^|(?<=[.:] ))Raises (?=\w)", "\n\nRaises ", text)
    item = rf"(?:^|(?<=\. )|(?<=\n\n))((?:{name})(?:, (?:{name}))*): "
    listed = re.sub(item, lambda m: "\n\n- " + ", ".join(f"`{n}`" for n in m[1].split(", ")) + ": ", text)
    return re.sub(" +\n", "\n", listed).strip() if listed != text or "\n\nRaises" in text else paragraph
