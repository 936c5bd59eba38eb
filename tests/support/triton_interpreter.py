"""Triton's CPU interpreter, repaired, with sanitizers. For Triton 3.6 to 3.9; no GPU and no TRITON_INTERPRET needed.

    with interpreted() as launched:         # the ops of u2a_fast.kernels run their Triton kernels on CPU tensors
        y = kernels.lora_linear(...)
    assert "linear_lowrank" in launched     # names of the kernels that ran, in order

Inside, every launch computes bfloat16 as a GPU does, memory that `torch.empty` hands out is full of NaN, and
    bounds  every unmasked load, store and atomic must fall inside one of the tensors of the launch    -> OutOfBounds
    races   no two programs may meet at an address unless all read it, or all update it atomically     -> Race
    order   programs run in a random order: results that differ between two orders depend on it
Triton wraps what a kernel raises: expect InterpreterError whose text starts with OutOfBounds or Race.

What is repaired: Triton multiplies the raw bit patterns of bfloat16, truncates fp32 -> bf16, and interprets only
kernels decorated under TRITON_INTERPRET=1; 3.6 takes no loop bounds from tensors under NumPy 2.4. Not modelled: time,
the summation order of tensor cores, TF32, shared memory, launch limits, minimum tile sizes. `races` does not
understand locks built from atomic_cas.
"""

import contextlib
import random

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

from u2a_fast.kernels import backend

BF16 = tl.bfloat16
SANITIZERS = ("bounds", "races", "order")

_interpreted = {}  # id(JITFunction) -> InterpretedFunction: hashing a JITFunction walks globals, which a launch patches
_scopes = []  # one {id(module globals): patch scope} for every launch that is running


class OutOfBounds(AssertionError):
    pass


class Race(AssertionError):
    pass


# ------------------------------------------------------------------------------------------------------- the front door
@contextlib.contextmanager
def interpreted(sanitizers=("bounds",), seed=0, backend=backend):
    """Run the ops' Triton kernels on CPU tensors; yields the list of the names of the kernels launched.

    `backend` is the switch to turn: that of `u2a_fast.kernels`, or of a copy of the package.
    """
    install()
    assert set(sanitizers) <= set(SANITIZERS), f"sanitizers are {SANITIZERS}"
    launched = []

    def launch(kernel, grid, **arguments):
        if 0 in grid:
            return
        launched.append(kernel.__name__)
        with contextlib.ExitStack() as checks:
            if "bounds" in sanitizers:
                checks.enter_context(_bounds([a for a in arguments.values() if torch.is_tensor(a)]))
            if "races" in sanitizers:
                checks.enter_context(_races())
            if "order" in sanitizers:
                checks.enter_context(_grid_order(seed))
            interpret(kernel)[grid](**arguments)

    before = {name: getattr(backend, name) for name in ("_backend", "launch", "interpreting")}
    deterministic = torch.are_deterministic_algorithms_enabled()
    backend._backend, backend.launch, backend.interpreting = "triton", launch, lambda: True
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty now hands out NaN
    try:
        yield launched
    finally:
        torch.use_deterministic_algorithms(deterministic)
        for name, value in before.items():
            setattr(backend, name, value)


def interpret(kernel):
    """The kernel as something that runs on the CPU: interpret(kernel)[grid](...). An autotuner is dropped."""
    while not isinstance(kernel, (JITFunction, InterpretedFunction)):
        kernel = kernel.fn
    if isinstance(kernel, InterpretedFunction):
        return kernel
    if id(kernel) not in _interpreted:
        _interpreted[id(kernel)] = InterpretedFunction(kernel.fn)
        _interpreted[id(kernel)].jit_function = kernel  # keeps the id taken
    return _interpreted[id(kernel)]


def install():
    """Repair the interpreter in this process. Safe to call twice; leaves compilation for real targets alone."""
    if not getattr(interpreter, "repaired", False):
        interpreter.repaired = True
        _repair_arithmetic()
        _repair_dot()
        _repair_reductions()
        _repair_dispatch()


# ------------------------------------------------------------------------------------------------------------- bfloat16
def bf16_to_f32(bits):
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x):
    """Round to nearest even, as the hardware does; NaN stays NaN."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + odd + np.uint32(0x7FFF)) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded).astype(np.uint16)


def _is_bf16(handle):
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == BF16


def _up(handle):
    return TensorHandle(bf16_to_f32(handle.data), tl.float32) if _is_bf16(handle) else handle


def _down(handle):
    """To bfloat16; a comparison stays boolean."""
    return handle if handle.data.dtype == np.bool_ else TensorHandle(f32_to_bf16(handle.data), BF16)


def _repair_arithmetic():
    builder = InterpreterBuilder
    cast, fp_to_fp, binary, unary = builder.cast_impl, builder.create_fp_to_fp, builder.binary_op, builder.unary_op
    ternary, fma, rsqrt = builder.ternary_op, builder.create_fma, builder.create_rsqrt

    def cast_impl(self, src, dst):
        source, target = src.dtype.scalar, dst.scalar
        if source == BF16 and target != BF16:
            wide = _up(src)
            return wide if target == tl.float32 else cast(self, wide, dst)
        if target == BF16 and source != BF16:
            return TensorHandle(f32_to_bf16(src.data.astype(np.float32)), BF16)
        return cast(self, src, dst)

    def create_fp_to_fp(self, src, dst, rounding):
        nearest = rounding != interpreter._ir.ROUNDING_MODE.RTZ
        if dst.scalar == BF16 and src.dtype.scalar == tl.float32 and nearest:
            return cast_impl(self, src, dst)
        return fp_to_fp(self, src, dst, rounding)

    def binary_op(self, a, b, op):
        if _is_bf16(a) or _is_bf16(b):
            return _down(binary(self, _up(a), _up(b), op))
        return binary(self, a, b, op)

    def unary_op(self, a, op):
        return _down(unary(self, _up(a), op)) if _is_bf16(a) else unary(self, a, op)

    def ternary_op(self, a, b, c, op):
        if op is np.where or not (_is_bf16(a) or _is_bf16(b) or _is_bf16(c)):  # a select only moves bits
            return ternary(self, a, b, c, op)
        return _down(ternary(self, _up(a), _up(b), _up(c), op))

    def create_fma(self, a, b, c):
        return _down(fma(self, _up(a), _up(b), _up(c))) if _is_bf16(c) else fma(self, a, b, c)

    def create_rsqrt(self, a):
        return _down(rsqrt(self, _up(a))) if _is_bf16(a) else rsqrt(self, a)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    builder.binary_op, builder.unary_op, builder.ternary_op = binary_op, unary_op, ternary_op
    builder.create_fma, builder.create_rsqrt = create_fma, create_rsqrt


def _repair_dot():
    dot = InterpreterBuilder.create_dot

    def create_dot(self, a, b, acc, precision, imprecise):
        a, b = _up(a), _up(b)
        if acc.data.dtype == np.int32:  # through fp64 BLAS: exact up to 2**53, far faster than NumPy's integer matmul
            product = a.data.astype(np.float64) @ b.data.astype(np.float64)
            return TensorHandle(product.astype(np.int64).astype(np.int32) + acc.data, acc.dtype.scalar)
        if acc.data.dtype == np.float32 and a.data.dtype == np.float16:
            product = a.data.astype(np.float32) @ b.data.astype(np.float32)
            return TensorHandle(product + acc.data, acc.dtype.scalar)
        return dot(self, a, b, acc, precision, imprecise)

    InterpreterBuilder.create_dot = create_dot


def _repair_reductions():
    reduce = interpreter.ReduceOps
    plain_sum, plain_min_max = reduce.sum, reduce.min_max

    def bf16_tensor(bits, shape):
        return tl.core.tensor(TensorHandle(bits, BF16), tl.block_type(BF16, list(shape)) if len(shape) else BF16)

    def rsum(self, x):
        if x.dtype != BF16:
            return plain_sum(self, x)
        total = np.sum(bf16_to_f32(x.handle.data), axis=self.axis, keepdims=self.keep_dims)
        bits = f32_to_bf16(total)  # one-dimensional even for a scalar
        return self.to_tensor(bits if np.ndim(total) else bits.item(), BF16)

    def min_max(self, x, val_reduce_op, idx_reduce_op=None):
        values = x[0] if isinstance(x, tuple) else x
        if values.dtype != BF16:
            return plain_min_max(self, x, val_reduce_op, idx_reduce_op)
        wide = TensorHandle(bf16_to_f32(values.handle.data), tl.float32)
        wide = tl.core.tensor(wide, tl.block_type(tl.float32, list(values.shape)))
        result = plain_min_max(self, wide, val_reduce_op, idx_reduce_op)
        if not val_reduce_op:
            return result
        value, *index = result if isinstance(result, tuple) else (result,)
        value = bf16_tensor(f32_to_bf16(value.handle.data), value.shape)
        return (value, *index) if index else value

    reduce.sum, reduce.min_max = rsum, min_max


def _repair_dispatch():
    """Interpret what an interpreted kernel calls, however it was decorated, and patch the language once per launch.

    Triton patches it once per call of a device function, and emulates integer overflow: together 2-3 times slower.
    """
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    patch, launch, call = interpreter._patch_lang, GridExecutor.__call__, JITFunction.__call__
    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())  # a scalar is an array of one element

    def device_call(self, *args, **kwargs):
        if not _scopes:
            patch(self.fn)
        elif id(self.fn.__globals__) not in _scopes[-1]:
            _scopes[-1][id(self.fn.__globals__)] = patch(self.fn)
        return self.rewrite()(*args, **kwargs)

    def patch_launch(fn):
        scope = patch(fn)
        if _scopes:
            later, own = _scopes[-1], scope.restore

            def restore():  # undo first what came after it
                for s in reversed(list(later.values())):
                    s.restore()
                later.clear()
                own()

            scope.restore = restore
        return scope

    def grid_call(self, *args, **kwargs):
        _scopes.append({})
        try:
            return launch(self, *args, **kwargs)
        finally:
            _scopes.pop()

    def jit_call(self, *args, **kwargs):
        return interpret(self)(*args, **kwargs) if _scopes else call(self, *args, **kwargs)

    interpreter._patch_lang, interpreter._patch_lang_tensor = patch_launch, patch_lang_tensor
    GridExecutor.__call__ = grid_call
    InterpretedFunction.__call__, JITFunction.__call__ = device_call, jit_call


# ----------------------------------------------------------------------------------------------------------- sanitizers
@contextlib.contextmanager
def _watch(on_load, on_store, on_atomic):
    """Call on_*(program, live addresses, bytes per element) before each access."""
    builder = InterpreterBuilder
    load, store, rmw = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw

    def look(check, self, pointer, mask):
        addresses, live = np.broadcast_arrays(pointer.data, mask.data)
        check(self.grid_idx, addresses[live], max(1, pointer.get_element_ty().primitive_bitwidth // 8))

    def create_masked_load(self, pointer, mask, *rest):
        look(on_load, self, pointer, mask)
        return load(self, pointer, mask, *rest)

    def create_masked_store(self, pointer, value, mask, *rest):
        look(on_store, self, pointer, mask)
        return store(self, pointer, value, mask, *rest)

    def create_atomic_rmw(self, op, pointer, value, mask, *rest):
        look(on_atomic, self, pointer, mask)
        return rmw(self, op, pointer, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = create_masked_load, create_masked_store
    builder.create_atomic_rmw = create_atomic_rmw
    try:
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        builder.create_atomic_rmw = rmw


@contextlib.contextmanager
def _bounds(tensors):
    """Every address must fall inside the span of a tensor, from its own first to its own last element."""
    spans = []
    for t in tensors:
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        spans.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size() * bool(t.numel())))
    first, end = np.array(sorted(spans), np.uint64).reshape(-1, 2).T
    end = np.maximum.accumulate(end)  # views of one buffer overlap: of all that begin before, the one that ends last

    def check(kind):
        def inside(program, addresses, width):
            if not addresses.size:
                return
            span = np.searchsorted(first, addresses, side="right").astype(np.int64) - 1
            fits = (span >= 0) & (addresses + np.uint64(width) <= end[np.maximum(span, 0)])
            if not fits.all():
                lanes = f"{int((~fits).sum())} of {addresses.size} lanes"
                raise OutOfBounds(f"{kind} outside every tensor: program {program}, {lanes}")

        return inside

    with _watch(check("load"), check("store"), check("atomic")):
        yield


@contextlib.contextmanager
def _races():
    """Python bookkeeping per address, for one launch: use small shapes."""
    many = object()
    seen = {"stores": {}, "reads": {}, "updates": {}}

    def meet(kind, conflicts):
        def check(program, addresses, width):
            unique, count = np.unique(addresses, return_counts=True)
            if kind == "stores" and addresses.ndim and (count > 1).any():
                raise Race(f"program {program} stores twice to one address in one tl.store")
            mine = seen[kind]
            for address in unique.tolist():
                for other in conflicts:
                    owner = seen[other].get(address, program)
                    if owner is many or owner != program:
                        raise Race(f"program {program} {kind} an address that another program {other}")
                mine[address] = program if mine.get(address, program) == program else many

        return check

    reads, stores = meet("reads", ("stores", "updates")), meet("stores", ("stores", "reads", "updates"))
    with _watch(reads, stores, meet("updates", ("stores", "reads"))):
        yield


@contextlib.contextmanager
def _grid_order(seed):
    """Run the programs of the launch in a random order."""
    builder = InterpreterBuilder
    set_index, set_size = builder.set_grid_idx, builder.set_grid_dim

    def set_grid_dim(self, x, y, z):
        set_size(self, x, y, z)
        programs = [(i, j, k) for i in range(x) for j in range(y) for k in range(z)]
        random.Random(seed).shuffle(programs)
        self.shuffled = iter(programs)

    builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, lambda self, *_: set_index(self, *next(self.shuffled))
    try:
        yield
    finally:
        builder.set_grid_idx, builder.set_grid_dim = set_index, set_size
