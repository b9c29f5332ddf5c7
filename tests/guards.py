"""Memory that tells when a kernel reads or writes what is not its own, and how long the random tests go on."""

import numpy as np
import torch
from hypothesis import HealthCheck, settings

GUARD = 64
checks = settings(
    max_examples=25, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


class Guarded:
    """torch.empty with nan in it and behind it; `check` says whether anything was written beyond an end."""

    def __init__(self, monkeypatch):
        self.buffers, empty = [], torch.empty

        def guarded(*shape, dtype=None, device=None, **rest):
            shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
            count = int(torch.Size(shape).numel())
            buffer = self.poison(empty(count + GUARD, dtype=dtype, device=device, **rest))
            self.buffers.append((buffer, count))
            return buffer[:count].view(shape)

        monkeypatch.setattr(torch, "empty", guarded)
        monkeypatch.setattr(torch, "zeros", lambda *shape, **rest: guarded(*shape, **rest).zero_())
        monkeypatch.setattr(torch, "empty_like", lambda t, **rest: guarded(t.shape, dtype=t.dtype, device=t.device))

    @staticmethod
    def poison(buffer):
        return buffer.fill_(float("nan") if buffer.is_floating_point() else -77)

    def check(self):
        for buffer, count in self.buffers:
            beyond = buffer[count:]
            assert (beyond.isnan() if beyond.is_floating_point() else beyond == -77).all(), "written beyond the end"
        self.buffers.clear()


class Bounded:
    """The interpreter's memory access, refusing what is outside the tensors that a kernel was given."""

    def __init__(self, monkeypatch):
        from triton.runtime import interpreter

        self.real, self.starts, self.ends = interpreter._interpreter, np.zeros(0), np.zeros(0)
        prepare = interpreter.GridExecutor._init_args_hst

        def prepared(executor, args, settings):
            tensors = [t for t in [*args, *settings.values()] if isinstance(t, torch.Tensor) and t.numel()]
            spans = [(t.data_ptr(), sum((n - 1) * s for n, s in zip(t.shape, t.stride())) + 1) for t in tensors]
            spans = sorted((start, start + size * t.itemsize) for (start, size), t in zip(spans, tensors))
            self.starts = np.array([start for start, _ in spans])
            self.ends = np.maximum.accumulate([end for _, end in spans])  # of all that start no later
            return prepare(executor, args, settings)

        monkeypatch.setattr(interpreter, "_interpreter", self)
        monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", prepared)

    def __getattr__(self, name):
        return getattr(self.real, name)

    def check(self, pointers, mask, size):
        used = np.broadcast_to(pointers, mask.shape)[mask.astype(bool)].astype(np.int64)
        place = np.searchsorted(self.starts, used, side="right") - 1
        assert (place >= 0).all() and (used + size <= self.ends[place]).all(), "memory of no tensor"

    def load(self, pointers, mask, other, dtype):
        self.check(pointers, mask, np.dtype(dtype).itemsize)
        return self.real.load(pointers, mask, other, dtype)

    def store(self, pointers, value, mask):
        self.check(pointers, mask, value.dtype.itemsize)
        return self.real.store(pointers, value, mask)
