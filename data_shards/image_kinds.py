"""What the first bytes of a file say: the segments of a JPEG, and the names of files that are not read."""

import struct
import zlib
from contextlib import suppress

AS_PNG = "convert it to PNG"
HEADER = struct.Struct(">HH")  # of a JPEG's segment: marker and length
SOS, APP1, APP2 = 0xFFDA, 0xFFE1, 0xFFE2
SEGMENTS = frozenset({*range(0xFFC0, 0xFFD0), *range(SOS, 0xFFFF)})
TABLES = frozenset({0xFFC4, 0xFFCC, 0xFFDB, 0xFFDD, 0xFFE0, 0xFFFE})  # and APP0 and comments
FRAMES = frozenset(range(0xFFC0, 0xFFD0)) - {0xFFC8} - TABLES
FRAME = struct.Struct(">HHB")  # after the bits of a sample: height, width, number of colours
LAST_FIRST_ELEMENT, LONGEST_FIRST_ELEMENT = 0x20, 256  # of a DICOM data set: up to its study's date

HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
BEGINNINGS = (
    (b"%PDF", "a PDF document", "export its pages as PNG"),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"PK\x05\x06", "a zip archive", "unpack it"),
    (b"Rar!", "a RAR archive", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"BZh", "a bzip2 file", "unpack it"),
    (b"\xfd7zXZ\0", "an xz file", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it"),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM video", "write its frames as PNG"),
    (b"\0\0\x01\xba", "an MPEG video", "write its frames as PNG"),
    (b"\0\0\x01\xb3", "an MPEG video", "write its frames as PNG"),
    (b"FLV\x01", "a Flash video", "write its frames as PNG"),
    (b"OggS", "an Ogg video", "write its frames as PNG"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "a Windows Media video", "write its frames as PNG"),
    (b"\xff\x0a", "a JPEG XL image", AS_PNG),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image", AS_PNG),
    (b"8BPS", "a Photoshop file", AS_PNG),
    (b"%!PS", "a PostScript document, not an image", AS_PNG),
    (b"\xc5\xd0\xd3\xc6", "a PostScript document, not an image", AS_PNG),
    (b"\0\0\x01\0", "an icon", AS_PNG),
    (b"v/1\x01", "an OpenEXR image", AS_PNG),
    (b"#?RADIANCE", "a Radiance image", AS_PNG),
    (b"DDS ", "a DirectDraw texture", AS_PNG),
    (b"\x89HDF", "an HDF5 file", "write its pictures as PNG"),
    (b"\x93NUMPY", "a NumPy array", "write its pictures as PNG"),
    (b"MATLAB", "a MATLAB file", "write its pictures as PNG"),
    (b"NRRD", "an NRRD volume", "write its slices as PNG"),
    (b"ObjectType", "a MetaImage volume", "write its slices as PNG"),
    (b"version https://git-lfs", "a pointer of Git LFS", "fetch the file itself with git lfs pull"),
)
READ = (
    (b"\xff\xd8", "JPEG"),
    (b"\x89PNG", "PNG"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
)
NIFTI_HEADERS = ((348, 344, (b"n+1\0", b"ni1\0")), (540, 4, (b"n+2\0", b"ni2\0")))
JPEG_OF_OTHER_KINDS = {
    0xFFC3: "a lossless JPEG",
    0xFFC7: "a lossless JPEG",
    0xFFCB: "a lossless JPEG",
    0xFFCF: "a lossless JPEG",
    0xFFF7: "a JPEG-LS image",
}


def is_dicom(data: bytes) -> bool:
    """By its prefix (PS3.10, 7.1); without one, by a first element of group 2 or 8, as data sets come from archives."""
    if b"DICM" in (data[128:132], data[:4]):
        return True
    group, element, kind = data[:2], int.from_bytes(data[2:4], "little"), data[4:6]
    is_explicit = kind.isalpha() and kind.isupper()
    if group in (b"\x02\0", b"\x08\0") and element <= LAST_FIRST_ELEMENT:
        return is_explicit or int.from_bytes(data[4:8], "little") < LONGEST_FIRST_ELEMENT
    return group == b"\0\x08" and is_explicit  # big-endian


def jpeg_segments(data: bytes) -> list[tuple[int, int]]:
    """Marker of each segment of a JPEG before its picture, and where its content begins; tables and comments are passed
    over.

    Raises ValueError where something else follows than a segment, or the file ends.
    """
    found: list[tuple[int, int]] = []
    at = 2
    try:
        while True:
            marker, length = HEADER.unpack_from(data, at)
            if marker not in TABLES:
                if marker == SOS:
                    return found
                if marker not in SEGMENTS:
                    raise ValueError("no segment")
                found.append((marker, at + 4))
            at += 2 + length
    except struct.error:
        raise ValueError("no picture") from None


def why_unread(data: bytes) -> str:
    """What an image file that Pillow does not know is, and the remedy."""
    for beginning, name, remedy in BEGINNINGS:
        if data.startswith(beginning):
            return f"{name}, which is not read: {remedy}"
    if data[4:8] == b"ftyp":
        return _boxes(data[8:12])
    if data[:4] == b"RIFF" and data[8:11] == b"AVI":
        return "an AVI video, which is not read: write its frames as PNG"
    if is_nifti(data):
        return "a NIfTI volume, which is not read: write its slices as PNG"
    if data[:2] == b"\x1f\x8b":
        what = "a NIfTI volume" if is_nifti(_unzipped(data)) else "a gzip file"
        return f"{what}, which is not read: {'write its slices as PNG' if 'NIfTI' in what else 'unpack it'}"
    if data[257:262] == b"ustar":
        return "a tar archive, which is not read: unpack it"
    start = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in start and start.startswith(b"<"):
        return f"an SVG drawing, which is not read: {AS_PNG}"
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page, no image: fetch the image again"
    if start.startswith(b"<?xml"):
        return "an XML document, no image: fetch the image again"
    if data.startswith(b"\xff\xd8") and (kind := _jpeg_of_another_kind(data)):
        return f"{kind}, which is not read: {AS_PNG}"
    for beginning, name in READ:
        if data.startswith(beginning):
            return f"a damaged {name} file, or one of a kind that is not read: {AS_PNG}"
    return "not an image"


def is_nifti(data: bytes) -> bool:
    return any(
        header in (int.from_bytes(data[:4], "little"), int.from_bytes(data[:4], "big")) and data[at : at + 4] in magics
        for header, at, magics in NIFTI_HEADERS
    )


def _unzipped(data: bytes) -> bytes:
    """As much of a gzip file as a NIfTI header takes."""
    try:
        return zlib.decompressobj(31).decompress(data[:4096], 348)
    except zlib.error:
        return b""


def _boxes(brand: bytes) -> str:
    """Of the family of formats that begin with a box `ftyp`."""
    if brand in HEIC_BRANDS:
        return f"a HEIC photo, which is not read: {AS_PNG}"
    if brand in (b"avif", b"avis"):
        return f"an AVIF image, which is not read: {AS_PNG}"
    if brand == b"crx ":
        return f"a raw photo, which is not read: {AS_PNG}"
    return "an MP4 or QuickTime video, which is not read: write its frames as PNG"


def _jpeg_of_another_kind(data: bytes) -> str | None:
    """Its frame says whether samples are of 8 bits, and how they are coded."""
    with suppress(ValueError):
        for marker, content in jpeg_segments(data):
            if marker in JPEG_OF_OTHER_KINDS:
                return JPEG_OF_OTHER_KINDS[marker]
            if marker in FRAMES and data[content] != 8:
                return f"a JPEG of {data[content]} bits"
    return None
