"""Builds and calls kernels.c and sampling.c: the small operators of a forward pass and of sampling, fused, for the CPU.

The library is compiled by the system's C compiler for the processor at hand and kept in the caller's cache directory
under a name that hashes all it depends on: source, compiler, flags, processor. A second start loads it and compiles
nothing. A compiler that is missing or fails raises KernelsUnavailable, and the caller computes with torch alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from protocol.errors import TallyError

SOURCES: Final = tuple(Path(__file__).with_name(name) for name in ("kernels.c", "sampling.c", "kernels.h"))
COMPILERS: Final = ("gcc", "cc", "clang")
FLAGS: Final = ("-O3", "-march=native", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared")
"""`-march=native`: the library is never moved to another machine. No -ffast-math: sums keep the order they are
written in, which is what makes a row's bits independent of its company."""

COMPILE_TIMEOUT_S: Final = 120
"""Longest compilation. Unit: seconds. It takes two on an idle core; doubling it doubles how long a hung compiler can
hold up a start."""

MAX_HEAD_DIM: Final = 1024
"""Widest attention head the kernels hold in their buffer. Unit: numbers. Widest in use today is 256."""

PANEL: Final = 32
"""Outputs of one panel of a packed matrix, as in kernels.c."""

_P, _I, _L, _F, _D = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float, ctypes.c_double


class KernelsUnavailable(TallyError):
    """No kernels on this machine; says why. Nothing is lost but speed."""


class _Shape(ctypes.Structure):
    """Mirror of Shape in kernels.c."""

    _fields_ = [
        ("bf16", _I),
        ("threads", _I),
        ("heads", _L),
        ("kv_heads", _L),
        ("head_dim", _L),
        ("window", _L),
        ("max_context", _L),
        ("eps", _F),
        ("cos", _P),
        ("sin", _P),
    ]


class _Product(ctypes.Structure):
    """Mirror of Product in kernels.c."""

    _fields_ = [("packed", _P), ("bias", _P), ("inputs", _L), ("outputs", _L)]


class _Layer(ctypes.Structure):
    """Mirror of Layer in kernels.c."""

    _fields_ = [
        *((name, _P) for name in ("input_norm", "q_norm", "k_norm", "mlp_norm")),
        *((name, _Product) for name in ("qkv", "out", "gate_up", "down")),
        ("kv", _P),
    ]


class _Room(ctypes.Structure):
    """Mirror of Room in kernels.c."""

    _fields_ = [("x", _P), ("y", _P), ("wide", _P), ("narrow", _P), ("scratch", _P)]


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """One layer of a dense model as the whole-forward kernel reads it. `kv`: address of the layer's KV."""

    norms: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]  # input, query, key, MLP
    products: tuple[Product, Product, Product, Product]  # qkv, out, gate_up, down
    kv: int


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What all attention calls of one model have in common.

    `cos`, `sin`: [max_context, head_dim], dtype of the model; the sine carries the sign of rotate_half.
    """

    heads: int
    kv_heads: int
    head_dim: int
    window: int
    max_context: int
    eps: float
    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True, slots=True)
class DrawArrays:
    """How each row is drawn. `keys`: 2 words a row, "I"; `temperature`: "f"; `top_k`: "q", the vocabulary's size for
    no cut; `top_p`: "d", 2 for no cut."""

    keys: array[int]
    temperature: array[float]
    top_k: array[int]
    top_p: array[float]


def default_cache() -> Path:
    """Where compiled kernels are kept unless the caller says otherwise."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tallystick" / "kernels"


def _run(command: list[str]) -> str:
    """Raises: KernelsUnavailable."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise KernelsUnavailable(f"{command[0]} could not be run ({exc})") from exc
    if done.returncode:
        raise KernelsUnavailable(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def _compiler() -> str:
    """Raises: KernelsUnavailable."""
    for name in COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return path
    raise KernelsUnavailable(f"no C compiler found ({', '.join(COMPILERS)}): apt-get install gcc")


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def build(cache: Path) -> Path:
    """The compiled library, from `cache` or compiled into it. Raises: KernelsUnavailable."""
    compiler = _compiler()
    version = _run([compiler, "--version"])
    parts = (*(source.read_text() for source in SOURCES), version, " ".join(FLAGS), _processor())
    target = cache / f"kernels-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}.so"
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        _check_owner(cache)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                made = Path(scratch) / target.name
                sources = [str(source) for source in SOURCES if source.suffix == ".c"]
                _run([compiler, *FLAGS, "-o", str(made), *sources, "-lm"])
                made.replace(target)  # whole or not at all, also when two nodes start at once
    except OSError as exc:
        raise KernelsUnavailable(f"{cache} cannot be written ({exc}): give another cache directory") from exc
    return target


def _check_owner(cache: Path) -> None:
    """Code is loaded from here: it must be ours alone to write. Raises: KernelsUnavailable."""
    status = cache.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise KernelsUnavailable(f"{cache} can be written by others: chmod 700 it, or give another cache directory")


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Product:
    """One packed matrix with its bias: x -> x @ weight.T + bias, a row the same bits whatever the others are."""

    __slots__ = ("_bias", "_kernels", "_packed", "outputs", "struct")

    def __init__(
        self, kernels: Kernels, packed: torch.Tensor, bias: torch.Tensor | None, inputs: int, outputs: int
    ) -> None:
        self._kernels, self._packed, self._bias, self.outputs = kernels, packed, bias, outputs
        self.struct = _Product(packed.data_ptr(), _address(bias), inputs, outputs)

    def __call__(self, x: torch.Tensor, wide: bool = False) -> torch.Tensor:
        """[rows, in] bf16 -> [rows, out] bf16; `wide`: the same numbers in fp32."""
        return self._kernels.multiply(self, x, wide)


def dense_layers(layers: Sequence[DenseLayer]) -> Any:
    """What `Kernels.forward` reads. The tensors in `layers` must outlive it."""
    made = (_Layer * len(layers))()
    for struct, layer in zip(made, layers, strict=True):
        struct.input_norm, struct.q_norm, struct.k_norm, struct.mlp_norm = map(_address, layer.norms)
        struct.qkv, struct.out, struct.gate_up, struct.down = (product.struct for product in layer.products)
        struct.kv = layer.kv
    return made


class Kernels:
    """The loaded library, for tensors on the CPU in one dtype. Calls check nothing: callers own shapes and layouts.

    Raises: KernelsUnavailable from the constructor.
    """

    def __init__(self, library: Path, dtype: torch.dtype, threads: int) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise KernelsUnavailable(f"there are no kernels for {dtype}")
        try:
            free, holding = ctypes.CDLL(str(library)), ctypes.PyDLL(str(library))
        except OSError as exc:
            raise KernelsUnavailable(f"{library} cannot be loaded ({exc}): delete it") from exc
        self._dtype, self._bf16, self._threads = dtype, int(dtype is torch.bfloat16), threads
        # what takes microseconds keeps the interpreter; giving it up and waiting for it costs more
        self._add_norm = _declared(holding.tally_add_norm, _I, _I, _L, _L, _F, _P, _P, _P, _P)
        self._silu = _declared(holding.tally_silu, _I, _I, _L, _L, _P, _P)
        self._attend = _declared(free.tally_attend, _P, _L, _P, _P, _P, _P, _P, _P, _P, _P)
        self._choose = _declared(free.tally_choose, _I, _L, _L, _P, _P, _P, _P, _P, _P)
        self._look_back = _declared(free.tally_look_back, _I, _L, _L, _P, _P, _P, _P, _P, _P, _F, _D, _P)
        self._logprob = _declared(free.tally_logprob, _I, _L, _L, _P, _P, _P)
        self._fingerprint = _declared(free.tally_fingerprint, _I, _I, _L, _L, _L, _P, _P, _P, _P, _P)
        self._scratch = torch.empty(0)
        self.multiplies = dtype is torch.bfloat16 and bool(free.tally_has_products())
        if self.multiplies:
            self._pack = _declared(free.tally_pack, _L, _L, _P, _P)
            self._product = _declared(free.tally_product, _I, _P, _L, _P, _P, _I)
            self._forward = _declared(free.tally_forward, *(_P, _P, _L, _L, _P, _P, _L, _P, _P, _P, _P))

    @property
    def threads(self) -> int:
        return self._threads

    def shape(self, shape: AttentionShape) -> Any:
        """The constant part of `attend`. The tensors in `shape` must outlive it."""
        self._scratch = torch.empty((self._threads, shape.max_context))
        return _Shape(
            self._bf16,
            self._threads,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            shape.window,
            shape.max_context,
            shape.eps,
            shape.cos.data_ptr(),
            shape.sin.data_ptr(),
        )

    def add_norm(
        self, x: torch.Tensor, add: torch.Tensor | None, weight: torch.Tensor, eps: float, out: torch.Tensor
    ) -> torch.Tensor:
        """x [rows, width] += add; returns `out` filled with the RMS norm of x, times weight."""
        rows, width = x.shape
        self._add_norm(
            self._bf16, self._threads, rows, width, eps, x.data_ptr(), _address(add), weight.data_ptr(), out.data_ptr()
        )
        return out

    def silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[rows, gate then up] -> silu(gate) * up."""
        rows, width = gate_up.shape
        out = gate_up.new_empty((rows, width // 2))
        self._silu(self._bf16, self._threads, rows, width // 2, gate_up.data_ptr(), out.data_ptr())
        return out

    def attend(
        self,
        shape: Any,
        qkv: torch.Tensor,
        norms: tuple[torch.Tensor | None, torch.Tensor | None],
        places: torch.Tensor,
        kv: int,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Rotates `qkv`, [rows, q + k + v heads * head_dim], in place, writes keys and values, attends into `out`.

        `norms`: of queries and keys; `places`: [2, rows] int64, slots then positions; `kv`: address of the layer's KV.
        """
        rows = qkv.shape[0]
        at = places.data_ptr()
        self._attend(
            ctypes.byref(shape),
            rows,
            qkv.data_ptr(),
            _address(norms[0]),
            _address(norms[1]),
            at,
            at + 8 * rows,
            kv,
            self._scratch.data_ptr(),
            out.data_ptr(),
        )
        return out

    def product(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """Pack a matrix [out, in] bf16, `in` even. Only where `multiplies` is true."""
        outputs, inputs = weight.shape
        packed = torch.empty((-(-outputs // PANEL) * PANEL, inputs), dtype=weight.dtype)
        self._pack(inputs, outputs, weight.contiguous().data_ptr(), packed.data_ptr())
        return Product(self, packed, bias, inputs, outputs)

    def multiply(self, product: Product, x: torch.Tensor, wide: bool) -> torch.Tensor:
        """[rows, in] bf16 -> [rows, out], bf16 or the same numbers in fp32."""
        rows, x = x.shape[0], x.contiguous()
        out = torch.empty((rows, product.outputs), dtype=torch.float32 if wide else torch.bfloat16)
        self._product(self._threads, ctypes.byref(product.struct), rows, x.data_ptr(), out.data_ptr(), wide)
        return out

    def forward(
        self, shape: Any, layers: Any, embed: torch.Tensor, norm: torch.Tensor, packed: torch.Tensor, width: int
    ) -> torch.Tensor:
        """A dense model over `packed`, [3, rows] int64 of token ids, slots and positions: [rows, hidden] bf16.

        `layers`: from `dense_layers`. `width`: numbers a row takes in the widest array between two products.
        """
        rows, hidden, at = packed.shape[1], norm.shape[0], packed.data_ptr()
        x, out = embed.new_empty((rows, hidden)), embed.new_empty((rows, hidden))
        between = embed.new_empty((2, rows, width))
        middle = between.data_ptr()
        step = middle + 2 * rows * width
        room = _Room(x.data_ptr(), out.data_ptr(), middle, step, self._scratch.data_ptr())
        places = (at, at + 8 * rows, at + 16 * rows)
        given = (len(layers), hidden, embed.data_ptr(), norm.data_ptr(), rows)
        self._forward(ctypes.byref(shape), layers, *given, *places, ctypes.byref(room))
        return out

    def choose(self, logits: torch.Tensor, parameters: DrawArrays) -> torch.Tensor:
        """[rows] int64. `logits`: [rows, vocab] fp32; a row of -inf or NaN alone gives 0, as argmax does."""
        rows, vocab = logits.shape
        out = torch.empty(rows, dtype=torch.int64)
        arrays = (parameters.keys, parameters.temperature, parameters.top_k, parameters.top_p)
        self._choose(
            self._threads, rows, vocab, logits.data_ptr(), *(a.buffer_info()[0] for a in arrays), out.data_ptr()
        )
        return out

    def look_back(
        self, logits: torch.Tensor, chosen: torch.Tensor, parameters: DrawArrays, edges: tuple[float, float]
    ) -> torch.Tensor:
        """[rows, 2] fp32: margin of the token `chosen`, [rows] int64, and best score minus second best.

        `logits`: [rows, vocab] fp32. `edges`: tolerances of the nucleus, in logits and in mass.
        """
        rows, vocab = logits.shape
        out = torch.empty((rows, 2), dtype=torch.float32)
        arrays = (parameters.keys, parameters.temperature, parameters.top_k, parameters.top_p)
        addresses = (array.buffer_info()[0] for array in arrays)
        self._look_back(
            self._threads, rows, vocab, logits.data_ptr(), *addresses, chosen.data_ptr(), *edges, out.data_ptr()
        )
        return out

    def logprob(self, logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """[rows] fp32: log-probability of `chosen`, [rows] int64, under the softmax of `logits`, [rows, vocab] fp32."""
        rows, vocab = logits.shape
        out = torch.empty(rows, dtype=torch.float32)
        self._logprob(self._threads, rows, vocab, logits.data_ptr(), chosen.data_ptr(), out.data_ptr())
        return out

    def fingerprint(
        self, logits: torch.Tensor, hidden: torch.Tensor, chosen: torch.Tensor, signs: torch.Tensor
    ) -> bytes:
        """18 bytes a row: log-probability, then the projected hidden state, fp16. `signs`: [rows, hidden] uint8."""
        rows, vocab = logits.shape
        out = ctypes.create_string_buffer(18 * rows)
        self._fingerprint(
            self._bf16,
            self._threads,
            rows,
            vocab,
            hidden.shape[1],
            *(tensor.data_ptr() for tensor in (logits, hidden, chosen, signs)),
            out,
        )
        return out.raw


def _declared(function: Any, *types: Any) -> Any:
    function.argtypes, function.restype = types, None
    return function
