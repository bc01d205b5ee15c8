"""llama.cpp in this process: the C interface of ``llama.h``, in the build that the ``xllamacpp`` wheel brings.

``xllamacpp`` itself gives the probabilities of the next token; the library that it is made of exports the functions of
``llama.h``, which give the logits at every position, and that is what a file is compared by.

The structures of parameters grow from version to version, so they are taken as the library fills them in and handed back:
their sizes need not be known, since a callee reads as much as it knows.  Fields that are set are found by what the library's
own defaults are: ``n_ctx``, ``n_batch`` and ``n_ubatch`` are the first three of the context's parameters and are read back
from it; the types of the cache are the pair of ``F16`` behind the callbacks that follow the last of the numbers -1.0; flash
attention, which computes in float16 and would hide differences of less than 1e-3, is the last of four integers -1.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from surgeon.errors import LowerError

LIBRARY = "xllamacpp"
INSTALL = "pip install 'surgeon[gguf]'"
_WORDS = 256
"""Room for a structure of parameters, in words of 32 bits; those of this year's versions take 40."""
_F32, _F16 = 0, 1
"""Numbers of ``ggml_type``."""
_MINUS_ONE = 0xBF800000
"""-1.0 as a float32's bits."""
_UNSET = 0xFFFFFFFF
"""-1 as an integer's bits."""
_BATCH = 512
"""Tokens that are computed at once."""


class _Parameters(ctypes.Structure):
    _fields_ = [("words", ctypes.c_uint32 * _WORDS)]  # as ctypes wants it


class _Batch(ctypes.Structure):
    _fields_ = [  # as ctypes wants it
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_said: list[str] = []
"""What the library has printed since a file was opened, for the message where it refuses one."""


def _keep(level: int, text: bytes | None, _: object) -> None:
    if level >= 3 and text:  # warnings and errors
        _said.append(text.decode("utf-8", "replace").strip())
        del _said[:-20]


_listen = _LOG(_keep)


def unavailable() -> str | None:
    """Why llama.cpp does not run here, None where it does."""
    if importlib.util.find_spec(LIBRARY) is None:
        return f"llama.cpp runs it through {LIBRARY}, which is not installed: {INSTALL}"
    try:
        _library()
    except (ImportError, OSError, AttributeError, LowerError) as error:
        return f"llama.cpp runs it through {LIBRARY}, which cannot be used here ({error}): {INSTALL}"
    return None


@functools.cache
def _library() -> Any:
    """The library, with its functions declared and its log caught."""
    module = importlib.import_module(f"{LIBRARY}.{LIBRARY}")
    library = ctypes.CDLL(str(module.__file__))
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    declared: dict[str, tuple[Any, list[Any]]] = {
        "llama_backend_init": (None, []),
        "llama_log_set": (None, [_LOG, pointer]),
        "llama_model_default_params": (_Parameters, []),
        "llama_context_default_params": (_Parameters, []),
        "llama_model_load_from_file": (pointer, [ctypes.c_char_p, _Parameters]),
        "llama_init_from_model": (pointer, [pointer, _Parameters]),
        "llama_model_free": (None, [pointer]),
        "llama_free": (None, [pointer]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_vocab_n_tokens": (number, [pointer]),
        "llama_vocab_type": (number, [pointer]),
        "llama_n_ctx": (ctypes.c_uint32, [pointer]),
        "llama_n_batch": (ctypes.c_uint32, [pointer]),
        "llama_n_ubatch": (ctypes.c_uint32, [pointer]),
        "llama_set_n_threads": (None, [pointer, number, number]),
        "llama_get_memory": (pointer, [pointer]),
        "llama_memory_clear": (None, [pointer, ctypes.c_bool]),
        "llama_memory_seq_rm": (ctypes.c_bool, [pointer, number, number, number]),
        "llama_batch_init": (_Batch, [number, number, number]),
        "llama_batch_free": (None, [_Batch]),
        "llama_decode": (number, [pointer, _Batch]),
        "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [pointer, number]),
        "llama_tokenize": (
            number,
            [pointer, ctypes.c_char_p, number, ctypes.POINTER(number), number, ctypes.c_bool, ctypes.c_bool],
        ),
    }
    for name, (result, arguments) in declared.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(_listen, None)
    library.llama_backend_init()
    _context_parameters(library, 512)
    return library


def _context_parameters(library: Any, positions: int) -> _Parameters:
    """The defaults with this many positions and caches of float32.

    Raises:
        LowerError: the library's defaults are laid out otherwise than in any version that is known.
    """
    parameters = library.llama_context_default_params()
    words = parameters.words
    last = max((place for place in range(32) if words[place] == _MINUS_ONE), default=0)
    types = next((place for place in range(last + 1, last + 16) if words[place] == _F16 and words[place + 1] == _F16), 0)
    if not (last and types) or words[2] > words[1] or not 0 < words[2] <= 65536:
        raise LowerError("its parameters of a context are laid out in a way that surgeon does not know")
    words[0], words[1], words[2] = positions, _BATCH, _BATCH
    words[types] = words[types + 1] = _F32
    unset = [place for place in range(last) if words[place : place + 4] == [_UNSET] * 4]
    if unset:  # kinds of rotary scaling, pooling, attention and flash attention, each of which -1 leaves to the model
        words[unset[0] + 3] = 0
    return parameters  # type: ignore[no-any-return]  # a structure of ctypes


class Runtime:
    """A file, opened by llama.cpp on the CPU, with caches of float32.

    Texts are computed one row at a time in one context, which grows with them.

    Attributes:
        tokens: how many the vocabulary has.
        held: positions of a text that are kept.
    """

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            LowerError: llama.cpp is not here, or refuses the file; with what it says.
        """
        problem = unavailable()
        if problem is not None:
            raise LowerError(f"{path}: {problem}")
        self._path, self._library = path, _library()
        _said.clear()
        self._model = self._library.llama_model_load_from_file(str(path).encode(), self._library.llama_model_default_params())
        if not self._model:
            raise LowerError(f"{path}: llama.cpp refuses the file: {'; '.join(_said[-4:]) or 'it gives no reason'}")
        self._vocabulary = self._library.llama_model_get_vocab(self._model)
        self.tokens = int(self._library.llama_vocab_n_tokens(self._vocabulary))
        self._context: int | None = None
        self._positions = 0
        self._threads = 1
        self.held = 0

    def __del__(self) -> None:
        """Free what the library holds."""
        self.close()

    def close(self) -> None:
        """Free what the library holds; nothing can be run any more."""
        if getattr(self, "_context", None):
            self._library.llama_free(self._context)
        if getattr(self, "_model", None):
            self._library.llama_model_free(self._model)
        self._context = self._model = None

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        """Run on ``count`` threads within the context."""
        before, self._threads = self._threads, count
        try:
            yield
        finally:
            self._threads = before

    def clear(self) -> None:
        """Forget every position."""
        self.held = 0
        if self._context:
            self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def cut(self, length: int) -> None:
        """Forget the positions from ``length`` on."""
        self.held = min(self.held, length)
        self._library.llama_memory_seq_rm(self._library.llama_get_memory(self._context), 0, length, -1)

    def reserve(self, positions: int) -> None:
        """Have room for a text of so many tokens; what was kept of one is forgotten where there was too little.

        Raises:
            LowerError: llama.cpp cannot make the context; with what it says.
        """
        if self._context and positions <= self._positions:
            return
        if self._context:
            self._library.llama_free(self._context)
            self._context, self.held = None, 0
        size = max(256, -(-max(positions, 2 * self._positions) // 256) * 256)
        _said.clear()
        self._context = self._library.llama_init_from_model(self._model, _context_parameters(self._library, size))
        if not self._context:
            raise LowerError(f"{self._path}: llama.cpp makes no context of {size} positions: {'; '.join(_said[-4:])}")
        found = [getattr(self._library, f"llama_n_{what}")(self._context) for what in ("ctx", "batch", "ubatch")]
        if found[0] < size or not 0 < found[2] <= found[1] <= max(size, _BATCH):
            raise LowerError(f"{self._path}: llama.cpp made a context of {found} positions, asked for {[size, _BATCH, _BATCH]}")
        self._positions = size

    def read(self, tokens: Sequence[int], start: int, *, last: bool = False) -> Tensor:
        """Compute new tokens of a text whose first ``start`` are kept.

        Args:
            tokens: their numbers.
            start: position of the first.
            last: only what follows the last token is asked for.

        Returns:
            Logits [tokens, vocabulary] float32, or [1, vocabulary].

        Raises:
            LowerError: a number is not in the vocabulary, or llama.cpp fails.
        """
        beyond = [token for token in tokens if not 0 <= token < self.tokens]
        if beyond:
            raise LowerError(f"{self._path}: token {beyond[0]} is not in the vocabulary of {self.tokens}")
        self.reserve(start + len(tokens))
        self._library.llama_set_n_threads(self._context, self._threads, self._threads)
        rows = torch.empty(1 if last else len(tokens), self.tokens)
        for first in range(0, len(tokens), _BATCH):
            self._read(tokens[first : first + _BATCH], start + first, rows if last else rows[first:], last=last)
        self.held = start + len(tokens)
        return rows

    def _read(self, tokens: Sequence[int], start: int, rows: Tensor, *, last: bool) -> None:
        library = self._library
        batch = library.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for place, token in enumerate(tokens):
                batch.token[place], batch.pos[place] = token, start + place
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
                batch.logits[place] = int(not last or place == len(tokens) - 1)
            _said.clear()
            failed = library.llama_decode(self._context, batch)
            if failed:
                raise LowerError(f"{self._path}: llama.cpp fails on {len(tokens)} tokens ({failed}): {'; '.join(_said[-4:])}")
            for place in [len(tokens) - 1] if last else range(len(tokens)):
                found = numpy.ctypeslib.as_array(library.llama_get_logits_ith(self._context, place), (self.tokens,))
                rows[0 if last else place] = torch.from_numpy(found)
        finally:
            library.llama_batch_free(batch)

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Numbers of the tokens of a text as llama.cpp splits it, without those that begin or end it.

        Args:
            text: any.
            special: text that spells a special token is that token.
        """
        encoded = text.encode()
        room = len(encoded) + 8
        found = (ctypes.c_int32 * room)()
        count = self._library.llama_tokenize(self._vocabulary, encoded, len(encoded), found, room, False, special)
        if count < 0:
            raise LowerError(f"{self._path}: llama.cpp does not split the text {text!r}")
        return list(found[:count])
