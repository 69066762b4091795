"""llama.cpp through the C interface that llama-cpp-python gives it, and what it reports."""

import ctypes
import functools
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

INSTALL = 'pip install "gguf>=0.17" "llama-cpp-python>=0.3.36"'
_WARNING, _ERROR, _CONTINUED = 3, 4, 5  # levels of ggml's log
_NAME_BYTES = 256


class Library:
    """llama.cpp, silent: it reports to listeners, and its complaints are kept for error messages.

    Attributes:
        api: the module with its functions and constants.
    """

    def __init__(self, api: ModuleType) -> None:
        self.api = api
        self._complaints: deque[str] = deque(maxlen=12)
        self._listeners: list[Callable[[str], None]] = []
        self._level = 0
        self._callback = api.llama_log_callback(self._hear)  # kept, because C holds only a pointer to it
        api.llama_log_set(self._callback, None)
        api.llama_backend_init()

    def _hear(self, level: int, text: bytes, _) -> None:
        self._level = self._level if level == _CONTINUED else level
        line = text.decode("utf-8", "replace")
        if self._level in (_WARNING, _ERROR):
            self._complaints.append(line)
        for listener in self._listeners:
            listener(line)

    @contextmanager
    def heard_by(self, listener: Callable[[str], None]) -> Iterator[None]:
        """Pass what llama.cpp reports to a function, piece by piece."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    @contextmanager
    def complaining(self, about: str) -> Iterator[Callable[[], ValueError]]:
        """Gives a function that makes an error of what llama.cpp has complained about since."""
        self._complaints.clear()
        yield lambda: ValueError(f"{about}: {self._complaint() or 'llama.cpp gives no reason'}")

    def _complaint(self) -> str:
        return " ".join("".join(self._complaints).split())

    def metadata(self, read: Callable, owner: object, key: str) -> str | None:
        """A value of a file's metadata as text, read by one of llama.cpp's `..._meta_val_str`."""
        buffer = ctypes.create_string_buffer(_NAME_BYTES)
        length = read(owner, key.encode(), buffer, _NAME_BYTES)
        return buffer.value.decode("utf-8", "replace") if length >= 0 else None


def file_name(path: Path) -> bytes:
    """A path as llama.cpp takes it."""
    return str(path).encode()


@functools.cache
def load_library() -> Library:
    """llama.cpp.

    Raises:
        ImportError: llama-cpp-python is missing or doesn't load; says what to install.
    """
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise ImportError(f"llama.cpp is missing ({error}); install it: {INSTALL}") from error
    return Library(llama_cpp)


def load_gguf() -> ModuleType:
    """The library that reads and writes GGUF files.

    Raises:
        ImportError: gguf is missing; says what to install.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"gguf is missing ({error}); install it: {INSTALL}") from error
    return gguf
