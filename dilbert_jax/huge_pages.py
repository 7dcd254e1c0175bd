"""Memory in huge pages, where Linux gives them to programs that ask."""

import os
import pathlib
import sys

_MODE = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TUNABLE = "glibc.malloc.hugetlb"


def tunables(current: str, mode: str) -> str | None:
    """GLIBC_TUNABLES with huge pages for what malloc takes; None where that changes nothing.

    Args:
      current: the variable as it is; who has set the tunable keeps the value.
      mode: what the kernel says, e.g. "always [madvise] never": only where it waits to be asked it is asked.
    """
    if "[madvise]" not in mode or _TUNABLE in current:
        return None
    return ":".join(part for part in (current, f"{_TUNABLE}=1") if part)


def request_huge_pages() -> None:
    """Starts this program again with its large arrays in huge pages, unless it has them or cannot.

    XLA:CPU takes the memory of every step anew, and the kernel hands it out page by page: tens of thousands of 4 KiB
    a step. The C library can ask for pages of 2 MiB instead, but reads only at the start of a program whether it
    should. Call this first of all: the process stays the same, what it did before is done again.
    """
    mode = _MODE.read_text() if _MODE.exists() else ""
    wanted = tunables(os.environ.get("GLIBC_TUNABLES", ""), mode)
    if wanted is not None and sys.executable:
        os.environ["GLIBC_TUNABLES"] = wanted
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
