"""The kernels beside what one would use instead: time, extra memory and share of what the machine can do.

    python -m bench.kernels            # on a GPU the Triton kernels at full size, on a CPU the references
    python -m bench.kernels --save     # and write bench/results/kernels-<date>-<device>.json, on a GPU with a bar chart

    naive      log_softmax and gather, or softmax and multinomial, in eager PyTorch; attention over copied keys
    compiled   the same under torch.compile
    liger, cce the kernels of liger-kernel and cut-cross-entropy, where they are installed

On a GPU every time is a median by CUDA events with a cold L2 cache, or of replays of a CUDA graph for what takes
microseconds; ceilings are a copy of 4 GB (bytes read and written) and cuBLAS's product of the same N x D x V, measured
in the same run. A form that fails, for want of memory or of its package, is listed with its error, and what has been
measured is saved after every shape. On a CPU the forms take turns, `pairs` times, and a ratio is the median over the
turns of a form's time to that of `naive`; memory is the allocator's peak. Gradients count as memory, inputs do not.
"""

import gc
import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter, strftime

import torch

import upt  # noqa: F401 - first, so that `kernels` is ours (upt/kernel_names.py)
from bench.cases import OURS, Case, cases
from bench.loop import hardware
from upt.errors import SettingError
from upt.files import write_whole
from upt.ranges import Count, Name
from upt.run import cli
from upt.run.typed import Typed


@dataclass
class Config(Typed):
    shapes: tuple[Name, ...] = ()
    """N x V x D: tokens, vocabulary, hidden size. None: on a CPU 512x8192x512; on a GPU the 7B's and the 3B's at 8192
    tokens, a small and a large one"""
    pairs: Count = 15
    """CPU: how often the forms take turns"""
    milliseconds: Count = 1000
    """GPU: how long each form is repeated"""
    threads: Count = 1
    """CPU: threads"""
    device: Name = "auto"
    """auto, cpu or cuda"""
    save: bool = False
    """write the result into bench/results"""


CPU_SHAPES = ("512x8192x512",)
GPU_SHAPES = ("8192x152064x3584", "8192x152064x2048", "1024x32768x1024", "16384x262144x3584")


# -------------------------------------------------------------------------------------------------- the measuring


def on_gpu(case: Case, config: Config) -> dict[str, dict]:
    """{form: ms and extra MB, or its error}."""
    from triton.testing import do_bench, do_bench_cudagraph

    found: dict[str, dict] = {}
    for name, form in case.forms.items():
        try:
            form()  # compiles
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            form()
            torch.cuda.synchronize()
            extra = torch.cuda.max_memory_allocated() - before
            if case.tiny:
                with torch.cuda.stream(torch.cuda.Stream()):
                    ms = do_bench_cudagraph(form, rep=50, return_mode="median")
            else:
                ms = do_bench(form, warmup=100, rep=config.milliseconds, return_mode="median")
            found[name] = {"ms": ms, "extra_mb": extra / 1e6}
        except Exception as error:  # a failure is a result; one of ours fails the command at its end
            found[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        torch.cuda.empty_cache()
    return found


def on_cpu(case: Case, config: Config) -> dict[str, dict]:
    """{form: median ms, its ratio to `naive` as the median over the turns, extra MB}."""
    times: dict[str, list[float]] = {name: [] for name in case.forms}
    for turn in range(config.pairs + 2):
        for name, form in case.forms.items():
            start = perf_counter()
            form()
            if turn > 1:
                times[name].append(1e3 * (perf_counter() - start))
    return {
        name: {
            "ms": statistics.median(times[name]),
            "ratio": statistics.median(a / b for a, b in zip(times[name], times["naive"], strict=True)),
            "extra_mb": peak(form) / 1e6,
        }
        for name, form in case.forms.items()
    }


def peak(form: Callable) -> int:
    """The most bytes that CPU tensors made in a call hold at once, by the allocator's own events."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's notices of its own
    gc.collect()  # nothing older may be freed meanwhile
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        form()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    events = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    held = most = 0
    for event in events:
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


def copy_gb_s(milliseconds: int = 1000) -> float:
    """GB/s of a copy of 4.3 GB on a GPU, bytes read and written."""
    from triton.testing import do_bench

    source = torch.randn(2**31, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / do_bench(lambda: target.copy_(source), rep=milliseconds, return_mode="median") / 1e6


def ceilings(shape: tuple[int, int, int], config: Config) -> dict[str, float]:
    """GB/s of a copy, and milliseconds of cuBLAS's product at this shape."""
    from triton.testing import do_bench

    count, size, width = shape
    copied = copy_gb_s(config.milliseconds)
    hidden = torch.randn(count, width, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(size, width, dtype=torch.bfloat16, device="cuda")
    product = do_bench(lambda: hidden @ weight.T, rep=config.milliseconds, return_mode="median")
    return {"copy_gb_s": copied, "product_ms": product}


# --------------------------------------------------------------------------------------------------- the reporting


def measured(shape: tuple[int, int, int], config: Config, device: str) -> dict:
    ceiling = ceilings(shape, config) if device == "cuda" else {}
    rows = []
    for number, build in enumerate(cases(shape, device)):
        torch.compiler.reset()  # it stops compiling after a few shapes of the same code
        case = None  # the last one's tensors are gone before the next are made
        try:
            case = build()
        except torch.OutOfMemoryError as error:
            rows.append({"job": f"job {number}", "form": "inputs", "error": str(error).splitlines()[0]})
            continue
        for name, figures in (on_gpu if device == "cuda" else on_cpu)(case, config).items():
            row = {"job": case.job, "form": name, **figures}
            if ceiling and "ms" in figures and case.bytes:
                row["gb_s"] = case.bytes / figures["ms"] / 1e6
                row["share_of_copy"] = row["gb_s"] / ceiling["copy_gb_s"]
            if ceiling and "ms" in figures and case.products:
                row["tflop_s"] = 2 * math.prod(shape) * case.products / figures["ms"] / 1e9
                row["times_product"] = figures["ms"] / ceiling["product_ms"]
            rows.append(row)
    return {"shape": dict(zip("NVD", shape)), "ceilings": ceiling, "rows": rows}


def table(found: dict) -> str:
    lines = ["N = {N}, V = {V}, D = {D}".format(**found["shape"])]
    if found["ceilings"]:
        lines[0] += ": copy {copy_gb_s:.0f} GB/s, product {product_ms:.2f} ms".format(**found["ceilings"])
    job = None
    for row in found["rows"]:
        if row["job"] != job:
            job = row["job"]
            tail = f"{'time / naive':>15}" if "ratio" in row else ""
            lines.append(f"{job:46}{'ms':>10}{'extra MB':>10}{tail}")
        if "error" in row:
            lines.append(f"  {row['form']:44}{row['error'][:70]}")
            continue
        tail = f"{row['ratio']:15.2f}" if "ratio" in row else ""
        tail += f"{row['share_of_copy']:9.0%} of copy" if "share_of_copy" in row else ""
        tail += f"{row['times_product']:9.2f} x product" if "times_product" in row else ""
        lines.append(f"  {row['form']:44}{row['ms']:10.3f}{row['extra_mb']:10.1f}{tail}")
    return "\n".join(lines)


def chart(results: list[dict], path: Path) -> None:
    """Bars of the times at every shape, logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(7 * len(results), 9), squeeze=False)
    for axis, found in zip(axes[0], results):
        rows = [row for row in found["rows"] if "ms" in row][::-1]
        colours = ["tab:orange" if row["form"].startswith(OURS) else "tab:grey" for row in rows]
        axis.barh([f"{row['job']}: {row['form']}" for row in rows], [row["ms"] for row in rows], color=colours)
        axis.set(xscale="log", xlabel="ms", title="N={N}, V={V}, D={D}".format(**found["shape"]))
        axis.tick_params(axis="y", labelsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def parsed(shape: str) -> tuple[int, int, int]:
    try:
        count, size, width = map(int, shape.split("x"))
    except ValueError:
        raise SettingError(
            f"--shapes: expected tokens x vocabulary x hidden size, as 512x8192x512, not {shape!r}"
        ) from None
    return count, size, width


def main(config: Config) -> dict:
    """Measure, print the tables and return what `--save` writes."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    torch.set_num_threads(config.threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingError("--device cuda: no GPU is visible to torch")
    shapes = [parsed(shape) for shape in config.shapes or (GPU_SHAPES if device == "cuda" else CPU_SHAPES)]
    machine = torch.cuda.get_device_name() if device == "cuda" else hardware()
    packages = ("torch", "triton", "liger-kernel", "cut-cross-entropy")
    result = {
        "date": strftime("%Y-%m-%d"),
        "hardware": machine,
        "versions": {name: installed(name) for name in packages},
        "config": asdict(config),
        "results": [],
    }
    print(machine, result["versions"], sep="\n")
    path = Path(__file__).parent / f"results/kernels-{result['date']}-{device}.json"
    for shape in shapes:
        result["results"].append(measured(shape, config, device))
        print(table(result["results"][-1]), flush=True)
        if config.save:
            write_whole(path, [json.dumps(result, indent=1).encode()])
            if device == "cuda":
                chart(result["results"], path.with_suffix(".png"))
    failed = [row for found in result["results"] for row in found["rows"] if "error" in row]
    if ours := [f"{row['job']}: {row['error']}" for row in failed if row["form"].startswith(OURS)]:
        raise SystemExit("\n".join(["our own kernels failed:", *ours]))
    return result


if __name__ == "__main__":
    cli.launch(main, Config)
