"""Huge pages: asked for where the kernel waits to be asked, once, in the same process."""

import os
import pathlib
import subprocess
import sys

import pytest

from dilbert_jax.huge_pages import tunables

PROGRAM = """
import os, sys
from dilbert_jax.huge_pages import request_huge_pages
request_huge_pages()
print(os.getpid(), os.environ.get("GLIBC_TUNABLES", ""), *sys.argv[1:], sep="|")
"""


@pytest.mark.parametrize(
    ("current", "mode", "wanted"),
    [
        ("", "always [madvise] never", "glibc.malloc.hugetlb=1"),
        (
            "glibc.malloc.tcache_count=0",
            "always [madvise] never",
            "glibc.malloc.tcache_count=0:glibc.malloc.hugetlb=1",
        ),
        ("glibc.malloc.hugetlb=0", "always [madvise] never", None),
        ("", "[always] madvise never", None),
        ("", "always madvise [never]", None),
        ("", "", None),
    ],
)
def test_they_are_asked_for_where_that_changes_something(current, mode, wanted):
    assert tunables(current, mode) == wanted


def test_a_program_starts_again_once_with_its_arguments(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    for command in ([script], ["-c", PROGRAM]):
        process = subprocess.Popen(
            [sys.executable, *command, "--an argument"], env=environment, stdout=subprocess.PIPE, text=True
        )
        told = process.communicate(timeout=120)[0].strip().split("|")
        mode = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
        expected = tunables("", mode.read_text() if mode.exists() else "") or ""
        assert told == [str(process.pid), expected, "--an argument"]
