"""Compiled graphs on disk: another process runs them without tracing.

PyTorch's own cache keeps what the C++ compiler made, not what Python traced, which for the update
of an agent takes as long again. So a graph is compiled ahead of time, into one shared library
(AOTInductor), and kept in a directory beside that cache, ``hypergrad_rl`` in
``TORCHINDUCTOR_CACHE_DIR``. Loading one is loading code: the directory is the user's alone, as is
PyTorch's. ``TORCHINDUCTOR_FORCE_DISABLE_CACHES=1`` goes without either.

A file is named by all that its graph depends on (:func:`key_of`). Whatever cannot be named so, such
as networks of one's own, is compiled in each process.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import itertools
import logging
import os
import pickle
import platform
import shutil
import stat
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

import hypergrad

logger = logging.getLogger(__name__)
#: Bytes that all files together may have: a hundred graphs. The longest unused go first.
LIMIT = 256 * 2**20
FORMAT = 2  # of the files: part of their names
_UNPACKED = "tmp-"
_BEGAN = time.time()


class Uncacheable(Exception):  # no error: it is compiled as any other function
    """What a graph depends on has no name that another process could find it by."""


def signature_of(leaves: list[Any]) -> tuple[Any, ...]:
    """What the code of a graph is made for: settings of the process, shapes, types and strides.

    Raises:
        Uncacheable: an input that is no ordinary tensor of the CPU.
    """
    for x in leaves:
        if x is not None and not (
            type(x) is Tensor and x.is_cpu and x.layout is torch.strided and not x.is_complex()
        ):
            raise Uncacheable(f"an input of type {type(x).__name__}")
    return (
        torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(), torch.get_float32_matmul_precision(),
        torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(),
        *[None if x is None else (x.dtype, x.shape, x.stride()) for x in leaves],
    )  # fmt: skip


def described(value: Any) -> Any:
    """A value that a graph holds, as text: objects of this package by their class and attributes.

    Raises:
        Uncacheable: it is, or holds, code or objects from elsewhere.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return [described(entry) for entry in value]
    if isinstance(value, dict):
        return [(name, described(entry)) for name, entry in value.items()]
    kind = type(value)
    if kind.__module__.partition(".")[0] != __package__:
        raise Uncacheable(f"code from outside of {__package__}: {value!r}")
    held = {
        name: entry
        for cls in reversed(kind.__mro__)
        for name, entry in vars(cls).items()
        if isinstance(entry, (bool, int, float, str, tuple)) and not name.startswith("__")
    }
    return kind.__module__, kind.__qualname__, described(held | vars(value))


def code_of(*packages: Path) -> str:
    """A hash of all sources in some folders.

    Raises:
        Uncacheable: a source that may have changed since it was imported.
    """
    sources = hashlib.sha256()
    for package in packages:
        for path in sorted(package.rglob("*.py")):
            about = path.stat()
            if max(about.st_mtime, about.st_ctime) >= _BEGAN:
                raise Uncacheable(f"{path} has changed since this process began")
            content = path.read_bytes()
            sources.update(f"{path.relative_to(package)} {len(content)} ".encode() + content)
    return sources.hexdigest()


def _surroundings() -> str:
    """The code of both packages, PyTorch, Python and the processor.

    Looked at each time, which takes 5 ms: sources may change, and be imported again.
    """
    packages = (hypergrad, sys.modules[__package__])
    code = code_of(*[Path(str(package.__file__)).parent for package in packages])
    processor = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        # Code is for this very model (-march=native), and a home directory may be that of many.
        for line in itertools.takewhile(str.strip, lines):  # of the first processor
            if line.startswith(("model name", "flags", "Features", "CPU part")):
                processor.append(line)
    return repr((
        code, torch.__version__, torch.version.git_version, torch.__config__.show(), sys.version,
        processor,
    ))  # fmt: skip


def key_of(
    function: Callable[..., Any], baked: Any, structure: TreeSpec, signature: tuple[Any, ...]
) -> str:
    """The name of a graph: a hash of all that it depends on.

    Those are the function and the code of this package and of ``hypergrad``, what it holds
    (``baked``: of agents their configuration, policy and shapes), structure, shapes, types and
    strides of the inputs, the settings of the process (threads, determinism, precision), those of
    PyTorch's compiler, PyTorch itself, Python and the processor.

    Raises:
        Uncacheable: something of it is code from elsewhere.
    """
    import torch._inductor.config as inductor  # a second to import

    owner = getattr(function, "__self__", None)
    kind = function if owner is None else type(owner)
    if kind.__module__.partition(".")[0] != __package__:
        raise Uncacheable(f"code from outside of {__package__}: {function!r}")
    named = kind.__module__, kind.__qualname__, function.__name__, described(baked)
    settings = inductor.save_config_portable()
    settings.pop("aot_inductor.metadata", None)  # which the compiler itself writes to
    text = repr(
        (FORMAT, named, str(structure), signature, sorted(settings.items()), _surroundings())
    )
    return hashlib.sha256(text.encode()).hexdigest()


def directory() -> Path:
    """Where the graphs are, made if need be, readable and writable by the user alone.

    Raises:
        OSError: it cannot be made.
        Uncacheable: it is someone else's, or caches are switched off.
    """
    import torch._inductor.config as inductor
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    if inductor.force_disable_caches:
        raise Uncacheable("PyTorch's caches are switched off")
    path = Path(cache_dir()) / "hypergrad_rl"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = path.lstat()
    if not stat.S_ISDIR(about.st_mode) or (hasattr(os, "getuid") and about.st_uid != os.getuid()):
        raise Uncacheable(f"{path} is not a directory of this user")
    if about.st_mode & 0o077:
        path.chmod(0o700)
    return path


class Graph:
    """A compiled graph in the place of its function, for inputs of one signature."""

    def __init__(self, content: bytes, beside: Path) -> None:
        """``content`` of a file, unpacked for a moment in a directory of its own ``beside``.

        Raises:
            Exception: of any kind, for damaged content.
        """
        with tempfile.TemporaryDirectory(prefix=_UNPACKED, dir=beside) as unpacked:
            with zipfile.ZipFile(io.BytesIO(content)) as parts:  # which compares check sums
                parts.extractall(unpacked)
            tree = pickle.loads((Path(unpacked) / "tree").read_bytes())
            library = str(Path(unpacked) / "graph.so")
            self.runner = torch._C._aoti.AOTIModelContainerRunnerCpu(library, 1)
        self.inputs: list[int] = tree[0]
        self.order, self.structure = tree_flatten(tree[1])

    def __call__(self, leaves: list[Any]) -> Any:
        """The function's results, from the leaves of its inputs."""
        results = self.runner.run([leaves[i] for i in self.inputs])
        # An input that is handed on has a negative number.
        given = [results[i] if i >= 0 else leaves[~i] for i in self.order]
        return tree_unflatten(given, self.structure)


def traced(function: Callable[..., Any], backend: Any, **options: Any) -> Callable[..., Any]:
    """``function`` by ``torch.compile``: one graph for each set of shapes."""
    options |= {"fullgraph": True, "dynamic": False, "backend": backend}
    # Agents of one process are no reason to give up on any of them (torch >= 2.13).
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        options["isolate_recompiles"] = True
    logging.getLogger("torch._inductor.ir").addFilter(_not_of_shims)
    compiled: Callable[..., Any] = torch.compile(function, **options)
    return compiled


def _not_of_shims(record: logging.LogRecord) -> bool:
    """Drops what PyTorch logs of decompositions that graphs call through Python: no news here."""
    return "missing a c-shim" not in record.getMessage()


def compile_graph(function: Callable[..., Any], inputs: tuple[Any, ...], beside: Path) -> bytes:
    """``function`` for inputs like these, compiled: the content of a file.

    Raises:
        Uncacheable: it holds tensors that are no inputs, or gives results that are no tensors.
        Exception: whatever the compiler has to say.
    """
    from torch._inductor.compile_fx import compile_fx_aot

    from hypergrad_rl.graph_passes import inductor_options

    # Copies are distinct tensors, also where inputs are one tensor or share memory: that a graph of
    # those would take for granted.
    copies = tree_map(_copy, inputs)
    places = {id(x): i for i, x in enumerate(tree_flatten(copies)[0])}
    used: list[int] = []
    results: list[Tensor] = []
    libraries: list[Path] = []
    with tempfile.TemporaryDirectory(prefix=_UNPACKED, dir=beside) as made:

        def backend(graph: torch.fx.GraphModule, given: list[Tensor]) -> Callable[..., Any]:
            if not all(id(x) in places for x in given):
                raise Uncacheable("tensors that are no inputs")
            used[:] = [places[id(x)] for x in given]
            context = torch._guards.TracingContext.get()
            assert context.fake_mode is not None
            fakes: list[Any] = [context.fake_mode.from_tensor(x) for x in given]
            # A precompiled header takes as long as what it saves for five graphs.
            options = {
                "aot_inductor.output_path": made,
                "aot_inductor.precompile_headers": False,
                **inductor_options(),
            }
            with warnings.catch_warnings():  # PyTorch 2.13 copies what it deprecates itself
                warnings.filterwarnings("ignore", r".*treespec, LeafSpec", FutureWarning)
                libraries[:] = [Path(str(compile_fx_aot(graph, fakes, config_patches=options)))]
            runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(libraries[0]), 1)

            def run(*tensors: Tensor) -> list[Tensor]:
                results[:] = runner.run(list(tensors))
                return results

            return run

        returned = traced(function, backend)(*copies)
        indices = {key: ~i for key, i in places.items()}
        indices |= {id(x): i for i, x in enumerate(results)}
        if not all(id(x) in indices for x in tree_flatten(returned)[0]):
            raise Uncacheable("results that are no tensors of the graph")
        tree = used, tree_map(lambda x: indices[id(x)], returned)
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as parts:
            parts.writestr("tree", pickle.dumps(tree))
            for suffix in (".so", ".json"):  # the latter of calls that have no C++ function
                path = libraries[0].with_suffix(suffix)
                if path.exists():
                    parts.write(path, f"graph{suffix}")
    return content.getvalue()


def _copy(x: Any) -> Any:
    return x if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)


def graph_of(
    function: Callable[..., Any], baked: Any, inputs: tuple[Any, ...], signature: tuple[Any, ...]
) -> tuple[Graph, bool]:
    """The graph of ``function`` for inputs of one signature, and whether it came from the disk.

    Processes that want the same one at once compile it once: the others wait.

    Raises:
        Uncacheable: there can be none.
        Exception: whatever the compiler has to say.
    """
    path = directory() / key_of(function, baked, tree_flatten(inputs)[1], signature)
    graph = _loaded(path)
    if graph is None:
        with FileLock(path.with_name(f"lock-{path.name[0]}")):
            graph = _loaded(path)
            if graph is None:
                content = compile_graph(function, inputs, path.parent)
                _save(path, content)
                return Graph(content, path.parent), False
    return graph, True


def _loaded(path: Path) -> Graph | None:
    if not path.exists():
        return None
    try:
        graph = Graph(path.read_bytes(), path.parent)
        os.utime(path)  # it was of use: others go first
    except Exception as error:  # a damaged file may fail in any way: it is made again
        logger.debug("%s cannot be used: %r", path, error)
        return None
    return graph


def _save(path: Path, content: bytes) -> None:
    """Write all of a file or nothing, and let go what is beyond the limit."""
    try:
        with tempfile.NamedTemporaryFile(prefix=_UNPACKED, dir=path.parent, delete=False) as file:
            file.write(content)
        Path(file.name).replace(path)
        evict(path.parent, LIMIT)
    except OSError as error:
        logger.debug("%s cannot be written: %r", path, error)


def evict(folder: Path, limit: int) -> None:
    """Remove the files that have not been used for longest, beyond ``limit`` bytes of all.

    What processes that were killed left unpacked goes after a day.
    """
    known = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process evicts, too
            about = path.stat()
            if not path.name.startswith(("lock-", _UNPACKED)):
                known.append((about.st_mtime, about.st_size, path))
            elif path.name.startswith(_UNPACKED) and about.st_mtime < time.time() - 86400:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    for _, size, path in sorted(known, reverse=True):
        limit -= size
        if limit < 0:
            path.unlink(missing_ok=True)
