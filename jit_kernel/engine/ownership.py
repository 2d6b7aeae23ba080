"""Who may change what is loaded: the process's own user and root, and nobody else.

A compiled kernel is code of this process. So every folder on the way to it, from / on, and each of its files must
belong to this user or to root, and no bit of its mode may let others write. A folder above the store may let others
write only if it has the sticky bit, as /tmp has: in such a folder nobody can rename what belongs to another user.
Groups count as others, but for one case above the store: its owner's own group, which has its name and has no other
member. Where the umask is 002, as on Ubuntu and Fedora, every folder that a user makes is written by that group.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
from pathlib import Path

from jit_kernel import config

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_MOST_LINKS = 40  # as the kernel's own limit
# The ways to stores that were found safe above the store: they are not walked again for every kernel.
_safe_ways: dict[tuple[Path, int], str] = {}
config.on_reload(_safe_ways.clear)


class CacheError(RuntimeError):
    """The store cannot be used; the message says what to do about it."""


def check_root(root: Path) -> None:
    """Refuse a store whose code another user could change, at any place on the way to it.

    Raises CacheError with the place, why, and the mend. What does not exist yet is safe if the folder is, in which it
    would be made. The folders above the store are looked at once a process.
    """
    known = _safe_ways.get((root, os.geteuid()))
    try:
        place = known or _walk(str(root), root)
        status = os.lstat(place)
    except FileNotFoundError:
        return  # not remembered: until it is made, somebody else may make it
    except OSError as error:
        raise unreadable(root, root, error) from error
    if not stat.S_ISDIR(status.st_mode):
        raise CacheError(f"cache folder {root} is not a folder; set JIT_KERNEL_CACHE_DIR")
    check_status(status, place, root)
    _safe_ways[root, os.geteuid()] = place


def check_file(path: Path, noun: str) -> None:
    """Refuse a file outside of the store whose bytes another user could change; `noun` is what it is.

    Raises CacheError, also where it is not there. A folder above it may have the sticky bit, as /tmp has.
    """
    try:
        place = _walk(str(path), path)
        status = os.lstat(place)
        check_status(status, place, path)
    except CacheError as error:
        raise CacheError(f"{noun} {path} is refused: {str(error).partition(': ')[2]}") from error
    except OSError as error:
        raise CacheError(f"{noun} {path} cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CacheError(f"{noun} {path} is not a plain file")


def check_folder(place: Path | str, root: Path) -> None:
    """Refuse a folder below the store that another user could change.

    Raises CacheError for it, FileNotFoundError where nothing is there, NotADirectoryError for anything but a folder.
    """
    status = os.lstat(place)
    check_status(status, place, root)
    if stat.S_ISLNK(status.st_mode):
        try:
            real = _walk(str(place), root)
            status = os.lstat(real)
        except OSError as error:
            raise NotADirectoryError(f"{place} is a link to nothing: {error.strerror}") from error
        check_status(status, real, root)
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(f"{place} is not a folder")


def check_status(status: os.stat_result, place: Path | str, root: Path, *, above: bool = False) -> None:
    """Refuse a folder or file that another user could change; `above` the store the sticky bit protects."""
    if not _is_trusted(status.st_uid):
        raise CacheError(
            f"cache folder {root} is refused: {place} belongs to user {status.st_uid}, who could change the code in "
            f"it; give it to you or to root with chown, or set JIT_KERNEL_CACHE_DIR to a folder of your own"
        )
    if stat.S_ISLNK(status.st_mode) or not status.st_mode & _OTHERS_WRITE:
        return
    sticky = status.st_mode & stat.S_ISVTX
    if not (above and (sticky or (not status.st_mode & stat.S_IWOTH and _is_own_group(status)))):
        raise CacheError(
            f"cache folder {root} is refused: {place} can be written by other users "
            f"(mode {stat.S_IMODE(status.st_mode):04o}); mend it with: chmod go-w '{place}'"
        )


def unreadable(root: Path, place: Path | str, error: OSError) -> CacheError:
    """The error for a store, or a part of one, that exists and cannot be read."""
    return CacheError(
        f"cache folder {root} cannot be read by user {os.geteuid()}: {place}: {error.strerror or error}; let its owner "
        f"run: chmod -R go+rX '{root}' (and go+x on the folders above it), or set JIT_KERNEL_CACHE_DIR"
    )


def _walk(path: str, root: Path, links: int = 0) -> str:
    """Check every folder above `path`, and every link on the way, by its owner; answers with the path without links.

    The last part is not checked, unless it is a link.
    """
    current, waiting = "/", [part for part in reversed(path.split("/")) if part not in ("", ".")]
    while waiting:
        part = waiting.pop()
        if part == "..":  # `current` has no link in it
            current = os.path.dirname(current)
            continue
        place = os.path.join(current, part)
        try:
            check_status(os.lstat(current), current, root, above=True)
            status = os.lstat(place)
        except FileNotFoundError:
            return os.path.join(place, *reversed(waiting))
        except OSError as error:
            raise unreadable(root, place, error) from error
        if not stat.S_ISLNK(status.st_mode):
            if waiting and not stat.S_ISDIR(status.st_mode):
                raise CacheError(f"cache folder {root}: {place} is not a folder; set JIT_KERNEL_CACHE_DIR")
            current = place
            continue
        check_status(status, place, root)
        links += 1
        if links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), place)
        target = os.readlink(place)
        current = "/" if target.startswith("/") else current
        waiting += [each for each in reversed(target.split("/")) if each not in ("", ".")]
    return current


def _is_trusted(user: int) -> bool:
    return user in (0, os.geteuid()) or user == _nobody_known()


def _is_own_group(status: os.stat_result) -> bool:
    """Whether a folder's group is its owner's alone: its first group, of its name, and nobody else's."""
    import grp
    import pwd

    try:
        owner, group = pwd.getpwuid(status.st_uid), grp.getgrgid(status.st_gid)
    except KeyError:
        return False
    if owner.pw_gid != group.gr_gid or owner.pw_name != group.gr_name or {*group.gr_mem} - {owner.pw_name}:
        return False
    # Whoever has it as the first group is a member that gr_mem does not name.
    return all(each.pw_gid != group.gr_gid or each.pw_uid == owner.pw_uid for each in pwd.getpwall())


@functools.cache
def _nobody_known() -> int | None:
    """The number that stands for every user without one here, in a user namespace that knows this user alone.

    Sandboxes of one user (bubblewrap, Apptainer) show even / as such a user's: the true owner cannot be asked for.
    """
    try:
        with open("/proc/self/uid_map", encoding="ascii") as file:
            ranges = [tuple(map(int, line.split())) for line in file]
        with open("/proc/sys/kernel/overflowuid", encoding="ascii") as file:
            overflow = int(file.read())
    except (OSError, ValueError):
        return None
    alone = len(ranges) == 1 and ranges[0][2] == 1
    return overflow if alone and ranges[0][0] != overflow else None
