"""Settings and paths: the only file that reads or changes the environment.

A setting of ours (JIT_KERNEL_*) is read once, when it is first asked for, because reading the environment costs
0.7 us on the path of a call; `reload()` forgets what was read. A value that cannot be understood raises
`ConfigError` with the variable, its value and what it must be. The variables of others (CXX, MUSA_HOME, MATE_MCC) are
read at each question: only compilations and reports ask.
"""

from __future__ import annotations

import os
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
    if not value:
        return None
    try:
        path = Path(value).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{key} is {value!r}; it must be an absolute path, and no such home folder is known"
        ) from error
    if not path.is_absolute():
        raise ConfigError(f"{key} is {value!r}; it must be an absolute path")
    return path


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
    return {key: value for key, value in sorted(os.environ.items()) if key.startswith("JIT_KERNEL_")}


def host_compiler() -> str:
    """The C++ compiler that the user asks for (CXX), with options if any; empty without one."""
    return os.environ.get("CXX", "").strip()


def child_environment(*, without: Callable[[str], bool] = lambda name: False, **changes: str) -> dict[str, str]:
    """The environment of a program that is started: this process's, less the names that `without` picks, changed."""
    inherited = {name: value for name, value in os.environ.items() if not without(name)}
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


def package_dir() -> Path:
    """The folder of the Python package."""
    return Path(__file__).resolve().parent


def checkout_root() -> Path | None:
    """The root of the source checkout that the package runs from, or None when it is installed."""
    root = package_dir().parent
    here = (root / "kernel_sources").is_dir() and (root / "pyproject.toml").is_file()
    return root if here else None


def kernel_sources_dir() -> Path:
    """The folder that holds the C++, CUDA and Triton sources, in a checkout and in a wheel alike."""
    checkout = checkout_root()
    path = checkout / "kernel_sources" if checkout else package_dir() / "kernel_sources"
    if not path.is_dir():
        raise ConfigError(f"kernel sources are missing: {path} is not a folder; reinstall jit_kernel")
    return path


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
