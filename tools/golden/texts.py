"""Writes what conversions are calibrated on and measured on: tests/data/calibration.txt, pieces of text-a.txt and of the Jargon File in turns,
text-b.txt, the books of Samuel in the King James Bible, and text-c.txt, the first chapters of the Debian Reference.

    apt-get download jargon-text bible-kjv bible-kjv-text debian-reference-en && for p in *.deb; do dpkg -x $p unpacked; done
    python texts.py unpacked
"""

import gzip
import re
import subprocess
import sys
from pathlib import Path

BYTES = 150_000  # and on to the end of the paragraph
PIECE, PIECES = 2_200, 45  # of the calibration text, characters, from each source
DATA = Path(__file__).resolve().parents[2] / "tests/data"


def write(name, paragraphs):
    text = ""
    for paragraph in paragraphs:
        if paragraph.strip():
            text += " ".join(paragraph.split()) + "\n\n"
        if len(text.encode()) > BYTES:
            break
    (DATA / name).write_text(text.rstrip() + "\n")


def calibration(root):
    """Pieces of both texts in turns, so that any length of it is of both kinds."""
    jargon = gzip.decompress((root / "usr/share/doc/jargon-text/jargon.txt.gz").read_bytes()).decode(errors="replace")
    paragraphs = (" ".join(p.split()) for p in jargon.split("\n\n"))
    long = [p for p in paragraphs if len(p) > 200][20:]
    novel, lexicon = (DATA / "text-a.txt").read_text(), "\n\n".join(long)
    cut = [text[at : at + PIECE] for at in range(0, PIECES * PIECE, PIECE) for text in (novel, lexicon)]
    (DATA / "calibration.txt").write_text("\n\n".join(cut))


def bible(root):
    """A chapter a paragraph, without the numbers of its verses."""
    run = [str(root / "usr/bin/bible"), "-l1000000", "-p", str(root / "usr/lib"), "1sam1:1-2sam24:25"]
    out = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    chapter = ""
    for line in out.splitlines():
        verse = re.sub(r"^\s*\d+\s+", "", line)
        if re.fullmatch(r"\s*[1-3]? ?[A-Z][a-z]+ \d+\s*", line):
            yield chapter
            chapter = ""
        else:
            chapter += verse + " "
    yield chapter


def reference(root):
    text = gzip.decompress((root / "usr/share/debian-reference/debian-reference.en.txt.gz").read_bytes()).decode()
    return text[text.index("I think learning a computer system") :].split("\n\n")


def main():
    root = Path(sys.argv[1]).resolve()
    calibration(root)
    write("text-b.txt", bible(root))
    write("text-c.txt", reference(root))


if __name__ == "__main__":
    main()
