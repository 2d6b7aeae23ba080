"""Settings and paths: the only file that reads or changes the environment.

A setting of ours (JIT_KERNEL_*) is read once, when it is first asked for, because reading the environment costs
0.7 us on the path of a call; `reload()` forgets what was read. A value that cannot be understood raises
`ConfigError` with the variable, its value and what it must be. The variables of others (CXX, MUSA_HOME, MATE_MCC) are
read at each question: only compilations and reports ask.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CUDA_COMPILERS = ("nvrtc", "nvcc")
# By vendor, the best first.
IMPLEMENTATIONS = {"cpu": ("cpu",), "cuda": ("hopper", "portable"), "musa": ("musa",)}
LOG_LEVELS = ("quiet", "info", "debug")
PLUGINS = ("sglang", "vllm")  # the engines whose entry points load a plug-in of ours

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("", "0", "false", "no", "off")
_SECRET = "JIT_KERNEL_PACK_KEY"  # never shown, and no business of a compiler


class ConfigError(ValueError):
    """An environment variable holds a value that jit_kernel cannot use."""


@dataclass(frozen=True)
class Settings:
    """What the environment asked for. The README's table says what each setting does."""

    cache_dir: Path | None
    implementation: str | None
    strict: bool
    check_indices: bool
    cuda_compiler: str
    log: str
    force_metadata_update: bool
    plugins: tuple[str, ...]
    counters: Path | None
    cache_layers: tuple[Path, ...]
    cache_limit: int
    record: Path | None
    sealed: bool
    pack_key: str


_settings: Settings | None = None
_on_reload: list[Callable[[], None]] = []


def _choice(key: str, choices: tuple[str, ...]) -> str | None:
    value = os.environ.get(key, "")
    if not value:
        return None
    if value not in choices:
        raise ConfigError(f"{key} is {value!r}; it must be one of {', '.join(choices)}")
    return value


def _flag(key: str) -> bool:
    value = os.environ.get(key, "").lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ConfigError(f"{key} is {value!r}; it must be 1 or 0")


def _choices(key: str, choices: tuple[str, ...]) -> tuple[str, ...]:
    chosen = tuple(part.strip() for part in os.environ.get(key, "").split(",") if part.strip())
    for value in chosen:
        if value not in choices:
            raise ConfigError(
                f"{key} is {os.environ[key]!r}; it must be one of {', '.join(choices)}, or some with commas between"
            )
    return chosen


def _path(key: str) -> Path | None:
    value = os.environ.get(key, "")
    return _absolute(key, value) if value else None


def _paths(key: str) -> tuple[Path, ...]:
    return tuple(_absolute(key, part) for part in os.environ.get(key, "").split(os.pathsep) if part)


def _absolute(key: str, value: str) -> Path:
    try:
        path = Path(value).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{key} is {value!r}; it must be an absolute path, and no such home folder is known"
        ) from error
    if not path.is_absolute():
        raise ConfigError(f"{key} is {value!r}; it must be an absolute path")
    return path


def _size(key: str, usual: str) -> int:
    value = os.environ.get(key, "") or usual
    try:
        return bytes_of(value)
    except ValueError as error:
        raise ConfigError(f"{key} is {value!r}; {error}") from error


def bytes_of(text: str) -> int:
    """A size in bytes: a number, behind it nothing, KiB, MiB, GiB or TiB. Raises ValueError that says so."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([KMGT])i?B?)?", text.strip())
    if match is None:
        raise ValueError("it must be a size in bytes, or one with KiB, MiB, GiB or TiB behind it, as 4GiB; 0 for none")
    return int(float(match[1]) * 1024 ** ("KMGT".index(match[2]) + 1 if match[2] else 0))


def _key(key: str) -> str:
    value = os.environ.get(key, "")
    if value.startswith("hex:") and not re.fullmatch(r"(?:[0-9a-fA-F]{2}){32,}", value[4:]):
        raise ConfigError(f"{key} is 'hex:...'; it must have 64 hexadecimal digits or more behind hex:")
    return value if not value or value.startswith("hex:") else str(_absolute(key, value))  # a file's path is no secret


def settings() -> Settings:
    """The settings of this process, read from the environment at the first call."""
    global _settings
    if _settings is None:
        _settings = Settings(
            cache_dir=_path("JIT_KERNEL_CACHE_DIR"),
            implementation=_choice("JIT_KERNEL_IMPLEMENTATION", sum(IMPLEMENTATIONS.values(), ())),
            strict=_flag("JIT_KERNEL_STRICT"),
            check_indices=_flag("JIT_KERNEL_CHECK_INDICES"),
            cuda_compiler=_choice("JIT_KERNEL_CUDA_COMPILER", CUDA_COMPILERS) or "nvrtc",
            log=_choice("JIT_KERNEL_LOG", LOG_LEVELS) or "info",
            force_metadata_update=_flag("JIT_KERNEL_FORCE_METADATA_UPDATE"),
            plugins=_choices("JIT_KERNEL_PLUGINS", PLUGINS),
            counters=_path("JIT_KERNEL_COUNTERS"),
            cache_layers=_paths("JIT_KERNEL_CACHE_LAYERS"),
            cache_limit=_size("JIT_KERNEL_CACHE_LIMIT", "4GiB"),
            record=_path("JIT_KERNEL_RECORD"),
            sealed=_flag("JIT_KERNEL_SEALED"),
            pack_key=_key(_SECRET),
        )
    return _settings


def reload() -> None:
    """Forget the settings read so far; the next question reads the environment again."""
    global _settings
    _settings = None
    for forget in _on_reload:
        forget()


def on_reload(forget: Callable[[], None]) -> None:
    """Have forget() called whenever the settings are forgotten: for what was chosen under them."""
    if forget not in _on_reload:
        _on_reload.append(forget)


def given_settings() -> dict[str, str]:
    """Every JIT_KERNEL_ variable of the environment as it stands there, for reports."""
    found = {key: value for key, value in sorted(os.environ.items()) if key.startswith("JIT_KERNEL_")}
    if found.get(_SECRET, "").startswith("hex:"):
        found[_SECRET] = "hex:..."
    return found


def search_path() -> str:
    """PATH, where programs are searched; empty without one."""
    return os.environ.get("PATH", "")


def host_compiler() -> str:
    """The C++ compiler that the user asks for (CXX), with options if any; empty without one."""
    return os.environ.get("CXX", "").strip()


def child_environment(*, without: Callable[[str], bool] = lambda name: False, **changes: str) -> dict[str, str]:
    """The environment of a program that is started: this process's, less the names that `without` picks, changed."""
    inherited = {name: value for name, value in os.environ.items() if not without(name) and name != _SECRET}
    return {**inherited, **changes}


def musa_toolkit() -> Path | None:
    """The folder that MUSA_HOME, else MUSA_PATH, names as the MUSA toolkit's."""
    chosen = os.environ.get("MUSA_HOME") or os.environ.get("MUSA_PATH")
    return Path(chosen) if chosen else None


def musa_compiler() -> str | None:
    """The compiler that MATE_MCC names."""
    return os.environ.get("MATE_MCC")


def mate_log_level() -> str:
    """MATE's own log level (MATE_LOGLEVEL), "0" without one."""
    return os.environ.get("MATE_LOGLEVEL", "0")


def set_mate_architectures(architectures: str) -> None:
    """Name the architectures that MATE compiles for (MATE_MUSA_ARCH_LIST), unless the user has named them."""
    os.environ.setdefault("MATE_MUSA_ARCH_LIST", architectures)


def strict() -> bool:
    """Whether another implementation than the best one is an error (JIT_KERNEL_STRICT)."""
    return settings().strict


def check_indices() -> bool:
    """Whether index tensors on a GPU are checked, which costs a synchronisation."""
    return settings().check_indices


def implementation() -> str | None:
    """The implementation that every call must take (JIT_KERNEL_IMPLEMENTATION), if any."""
    return settings().implementation


def cuda_compiler() -> str:
    """Which CUDA compiler makes cubins: "nvrtc" or "nvcc"."""
    return settings().cuda_compiler


def log_level() -> str:
    """How much is said on standard error: "quiet", "info" or "debug"."""
    return settings().log


def force_metadata_update() -> bool:
    """Whether the attention layer computes scheduler metadata anew at every use."""
    return settings().force_metadata_update


def plugins() -> tuple[str, ...]:
    """The serving engines whose attention functions our plug-ins replace (JIT_KERNEL_PLUGINS)."""
    return settings().plugins


def counters_file() -> Path | None:
    """The file to which a process adds its counts of hosts' calls at its end (JIT_KERNEL_COUNTERS)."""
    return settings().counters


def local_kernels() -> str:
    """The folders that Hugging Face's kernels takes instead of the hub's (LOCAL_KERNELS); empty without them."""
    return os.environ.get("LOCAL_KERNELS", "")


@functools.cache
def package_dir() -> Path:
    """The folder of the Python package; to resolve it at each look-up would take 0.05 ms."""
    return Path(__file__).resolve().parent


def checkout_root() -> Path | None:
    """The root of the source checkout that the package runs from, or None when it is installed."""
    return _checkout_of(package_dir())


@functools.cache
def _checkout_of(package: Path) -> Path | None:
    root = package.parent
    here = (root / "kernel_sources").is_dir() and (root / "pyproject.toml").is_file()
    return root if here else None


def kernel_sources_dir() -> Path:
    """The folder that holds the C++, CUDA and Triton sources, in a checkout and in a wheel alike."""
    checkout = checkout_root()
    path = checkout / "kernel_sources" if checkout else package_dir() / "kernel_sources"
    if not path.is_dir():
        raise ConfigError(f"kernel sources are missing: {path} is not a folder; reinstall jit_kernel")
    return path


def cache_layers() -> tuple[Path, ...]:
    """The read-only stores under the user's, in order: JIT_KERNEL_CACHE_LAYERS, then the one of an installed wheel."""
    inside = package_dir() / "kernel_cache"
    return (*settings().cache_layers, *((inside,) if inside.is_dir() else ()))


def cache_dir() -> Path:
    """The store of compiled kernels: JIT_KERNEL_CACHE_DIR, else the checkout's, else the user's."""
    chosen = settings().cache_dir
    if chosen is not None:
        return chosen
    checkout = checkout_root()
    if checkout is not None:
        return checkout / "cache" / "store"
    import platformdirs

    folder = Path(platformdirs.user_cache_dir("jit_kernel", appauthor=False))
    if not folder.is_absolute():  # a user without a home folder
        raise ConfigError(
            f"JIT_KERNEL_CACHE_DIR is not set, and this user's cache folder is {str(folder)!r}; "
            "set it to an absolute path"
        )
    return folder
