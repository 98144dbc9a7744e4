"""Writes tests/data/text-a.txt: the first chapters of Jane Austen's Northanger Abbey, from Debian's package r-cran-janeaustenr.

    apt-get download r-cran-janeaustenr && dpkg -x r-cran-janeaustenr_*.deb unpacked
    python text_a.py unpacked
"""

import struct
import sys
import zlib
from pathlib import Path

from texts import write


def objects(data):
    """The serialised R objects of a lazy-load database: a big-endian length, then a zlib stream."""
    while data:
        stream = zlib.decompressobj()
        yield stream.decompress(data[4:])
        data = stream.unused_data


def lines(serialised):
    """The strings of a character vector in R's binary serialisation, version 3."""
    at = 14 + struct.unpack(">I", serialised[14:18])[0] + 4  # format, versions, native encoding
    count = struct.unpack(">I", serialised[at + 4 : at + 8])[0]
    at += 8
    for _ in range(count):
        size = struct.unpack(">I", serialised[at + 4 : at + 8])[0]
        yield serialised[at + 8 : at + 8 + size].decode()
        at += 8 + size


def main():
    folder = Path(sys.argv[1]) / "usr/lib/R/site-library/janeaustenr/data"
    books = (list(lines(book)) for book in objects((folder / "Rdata.rdb").read_bytes()))
    book = next(book for book in books if book[0] == "NORTHANGER ABBEY")
    book = book[book.index("CHAPTER 1") :]
    paragraphs = "\n".join(book).split("\n\n")
    write("text-a.txt", paragraphs)


if __name__ == "__main__":
    main()
