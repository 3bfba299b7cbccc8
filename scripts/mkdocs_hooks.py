"""Pages of the documentation site that lie outside `docs/`; mkdocs.yml names this file.

Links in `docs/*.md` are those that work in the repository (`../RESULTS.md`); here they become links of the site.
"""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# Path in the repository -> path in the site
OUTSIDE = {
    'RESULTS.md': 'results.md',
    'CONTRIBUTING.md': 'contributing.md',
    'CHANGELOG.md': 'changelog.md',
    'assets/readme/method.svg': 'method.svg',
}


def on_files(files: Files, config: Any) -> Files:
    """Add the files."""
    for source, target in OUTSIDE.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point the links to them, and theirs to the pages in `docs/`."""
    is_outside = page.file.src_uri in OUTSIDE.values()
    for source, target in OUTSIDE.items():
        markdown = markdown.replace(f']({"" if is_outside else "../"}{source}', f']({target}')
    return markdown.replace('](docs/', '](') if is_outside else markdown
