"""Pictures as numpy writes them: an array [H, W, C] in a .npy file, or alone or as `image` in an .npz archive."""

import io
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

from numpy.lib import format as npy
from numpy.typing import NDArray

from penumbra.models.errors import BadImage, first_line

ARCHIVE, ARRAY = b"PK\x03\x04", npy.MAGIC_PREFIX
NAMES = ("image.npy", "image")
FAULTS = (OSError, ValueError, SyntaxError, EOFError, KeyError, RuntimeError, NotImplementedError, zipfile.BadZipFile,
          zlib.error, TypeError, IndexError, MemoryError, OverflowError, TokenError)  # fmt: skip
HEADER_BYTES = 2**16
"""Most bytes of an array's header, which numpy reads whole before it looks at how long it is."""
Shape = tuple[int, int, int]


def is_array(source: bytes | Path) -> bool:
    """Tell by its first bytes whether a file is one of numpy's."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            return is_array(file.read(len(ARRAY)))
    return source.startswith((ARCHIVE, ARRAY))


@contextmanager
def array_header(source: bytes | Path) -> Iterator[tuple[Shape, Callable[[], NDArray[Any]]]]:
    """Give an array's height, width and bytes a pixel, of which only the header is read so far, and what reads it.

    Raises BadImage, also then.
    """
    with ExitStack() as opened:
        try:
            file: IO[bytes] = opened.enter_context(
                io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
            )
            file = _member(opened, file) if file.read(len(ARCHIVE)) == ARCHIVE else file
            file.seek(0)
            major = npy.read_magic(file)[0]
            if major > 1 and (num_bytes := int.from_bytes(file.read(4), "little")) > HEADER_BYTES:
                raise BadImage(f"the array's header has {num_bytes:,} bytes; up to {HEADER_BYTES:,} are read")
            file.seek(npy.MAGIC_LEN)
            read_header = npy.read_array_header_1_0 if major == 1 else npy.read_array_header_2_0
            shape, _, dtype = read_header(file)
        except FAULTS as error:
            raise BadImage(f"the array cannot be read ({first_line(error)})") from None
        if len(shape) != 3 or not all(shape) or dtype.kind not in "uif":
            raise BadImage(f"the array is {dtype} {list(shape)}; numbers [height, width, bands] are wanted")

        def read() -> NDArray[Any]:
            try:
                file.seek(0)
                values: NDArray[Any] = npy.read_array(file, allow_pickle=False)
            except FAULTS as error:
                raise BadImage(f"the array is damaged or truncated ({first_line(error)})") from None
            return values

        yield (*shape[:2], shape[2] * dtype.itemsize), read


def _member(opened: ExitStack, file: IO[bytes]) -> IO[bytes]:
    """Open the picture in an archive. Raises BadImage where it is not clear which one that is."""
    archive = opened.enter_context(zipfile.ZipFile(file))
    names = archive.namelist()
    found = [name for name in names if name in NAMES] or names
    if len(found) != 1:
        raise BadImage(
            f"the archive has {len(names)} arrays and none is called image; one alone, or one so called, is read"
        )
    if archive.getinfo(found[0]).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # no bound on others
        raise BadImage(
            "the archive is packed by another method than numpy's own, deflate; write it with savez_compressed"
        )
    return opened.enter_context(archive.open(found[0]))
