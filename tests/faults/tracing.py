"""A process whose calls to the system are seen one by one, and made to fail or to be its last.

The kernel stops the process at the calls that change files (a seccomp filter chooses them) and asks its parent
(ptrace), which lets the call pass, answers in the kernel's place, or kills the process before the call is made. So
every write is met, whichever library makes it. Linux on x86-64 only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CALLS", "Call", "available", "follow", "let_trace"]

# Number of a call -> its name, and which of its arguments are paths (after a folder's descriptor, or alone) or files.
CALLS: dict[int, tuple[str, str]] = {
    1: ("write", "f"), 18: ("pwrite64", "f"), 20: ("writev", "f"), 296: ("pwritev", "f"), 40: ("sendfile", "f"),
    326: ("copy_file_range", "--f"), 2: ("open", "p"), 85: ("creat", "p"), 257: ("openat", "dp"),
    437: ("openat2", "dp"), 74: ("fsync", "f"), 75: ("fdatasync", "f"), 26: ("msync", "-"), 76: ("truncate", "p"),
    77: ("ftruncate", "f"), 285: ("fallocate", "f"), 82: ("rename", "pp"), 264: ("renameat", "dpdp"),
    316: ("renameat2", "dpdp"), 83: ("mkdir", "p"), 258: ("mkdirat", "dp"), 84: ("rmdir", "p"), 87: ("unlink", "p"),
    263: ("unlinkat", "dp"), 86: ("link", "pp"), 265: ("linkat", "dpdp"), 88: ("symlink", "-p"),
    266: ("symlinkat", "-dp"), 90: ("chmod", "p"), 91: ("fchmod", "f"), 268: ("fchmodat", "dp"),
    452: ("fchmodat2", "dp"), 280: ("utimensat", "dp"), 73: ("flock", "f"),
}  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
AT_FDCWD = -100

TRACEME, PEEKUSER, CONT, GETREGS, SETREGS, SETOPTIONS = 0, 3, 7, 12, 13, 0x4200
OPTIONS = 0x100000 | 0x80 | 0x8 | 0x2 | 0x4  # kill with the parent; stop at the filter's calls; follow what is cloned
EVENT_SECCOMP = 7
WALL = 0x40000000
# Of the 27 registers: result and number of the call, its arguments.
RESULT, NUMBER, ARGUMENTS = 10, 15, (14, 13, 12, 7, 9, 8)


@dataclass(frozen=True)
class Call:
    """A call that is about to be made.

    Attributes:
        name: as the manual calls it; `openat` that only reads is `read`.
        paths: what it is about, absolute.
    """

    name: str
    paths: tuple[str, ...]

    def inside(self, folder: Path) -> bool:
        """Whether it is about something in a folder."""
        return any(path == str(folder) or path.startswith(f"{folder}/") for path in self.paths)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(self.paths)})"


# What is done with a call: None lets it pass, a number is the error that it ends with, "kill" ends the process.
Decision = int | str | None


def available() -> bool:
    """Whether this machine can trace."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    libc.prctl.argtypes = [ctypes.c_int] + 4 * [ctypes.c_ulong]
    return libc


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def let_trace() -> None:
    """In the child: stop until the parent follows, and from then on at each of `CALLS`."""
    libc = _libc()
    if libc.ptrace(TRACEME, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "ptrace")
    os.kill(os.getpid(), signal.SIGSTOP)
    load, equal, give = 0x20, 0x15, 0x06
    trace, allow = 0x7FF00000, 0x7FFF0000
    code = [struct.pack("<HBBI", load, 0, 0, 0)]
    left = len(CALLS)
    for number in CALLS:
        code.append(struct.pack("<HBBI", equal, left, 0, number))
        left -= 1
    code += [struct.pack("<HBBI", give, 0, 0, allow), struct.pack("<HBBI", give, 0, 0, trace)]
    program = _Program(len(code), b"".join(code))
    no_new_privileges, seccomp, filtered = 38, 22, 2
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(
        seccomp, filtered, ctypes.cast(ctypes.byref(program), ctypes.c_void_p).value, 0, 0
    ):
        raise OSError(ctypes.get_errno(), "seccomp")


def follow(child: int, decide: Callable[[Call], Decision]) -> int:
    """Follow a child that has called `let_trace` to its end.

    Args:
        child: its id.
        decide: what is to be done with each call that changes a file.

    Returns:
        Its exit code; negative for the signal that ended it.
    """
    libc = _libc()
    os.waitpid(child, 0)
    _ask(libc, SETOPTIONS, child, 0, OPTIONS)
    _ask(libc, CONT, child, 0, 0)
    begun = {child}
    while True:
        pid, status = os.waitpid(-1, WALL)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            if pid == child:
                return os.waitstatus_to_exitcode(status)
            continue
        passed = 0
        if status >> 16 == EVENT_SECCOMP:
            if _decided(libc, pid, decide) == "kill":
                os.kill(child, signal.SIGKILL)
                continue
        elif status >> 16 == 0:
            number = os.WSTOPSIG(status)
            passed = 0 if number == signal.SIGSTOP and pid not in begun else number
        begun.add(pid)
        _ask(libc, CONT, pid, 0, passed)


def _ask(libc: ctypes.CDLL, request: int, pid: int, address: int, data: int) -> None:
    if libc.ptrace(request, pid, address, data) == -1 and ctypes.get_errno() != errno.ESRCH:
        raise OSError(ctypes.get_errno(), f"ptrace {request}")


def _decided(libc: ctypes.CDLL, pid: int, decide: Callable[[Call], Decision]) -> Decision:
    registers = (ctypes.c_ulonglong * 27)()
    libc.ptrace(GETREGS, pid, 0, ctypes.addressof(registers))
    call = _call(pid, int(registers[NUMBER]), [int(registers[place]) for place in ARGUMENTS])
    decision = decide(call)
    if isinstance(decision, int):
        registers[NUMBER] = 2**64 - 1  # no call is made
        registers[RESULT] = 2**64 - decision
        libc.ptrace(SETREGS, pid, 0, ctypes.addressof(registers))
    return decision


def _call(pid: int, number: int, arguments: list[int]) -> Call:
    name, kinds = CALLS[number]
    paths, folder = [], str(_link(pid, "cwd"))
    for kind, argument in zip(kinds, arguments, strict=False):
        signed = ctypes.c_int(argument & 0xFFFFFFFF).value
        if kind == "d":
            folder = str(_link(pid, "cwd" if signed == AT_FDCWD else f"fd/{signed}"))
        elif kind == "f":
            paths.append(str(_link(pid, f"fd/{signed}")))
        elif kind == "p":
            paths.append(str(Path(os.path.normpath(Path(folder) / _text(pid, argument)))))
    if name in {"open", "openat"} and not arguments[len(kinds)] & WRITING:
        name = "read"
    return Call(name, tuple(path.removesuffix(" (deleted)") for path in paths))


def _link(pid: int, name: str) -> Path:
    try:
        return Path(f"/proc/{pid}/{name}").readlink()
    except OSError:
        return Path("?")


def _text(pid: int, address: int) -> str:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:  # noqa: PTH123
        memory.seek(address)
        found = b""
        while b"\0" not in found and len(found) < 8192:
            # Not past the end of a page: the next one may not be there.
            piece = memory.read(4096 - (address + len(found)) % 4096)
            if not piece:
                break
            found += piece
    return os.fsdecode(found.partition(b"\0")[0])
