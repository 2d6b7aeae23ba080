"""The structure of the source code in numbers: `python tests/support/house.py [folder of a checkout]` prints them.

The imports of files; the places that list arguments of the public functions, read the environment or start a process;
long functions. tests/test_house.py holds the numbers to their limits.
"""

from __future__ import annotations

import ast
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MANY = 9  # so many arguments of the public functions in one place are a list of them
LONG = 60  # lines of a function


def modules(root: Path) -> dict[str, Path]:
    """Every Python file of the package by its dotted name."""
    found = {}
    for path in sorted((root / "jit_kernel").rglob("*.py")):
        if "kernel_sources" not in path.parts and "__pycache__" not in path.parts:
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def parsed(path: Path) -> ast.Module:
    """A file's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(root: Path) -> dict[str, set[str]]:
    """By file: the files of the package that it imports, anywhere in it, inside functions and for types alone too."""
    known = modules(root)
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        wanted: set[str] = set()
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Import):
                wanted.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    wanted.add(inner if inner in known else node.module)
        graph[name] = {target for target in wanted if target in known and target != name}
    return graph


def circles(root: Path) -> list[list[str]]:
    """Files that import each other, directly or by way of others: the components of the graph with two or more."""
    graph = imports(root)
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        stack = [start]
        while stack:
            for target in graph[stack.pop()] - seen:
                seen.add(target)
                stack.append(target)
        reach[start] = seen
    found = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in graph if a in reach[a]}
    return [list(names) for names in sorted(found)]


def public_arguments(root: Path) -> set[str]:
    """The names of the arguments of the three attention functions and of get_scheduler_metadata."""
    names: set[str] = set()
    for node in parsed(root / "jit_kernel" / "flash_attention_v3.py").body:
        if isinstance(node, ast.FunctionDef) and (node.name.startswith("flash_attn_") or node.name.startswith("get_")):
            names.update(argument.arg for argument in (*node.args.args, *node.args.kwonlyargs))
    return names


def _listed(node: ast.AST) -> list[str]:
    """The names that a piece of code lists: parameters, keywords and names passed on, keys, strings, fields."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
    if isinstance(node, ast.Call):
        keywords = [keyword.arg for keyword in node.keywords if keyword.arg]
        return keywords + [name for value in node.args for name in _named(value)]
    if isinstance(node, ast.Dict):
        return [key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        return [name for value in node.elts for name in _named(value)]
    if isinstance(node, ast.ClassDef):
        fields = [field.target for field in node.body if isinstance(field, ast.AnnAssign)]
        return [target.id for target in fields if isinstance(target, ast.Name)]
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and "Tensor" in node.value:
        return node.value.replace("=", " ").replace(",", " ").split()  # an operator's schema
    return []


def _named(value: ast.expr) -> list[str]:
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return [value.value]
    if isinstance(value, ast.Name):
        return [value.id]
    return [value.attr] if isinstance(value, ast.Attribute) else []


def argument_lists(root: Path) -> list[str]:
    """Every place of the package that names MANY or more of the public functions' arguments, as file:line."""
    public = public_arguments(root)
    found = []
    for path in modules(root).values():
        for node in ast.walk(parsed(path)):
            if len(public.intersection(_listed(node))) >= MANY:
                found.append(f"{path.relative_to(root)}:{node.lineno}")  # type: ignore[attr-defined]
    return found


def _names(tree: ast.AST) -> dict[str, str]:
    """What the imported names of a file stand for: {"environ": "os.environ", "o": "os"}."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def _dotted(node: ast.AST, names: dict[str, str]) -> str:
    """The dotted name that an expression reads, imports resolved: "os.environ.get"; "" for any other expression."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        inner = _dotted(node.value, names)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def _uses(root: Path, what: set[str]) -> Iterator[str]:
    """Every place of the package where one of these dotted names is used or imported, under whatever other name."""
    modules_of_what = {name.rpartition(".")[0] for name in what}
    for path in modules(root).values():
        tree = parsed(path)
        names, lines = _names(tree), set()
        for node in ast.walk(tree):
            if isinstance(node, (ast.Attribute, ast.Name)) and _dotted(node, names) in what:
                lines.add(node.lineno)
            elif isinstance(node, ast.ImportFrom):
                brought = {f"{node.module}.{alias.name}" for alias in node.names}
                if brought & what or (node.module in modules_of_what and f"{node.module}.*" in brought):
                    lines.add(node.lineno)
            elif isinstance(node, ast.Call) and _dotted(node.func, names) == "getattr" and len(node.args) > 1:
                name = node.args[1]
                inner = _dotted(node.args[0], names)
                if isinstance(name, ast.Constant) and f"{inner}.{name.value}" in what:
                    lines.add(node.lineno)
        for line in sorted(lines):
            yield f"{path.relative_to(root)}:{line}"


ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv"}
PROCESSES = {
    *(f"subprocess.{name}" for name in ("run", "Popen", "call", "check_call", "check_output", "getoutput")),
    "subprocess.getstatusoutput",
    *(f"os.{name}" for name in ("system", "popen", "posix_spawn", "posix_spawnp", "fork", "forkpty")),
    *(f"os.exec{letters}" for letters in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")),
    *(f"os.spawn{letters}" for letters in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")),
    *("asyncio.create_subprocess_exec", "asyncio.create_subprocess_shell", "pty.spawn", "pty.fork"),
    *("multiprocessing.Process", "multiprocessing.Pool", "multiprocessing.get_context"),
    *("concurrent.futures.ProcessPoolExecutor", "torch.multiprocessing.spawn"),
}
# Calls that write, move or remove files; methods of a Path by their names alone, as their object's type is not known.
WRITES = {
    *(f"os.{name}" for name in ("rename", "renames", "replace", "remove", "unlink", "rmdir", "removedirs", "mkdir")),
    *(f"os.{name}" for name in ("makedirs", "truncate", "link", "symlink", "chmod", "mkfifo", "utime")),
    *(f"shutil.{name}" for name in ("rmtree", "move", "copy", "copy2", "copyfile", "copytree", "make_archive")),
    *(f"tempfile.{name}" for name in ("mkdtemp", "mkstemp", "TemporaryDirectory", "NamedTemporaryFile")),
    *(f"tempfile.{name}" for name in ("TemporaryFile", "SpooledTemporaryFile")),
    *("torch.save", "filelock.FileLock", "filelock.SoftFileLock", "numpy.save", "pickle.dump", "json.dump"),
}
WRITING_METHODS = {
    *("write_text", "write_bytes", "mkdir", "rmdir", "unlink", "touch", "rename", "symlink_to", "hardlink_to"),
    *("chmod", "tofile"),
}


def file_writes(root: Path) -> list[str]:
    """Where the package writes, moves or removes files: calls of WRITES and WRITING_METHODS, files opened to write."""
    found = set(_uses(root, WRITES))
    for path in modules(root).values():
        tree = parsed(path)
        names = _names(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = _dotted(node.func, names)
                method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
                if method in WRITING_METHODS or ("open" in (method, name) and _may_write(node, name)):
                    found.add(f"{path.relative_to(root)}:{node.lineno}")
    return sorted(found)


def _may_write(call: ast.Call, name: str) -> bool:
    """Whether a call of open() or of a Path's open may open to write: its mode says so, or is not a constant."""
    if name == "os.open":
        return any("O_WR" in ast.dump(flag) or "O_RDWR" in ast.dump(flag) or "O_CREAT" in ast.dump(flag)
                   for flag in call.args[1:])  # fmt: skip
    place = 1 if name in ("open", "io.open") else 0
    modes = [*call.args[place : place + 1], *(each.value for each in call.keywords if each.arg == "mode")]
    return any(not isinstance(mode, ast.Constant) or bool(set("wax+") & set(str(mode.value))) for mode in modes)


def environment_uses(root: Path) -> list[str]:
    """Where the package reads or writes the environment, config.py left out."""
    return [place for place in _uses(root, ENVIRONMENT) if not place.startswith("jit_kernel/config.py:")]


def process_starts(root: Path) -> list[str]:
    """Where the package starts a process."""
    return list(_uses(root, PROCESSES))


def long_functions(root: Path) -> list[str]:
    """Functions of more than LONG lines."""
    found = []
    for path in modules(root).values():
        for node in ast.walk(parsed(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno:
                lines = node.end_lineno - node.lineno + 1
                if lines > LONG:
                    found.append(f"{path.relative_to(root)}:{node.lineno} {node.name} ({lines} lines)")
    return found


def measured(root: Path) -> dict[str, object]:
    """The numbers of a checkout."""
    lengths = [len(path.read_text(encoding="utf-8").splitlines()) for path in modules(root).values()]
    return {
        "circles": len(circles(root)),
        "places that list nine or more arguments": len(argument_lists(root)),
        "files flat in fa3/": sum(1 for _ in (root / "jit_kernel" / "fa3").glob("*.py")),
        "uses of the environment outside config.py": len(environment_uses(root)),
        "functions over 60 lines": len(long_functions(root)),
        "median file": statistics.median(lengths),
        "files": len(lengths),
    }


if __name__ == "__main__":
    place = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT
    print(json.dumps(measured(place), indent=1))
    if "--list" in sys.argv:
        for list_of in (circles, argument_lists, environment_uses, process_starts, file_writes, long_functions):
            print(list_of.__name__, *list_of(place), sep="\n  ")
