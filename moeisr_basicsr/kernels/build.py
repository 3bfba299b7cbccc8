"""Compiles the C++ kernels on first use and keeps the library for every later process.

The sources have a plain C interface: neither PyTorch's nor Python's headers are needed, the build takes seconds, and
one library serves every Python version and every x86-64 processor.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

SOURCE_DIR = Path(__file__).parent / 'csrc'
# No fused multiply-add behind our back: coordinates and blend weights must round as the torch code does.
COMPILE_FLAGS = ['-O3', '-fopenmp', '-ffp-contract=off', '-fvisibility=hidden', '-w']
DIGEST_SIZE = hashlib.sha256().digest_size


class BuildError(RuntimeError):
    """The kernels cannot be built or loaded here; the message is one line for the user."""


def load_library() -> ctypes.CDLL:
    """Returns the kernels, compiled by `torch.utils.cpp_extension.load` unless an earlier process left them whole.

    Raises:
        BuildError: No compiler, no ninja, no place to write, or a library that does not load.
    """
    if platform.machine().lower() not in ('x86_64', 'amd64') or os.name != 'posix':
        raise BuildError(f'written for x86-64 Linux and macOS; this is {platform.machine()} {platform.system()}')
    root = _cache_root()
    path = root / f'decode_{_fingerprint()}.so'
    try:
        if not _is_whole(path):
            root.mkdir(parents=True, exist_ok=True)
            with _only_one(root / 'build.lock'):
                if not _is_whole(path):  # another process may have built it meanwhile
                    _compile(path)
        return ctypes.CDLL(str(path))
    except BuildError:
        raise
    except OSError as error:
        raise BuildError(f'{path}: {error}') from error


def _cache_root() -> Path:
    """Where torch keeps compiled extensions (found without importing its slow extension module)."""
    root = os.environ.get('TORCH_EXTENSIONS_DIR')
    if root is None:
        cache = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
        root = os.path.join(cache, 'torch_extensions')
    return Path(root) / 'moeisr_basicsr'


def _is_whole(path: Path) -> bool:
    """Whether the library is there and ends with its own digest. To load a damaged one may kill the process."""
    if not path.exists():
        return False
    content = path.read_bytes()
    return hashlib.sha256(content[:-DIGEST_SIZE]).digest() == content[-DIGEST_SIZE:]


def _put(built: Path, path: Path) -> None:
    """Moves a library into place in one step, with its digest behind it, where loaders do not look."""
    with open(built, 'rb+') as file:
        file.write(hashlib.sha256(file.read()).digest())
        file.flush()
        os.fsync(file.fileno())
    os.replace(built, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _sources() -> list[Path]:
    return sorted(SOURCE_DIR.glob('*.cpp'))


def _link_flags() -> list[str]:
    """Links torch's own OpenMP runtime if it is GCC's: a second one would keep a second set of threads spinning."""
    bundled = sorted((Path(torch.__file__).parent / 'lib').glob('libgomp*.so*'))
    clang = 'clang' in os.environ.get('CXX', '')
    flags = ['-Wl,--as-needed'] if platform.system() == 'Linux' else []
    return flags + ([str(bundled[0])] if bundled and not clang else ['-fopenmp'])


def _fingerprint() -> str:
    """Changes with the sources, the flags and the C library, so that a stale library is never loaded."""
    digest = hashlib.sha256()
    for path in sorted(SOURCE_DIR.iterdir()):
        digest.update(path.name.encode() + b'\0' + path.read_bytes() + b'\0')
    digest.update(repr((COMPILE_FLAGS, _link_flags(), platform.libc_ver(), platform.machine())).encode())
    return digest.hexdigest()[:16]


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Holds a lock that the system drops when the process dies, so that a killed build blocks nobody."""
    import fcntl  # not on Windows

    with open(lock, 'w') as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _compile(path: Path) -> None:
    """Builds in a private folder, then moves the library into place."""
    folder = tempfile.mkdtemp(prefix='build_', dir=path.parent)
    search_path = os.environ.get('PATH', '')
    try:
        # A pip-installed ninja lies beside the interpreter, which need not be on the search path.
        os.environ['PATH'] = os.pathsep.join(filter(None, [search_path, os.path.dirname(sys.executable)]))
        from torch.utils import cpp_extension  # needs setuptools

        cpp_extension.load(
            'moeisr_decode',
            [str(source) for source in _sources()],
            extra_cflags=COMPILE_FLAGS,
            extra_ldflags=_link_flags(),
            build_directory=folder,
            with_cuda=False,
            is_python_module=False,
        )
        _put(Path(folder, 'moeisr_decode.so'), path)
    # no setuptools; no compiler; no ninja or a failed build; torch 2.1 where there is no compiler
    except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BuildError(f'the C++ build failed: {first_line}') from error
    finally:
        os.environ['PATH'] = search_path
        shutil.rmtree(folder, ignore_errors=True)
