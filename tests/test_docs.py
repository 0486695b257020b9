"""The documentation: every page is in the site's navigation, every link leads somewhere, the wording is plain."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
SOURCES = sorted((ROOT / "src" / "ddim").rglob("*.py"))
OTHERS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "CHANGELOG.md")}

# Words that have a usual term: design.md and glossary.md have the terms.
BANNED = re.compile(
    r"\b(network calls?|pictures?|said aloud|its like|anew|gone on|go(es)? on with|slips?|mend(s|ed|ing)?|strangers?|"
    r"pilots?|teachers?|other codes?|another code|categorical data|data of categories|told|begun|unasked|"
    r"as is said|cannot be had|held against)\b",
    re.IGNORECASE,
)


def prose(text: str) -> str:
    """The text without code, which shows commands, options and output as they are, and without generated results."""
    text = text.split("<!-- results -->")[0]
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


@pytest.mark.parametrize("page", PAGES)
def test_every_page_is_in_the_navigation(page: str) -> None:
    assert re.search(rf"[ :]{re.escape(page)}$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_of_the_site(page: str) -> None:
    """A link out of docs/ would be broken on the site."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(PAGES[page])):
        if not target.startswith(("http://", "https://", "#")):
            path = (DOCS / page).parent / target.partition("#")[0]
            assert path.is_file(), f"{page}: {target} does not exist"
            assert path.resolve().is_relative_to(DOCS), f"{page}: {target} is not part of the site"


@pytest.mark.parametrize("page", [name for name in PAGES if "\n::: " in PAGES[name]])
def test_the_reference_names_modules_that_exist(page: str) -> None:
    for module in re.findall(r"^::: (\S+)$", PAGES[page], re.MULTILINE):
        path = ROOT / "src" / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), f"{page}: {module}"


@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_the_wording_is_plain(page: str) -> None:
    matches = BANNED.findall(prose({**PAGES, **OTHERS}[page]))
    assert not matches, f"{page}: {', '.join(match[0] for match in matches)}"


def test_the_banned_words_are_detected() -> None:
    assert BANNED.search(prose("ten network calls"))
    assert not BANNED.search(prose("`--pictures 100` in ten network evaluations\n\n    ddim x --pictures 3\n"))


# Keys of files and options of the first version, which are still read.
KEPT = re.compile(
    r"""--pictures|--pilots|["'](pictures|begun)["':,]|tail_pictures|network_calls|begun_from|# begun: older runs"""
)


def test_the_wording_of_the_source_is_plain() -> None:
    """Messages, docstrings, comments and names."""
    found = {}
    for path in [*sorted((ROOT / "src" / "ddim").rglob("*.py")), ROOT / "README.md"]:
        text = KEPT.sub("", path.read_text(encoding="utf-8")).replace("_", " ")
        if matches := [match[0] for match in BANNED.findall(text)]:
            found[str(path)] = matches
    assert not found
