"""Builds the shipped texts of the corpus from the packages they come from (needed only to change the corpus).

    apt-get download dict-devil && dpkg -x dict-devil_*.deb devil
    pip download --no-deps pluggy==1.7.0 jupyterlab-language-pack-ru-RU==4.5.post3 \
        jupyterlab-language-pack-zh-CN==4.5.post3 && unzip of each into one folder
    python -m eplb_fsm.engines.reference.gather devil/usr/share/dictd/devil.dict.dz FOLDER OUT

`OUT/<domain>.txt` is the evaluation text, `OUT/train/<domain>.txt.xz` what only the training reads.
"""

from __future__ import annotations

import gzip
import json
import lzma
import sys
from pathlib import Path

from eplb_fsm.engines.reference.generators import GENERATORS

EVALUATION_BYTES = 48 * 1024
EVALUATION_SEED = 7_000_000


def _prose(path: Path) -> bytes:
    text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
    start = text.index("_The Devil's Dictionary_ was begun")
    return text[start : text.index("\n abcdefghijklmnopqrstuvwxyz")].encode()


def _translations(folder: Path) -> bytes:
    """Returns the translated messages of a language pack, one on a line, in the order of the files' names."""
    lines: dict[str, None] = {}
    for path in sorted(folder.glob("locale/*/LC_MESSAGES/*.json")):
        for key, forms in json.loads(path.read_text("utf-8")).items():
            if key:
                lines.update((form, None) for form in forms if any(ord(char) > 0x3FF for char in form))
    return ("\n".join(lines) + "\n").encode()


def _whole_lines(text: bytes, size: int) -> int:
    return text.index(b"\n", size) + 1


def main(arguments: list[str]) -> None:
    """Writes the texts; `arguments`: dictionary file, folder of the unpacked wheels, target."""
    dictionary, wheels, target = (Path(argument) for argument in arguments)
    (target / "train").mkdir(parents=True, exist_ok=True)
    sources = {
        "english": _prose(dictionary),
        "russian": _translations(wheels / "jupyterlab_language_pack_ru_RU"),
        "chinese": _translations(wheels / "jupyterlab_language_pack_zh_CN"),
    }
    for domain, text in sources.items():
        cut = _whole_lines(text, len(text) - min(EVALUATION_BYTES, len(text) // 5))
        (target / f"{domain}.txt").write_bytes(text[cut:])
        (target / "train" / f"{domain}.txt.xz").write_bytes(lzma.compress(text[:cut], preset=9))
    for domain, generate in GENERATORS.items():
        (target / f"{domain}.txt").write_bytes(generate(EVALUATION_SEED, EVALUATION_BYTES))
    code = b"\n".join(path.read_bytes() for path in sorted((wheels / "pluggy").glob("*.py")))
    (target / "code.txt").write_bytes(code[: _whole_lines(code, EVALUATION_BYTES)])


if __name__ == "__main__":
    main(sys.argv[1:])
