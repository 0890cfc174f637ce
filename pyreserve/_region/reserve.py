"""`reserve` and `window`: regions with their policies and their place in the address space."""

import errno
import resource
from functools import cache
from operator import index as _index
from typing import Any

from pyreserve._native import ffi, lib
from pyreserve._region import handles
from pyreserve._region.allocation import LARGE, check_memory
from pyreserve._region.policies import (
    POLICIES,
    Fork,
    HugePages,
    Mode,
    check_shared,
    effective_mode,
    is_strict,
    unknown_word,
)
from pyreserve._region.region import Region
from pyreserve._system.limitbase import rlimit
from pyreserve._system.limits import PAGE_SIZE, refusal
from pyreserve._system.machine import thp_size
from pyreserve.errors import RangeError
from pyreserve.units import WORD, as_bytes, round_up

_ADDRESS_LIMIT = 1 << (8 * WORD)
# Bound once: an attribute lookup on the library costs a third of an empty call.
_reserve = lib.region_reserve
_NULL = ffi.NULL


def reserve(
    size: int | str,
    *,
    at: int | None = None,
    hint: int | None = None,
    align: int | str | None = None,
    mode: Mode = "charge",
    dump: bool = False,
    fork: Fork = "copy",
    huge_pages: HugePages = "default",
    guard: bool = False,
    name: str | None = None,
    seal: bool = False,
    shared: bool = False,
) -> Region:
    """Reserve `size` bytes of addresses, rounded up to whole OS pages: no memory, no charge.

    Args:
        size: bytes, or a size such as ``"64GiB"``; positive.
        at: reserve exactly at this address; an existing mapping is never replaced.
        hint: reserve near this address if it is free, else anywhere.
        align: alignment of the base, bytes or a size; a power of two.
        mode: ``"charge"``: a commit is charged against the commit limit, a decommit refunds it.
            ``"noreserve"``: never charged (MAP_NORESERVE), except under
            ``vm.overcommit_memory=2``, where the kernel ignores the flag and ``Region.mode``
            is ``"charge"``. There a reservation is not charged, but 1/32 of a process's
            addresses, at most vm.user_reserve_kbytes (128 MiB), is unavailable to its commits.
        dump: include the region in core dumps (default: MADV_DONTDUMP).
        fork: contents in a forked child: ``"copy"``, or ``"wipe"``: zeros (MADV_WIPEONFORK),
            which copies no page tables. In mode ``"charge"`` the child is charged for the
            committed bytes either way (``dup_mmap``, Linux kernel/fork.c). A child always shares a
            shared region, and ``Region.fork`` is ``"share"``.
        huge_pages: ``"prefer"`` (MADV_HUGEPAGE, the base aligned to a huge page), ``"never"``
            (MADV_NOHUGEPAGE), or ``"default"``: the system's setting. A shared region gets huge
            pages only if /sys/kernel/mm/transparent_hugepage/shmem_enabled allows them.
        guard: add an OS page that is never accessible at each end, in addition to `size`.
        name: shown in /proc/PID/maps as ``[anon:NAME]`` if the kernel has CONFIG_ANON_VMA_NAME
            (prctl(2), PR_SET_VMA_ANON_NAME); 1 to 79 printable ASCII characters except brackets,
            backslash, dollar sign and backquote.
        seal: commit the whole region and forbid unmapping it or changing its access until the
            process ends (mseal, Linux 6.10): it can be discarded, never decommitted or released.
        shared: a region over a file in memory of its own (memfd_create, Linux 3.17), `Region.fd`,
            which shows in /proc/PID/maps as ``/memfd:NAME``. A commit allocates its memory at once;
            see `Region`. Only with mode ``"charge"``, and not with ``fork="wipe"``.

    Raises:
        TypeError: a number is not an integer, or `name` not a string.
        ValueError: an invalid or conflicting argument (`RangeError` for sizes and addresses).
        OutOfMemoryError: refused; ``limit`` names the limit, such as ``"address space"``.
        VMError: `at` is occupied (EEXIST), or this kernel lacks a policy. For a shared region also
            EMFILE (``limit`` is ``"RLIMIT_NOFILE"``) and EFBIG (``"RLIMIT_FSIZE"``).
    """
    size, guard, shared = as_bytes(size), bool(guard), bool(shared)
    at = None if at is None else _index(at)
    hint = None if hint is None else _index(hint)
    align = None if align is None else as_bytes(align)
    if size <= 0:
        msg = f"size must be positive, got {size}"
        raise RangeError(msg)
    if size % PAGE_SIZE:
        size += PAGE_SIZE - size % PAGE_SIZE
    if shared:
        check_shared(mode, fork)
        _check_file_size(size)
    mode, accounting, advice = _policies(mode, fork, huge_pages, no_dump=not dump)
    if huge_pages == "prefer" and align is None and at is None:
        align = thp_size()
    if shared:
        options = _placement_options(at, hint, align, guard, name)
        options.shared, options.strict = True, is_strict()
    elif at is None and hint is None and align is None and not guard and name is None:
        options = _NULL
    else:
        options = _placement_options(at, hint, align, guard, name)
    handle = handles.take()
    region = Region(handle, size, mode, "share" if shared else fork, huge_pages, name)
    total = size + (align or 0) + 2 * PAGE_SIZE * bool(guard)
    _open(handle, size, accounting, advice, options, total, at)
    if seal:
        if shared and size >= LARGE:
            check_memory(handle, size, "seal", 0, size)
        err = lib.region_seal(handle)
        if err:
            region.release()
            raise refusal("seal", err, size, shared=shared)
    return region


def reserve_mirrored(size: int, *, name: str | None = None) -> Region:
    """Reserve and commit a shared region whose second half shows the bytes of its first.

    Args:
        size: bytes of memory, whole OS pages; the region has twice as many.
        name: as for `reserve`.

    Raises:
        OutOfMemoryError, VMError, TypeError, ValueError: as for `reserve` and `Region.commit`.
    """
    _check_file_size(size)
    options = _placement_options(None, None, None, False, name)
    options.mirrored, options.strict = True, is_strict()
    handle = handles.take()
    region = Region(handle, 2 * size, "charge", "share", "default", name)
    _, accounting, advice = _policies("charge", "copy", "default")
    _open(handle, 2 * size, accounting, advice, options, 2 * size)
    region.commit()
    return region


def reserve_below(
    align: int,
    lead: int,
    size: int,
    *,
    mode: Mode,
    fork: Fork,
    huge_pages: HugePages,
    name: str | None,
) -> Region:
    """Reserve `size` bytes, rounded up to whole OS pages, from `lead` bytes below a multiple.

    The multiple is of `align`, a power of two; `size` is positive, `lead` whole OS pages.

    Raises:
        TypeError, ValueError, OutOfMemoryError, VMError: as for `reserve`.
    """
    mode, accounting, advice = _policies(mode, fork, huge_pages)
    options = _options_below(align, lead)
    if name is not None:
        options = ffi.new("struct region_options *", options[0])
        options.name = _checked_name(name)
    size = round_up(size, PAGE_SIZE)
    handle = handles.take()
    region = Region(handle, size, mode, fork, huge_pages, name)
    _open(handle, size, accounting, advice, options, size + align)
    return region


def window(
    start: int,
    size: int,
    *,
    mode: Mode = "charge",
    fork: Fork = "copy",
    huge_pages: HugePages = "default",
    name: str | None = None,
) -> Region:
    """Create a region over the free addresses from `start`, of which it owns none at first.

    `size` is rounded down to whole OS pages. `lib.region_claim` claims ranges later.

    Raises:
        ValueError: an unknown policy, or a name as for `reserve`.
        OutOfMemoryError: the addresses do not exist.
    """
    size &= -PAGE_SIZE
    shown_name = _NULL if name is None else _checked_name(name)
    mode, accounting, advice = _policies(mode, fork, huge_pages)
    handle = handles.take()
    region = Region(handle, size, mode, fork, huge_pages, name)
    try:
        err = lib.region_window(handle, start, size, accounting, advice, shown_name)
    except OverflowError:
        err = errno.ENOMEM
    if err:
        raise refusal("reserve", err, size, start)
    return region


def _check_file_size(size: int) -> None:
    """Refuse a file above RLIMIT_FSIZE here: the kernel also sends SIGXFSZ, which may be fatal.

    Raises:
        VMError: EFBIG.
    """
    limit = rlimit(resource.RLIMIT_FSIZE)
    if limit is not None and size > limit:
        raise refusal("reserve", errno.EFBIG, size, shared=True)


def _open(
    handle: Any,
    size: int,
    accounting: int,
    advice: int,
    options: Any,
    total: int,
    at: int | None = None,
) -> None:
    """Call region_reserve. `total` is the number of bytes that a refusal names."""
    try:
        err = _reserve(handle, size, accounting, advice, options)
    except OverflowError:  # size does not fit in size_t
        err = errno.ENOMEM
    if err:
        why = "this kernel has no memfd_create (Linux 3.17)" if err == errno.ENOSYS else None
        raise refusal("reserve", err, total, at, why)


def _policies(
    mode: Mode, fork: Fork, huge_pages: HugePages, *, no_dump: bool = True
) -> tuple[Mode, int, int]:
    """Return the mode that takes effect, and the accounting and advice of C."""
    try:
        accounting, advice = POLICIES[mode, fork, huge_pages, no_dump]
    except (KeyError, TypeError):
        raise unknown_word(mode, fork, huge_pages) from None
    if accounting:
        mode, accounting = effective_mode(mode)
    return mode, accounting, advice


def _placement_options(
    at: int | None, hint: int | None, align: int | None, guard: bool, name: str | None
) -> Any:
    """Check the placement arguments of `reserve` and return them as a C struct."""
    options = ffi.new("struct region_options *")
    if at is not None and hint is not None:
        msg = "at and hint are mutually exclusive"
        raise ValueError(msg)
    if at is not None or hint is not None:
        argument, address = ("hint", hint) if at is None else ("at", at)
        assert address is not None
        if not 0 < address < _ADDRESS_LIMIT or address % PAGE_SIZE:
            msg = (
                f"{argument} must be a positive address that is a multiple of the OS page "
                f"({PAGE_SIZE}), got {address:#x}"
            )
            raise RangeError(msg)
        options.address, options.exact = address, at is not None
    if align is not None:
        if not 0 < align < _ADDRESS_LIMIT or align & (align - 1):
            msg = f"align must be a power of two, got {align}"
            raise RangeError(msg)
        if at is not None and at % align:
            msg = f"at must be a multiple of align ({align:#x}), got {at:#x}"
            raise RangeError(msg)
        options.align = align
    if guard:
        options.guard = PAGE_SIZE
        if at is not None and at <= PAGE_SIZE:
            msg = f"at must be above {PAGE_SIZE:#x} with a guard, got {at:#x}"
            raise RangeError(msg)
    if name is not None:
        options.name = _checked_name(name)
    return options


@cache
def _options_below(align: int, lead: int) -> Any:
    """Return the options of regions without a name. C only reads them, so all can share them."""
    options = ffi.new("struct region_options *")
    options.align, options.lead = align, lead
    return options


def _checked_name(name: str) -> bytes:
    if not isinstance(name, str):
        msg = f"name must be a string, got {type(name).__name__}"
        raise TypeError(msg)
    name = str.__str__(name)  # a subclass may override any method
    # The kernel's own rule (prctl(2), PR_SET_VMA_ANON_NAME).
    if not 0 < len(name) < 80 or any(not " " <= c <= "~" or c in "[]\\$`" for c in name):
        msg = f"name must be 1 to 79 printable ASCII characters without []\\$`, got {name!r}"
        raise ValueError(msg)
    return name.encode("ascii")
