"""What the site has beside the pages of docs/: the README as its first page, CONTRIBUTING and the
changelog, the pictures of the benchmarks, and links to files of the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
# page of the site -> file of the repository that it is made of
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
PICTURES = "benchmarks/results"


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages of other folders, and the pictures that pages show."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    for picture in sorted((ROOT / PICTURES).rglob("*.png")):
        place = f"results/{picture.relative_to(ROOT / PICTURES).as_posix()}"
        files.append(File.generated(config, place, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links of a page, as the site has them."""
    there = page.file.src_uri
    folder = (ROOT / PAGES[there] if there in PAGES else ROOT / "docs" / there).parent

    def target(match: re.Match) -> str:
        return f"]({site_link(match[1], folder, there, config.repo_url)}"

    return re.sub(r"\]\(([^)\s]+)", target, markdown)


def site_link(link: str, folder: Path, page: str, repository: str) -> str:
    """A link of a page, which lies in `folder`: relative inside the site, else to the repository.

    Args:
        link: as the page has it, relative or absolute.
        folder: of the file that the page is made of.
        page: its place on the site.
        repository: the address of the repository.
    """
    name, mark, anchor = link.partition("#")
    raw = repository.replace("github.com", "raw.githubusercontent.com") + "/main/"
    for start in (f"{repository}/blob/main/", f"{repository}/tree/main/", raw):
        if name.startswith(start):
            name = name.removeprefix(start)
            folder = ROOT
    if not name or ":" in name:
        return link
    path = (folder / name).resolve()
    if not path.is_relative_to(ROOT):
        return link
    inside = path.relative_to(ROOT).as_posix()
    made = {source: made for made, source in PAGES.items()}
    if inside in made:
        inside = made[inside]
    elif inside.startswith("docs/") and path.is_file():
        inside = inside.removeprefix("docs/")
    elif inside.startswith(PICTURES) and inside.endswith(".png"):
        inside = f"results/{inside.removeprefix(PICTURES + '/')}"
    else:
        kind = "tree" if path.is_dir() else "blob"
        return f"{repository}/{kind}/main/{inside}{mark}{anchor}"
    return "../" * page.count("/") + inside + mark + anchor
