"""Writes tests/data/text-b.txt, the first book of Samuel and on in the King James Bible, from Debian's packages bible-kjv and bible-kjv-text,
and tests/data/text-c.txt, the first chapters of the Debian Reference, from debian-reference-en.

    apt-get download bible-kjv bible-kjv-text debian-reference-en && for p in *.deb; do dpkg -x $p unpacked; done
    python texts_bc.py unpacked
"""

import gzip
import re
import subprocess
import sys
from pathlib import Path

BYTES = 150_000  # and on to the end of the paragraph
DATA = Path(__file__).resolve().parents[2] / "tests/data"


def write(name, paragraphs):
    text = ""
    for paragraph in paragraphs:
        if paragraph.strip():
            text += " ".join(paragraph.split()) + "\n\n"
        if len(text.encode()) > BYTES:
            break
    (DATA / name).write_text(text.rstrip() + "\n")


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
    write("text-b.txt", bible(root))
    write("text-c.txt", reference(root))


if __name__ == "__main__":
    main()
