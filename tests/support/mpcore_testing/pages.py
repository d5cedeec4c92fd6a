"""What every HTML page of the project has to be: closed, and complete without a network."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text between tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check_fetches_nothing(page: str) -> None:
    """Fails if a browser would ask a network for something, or run something."""
    elements = Elements(page).found
    forbidden = {"script", "link", "img", "iframe", "object", "embed", "base", "image"}
    assert not forbidden & {tag for tag, _ in elements}
    fetching = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"}
    targets = [v for _, attributes in elements for n, v in attributes.items() if n in fetching]
    # a file in the page itself is fetched from nowhere
    kept = ("#", "data:text/csv;charset=utf-8,")
    assert all((target or "").startswith(kept) for target in targets)
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", page))


def check_well_formed(page: str) -> None:
    """Fails if a tag stays open, an id is there twice or is referred to and not there."""
    elements = Elements(page)
    assert elements.open == []
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(ids)


def pictures(page: str) -> list[dict[str, str | None]]:
    """The attributes of every plot."""
    return [attributes for tag, attributes in Elements(page).found if tag == "svg"]
