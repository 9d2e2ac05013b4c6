"""The exceptions that reading damaged input raises."""

from __future__ import annotations

import struct
import zipfile

#: What building values from damaged bytes raises.
MALFORMED = (ValueError, TypeError, LookupError, OverflowError, struct.error)

#: MALFORMED, and what zipfile, pickletools and the walk over parsed JSON raise.
DAMAGED = (*MALFORMED, zipfile.BadZipFile, AttributeError, EOFError, MemoryError, NotImplementedError)
