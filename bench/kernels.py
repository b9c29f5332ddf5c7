"""The kernels beside what one would use instead: time, extra memory and share of what the machine can do.

    python -m bench.kernels            # on a GPU the Triton kernels at full size, on a CPU the references
    python -m bench.kernels --save     # and write bench/results/kernels-<date>-<device>.json, on a GPU with a bar chart

    naive      log_softmax and gather, or softmax and multinomial, in eager PyTorch
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
from bench.loop import hardware
from kernels import group_advantage, grpo_loss, linear_logprob, row_id, sample, selective_log_softmax
from upt.errors import SettingError
from upt.files import write_whole
from upt.ranges import Count, Name
from upt.run import cli
from upt.run.typed import Typed

Forms = dict[str, Callable[[], object]]
OURS = "upt"


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


@dataclass
class Case:
    """One job at one shape. Its floor is the bytes it must move, or the products N x D x V it must make."""

    job: str
    forms: Forms
    bytes: float = 0
    products: float = 0
    tiny: bool = False  # launches only: replayed from a CUDA graph


# ------------------------------------------------------------------------------------------------------ the forms


def naive_selective(logits, ids, temperature=1.0):
    return (logits.float() / temperature).log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def naive_linear(hidden, weight, ids, temperature=1.0):
    return naive_selective(hidden @ weight.T, ids, temperature)


def naive_sample(logits, temperature, top_p):
    logits = logits.float() / temperature
    kept = logits
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        outside = (p.cumsum(-1) - p > top_p).scatter(-1, order, p.cumsum(-1) - p > top_p)
        kept = logits.masked_fill(outside, float("-inf"))
    token = torch.multinomial(kept.softmax(-1), 1)
    return token, logits.log_softmax(-1).gather(-1, token)


def naive_advantage(rewards):
    return (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-6)


def naive_loss(logprob, old, advantage, mask, reference):
    ratio, difference = torch.exp(logprob - old), reference - logprob
    advantage = advantage[:, None]
    loss = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    loss = loss + 0.01 * (torch.exp(difference) - difference - 1)
    return (loss * mask).sum() / mask.sum()


def there_and_back(logprob: Callable, leaf: torch.Tensor, grad: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(logprob(leaf), leaf, grad)  # whose memory is free again after the call


def without_grad(function: Callable) -> Callable[[], object]:
    return torch.no_grad()(function)


def liger_linear(hidden, weight, ids):
    """- sum of log p: Liger's loss; its gradient has the sign and the scale that it wants."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, ids)


def cce_linear(hidden, weight, ids):
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, ids, reduction="none", filter_eps=None)  # all of the gradient, as ours


def liger_selective(logits, ids):
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    return fused_selective_log_softmax(logits[None], ids[None], 1.0)  # of all rows but the last


def cases(shape: tuple[int, int, int], device: str) -> list[Callable[[], Case]]:
    """What is measured at a shape; each is built when its turn comes, so that only its tensors are there."""
    gpu = device == "cuda"
    count, size, width = shape
    dtype = torch.bfloat16 if gpu else torch.float32
    compiled = torch.compile if gpu else lambda function, **_: None
    generator = torch.Generator(device).manual_seed(0)

    def random(*of, dtype=dtype):
        return torch.randn(*of, dtype=dtype, device=device, generator=generator)

    def tokens(n):
        return torch.randint(size, (n,), device=device, generator=generator)

    def selective(backward: bool) -> Case:
        logits, ids, grad = random(count, size), tokens(count), random(count, dtype=torch.float32)
        leaf = logits.requires_grad_(backward)
        forms: Forms = {
            "naive": lambda z: naive_selective(z, ids),
            "compiled": compiled(lambda z: naive_selective(z, ids), dynamic=False),
            OURS: lambda z: selective_log_softmax(z, ids)[0],
        }
        if gpu and not backward:
            forms["liger"] = lambda z: liger_selective(z, ids)
        if backward:
            # A copy, because it is overwritten; the copy's time is part of what is measured.
            forms[f"{OURS}, in place, with a copy"] = lambda z: selective_log_softmax(z.clone(), ids, in_place=True)[0]
        forms = {name: form for name, form in forms.items() if form}
        run = {
            name: there_and_back(f, leaf, grad) if backward else without_grad(lambda f=f: f(logits))
            for name, f in forms.items()
        }
        return Case(
            f"selective_log_softmax {'forward + backward' if backward else 'forward'}", run,
            bytes=(3 if backward else 1) * logits.nbytes,
        )  # fmt: skip

    def in_place_backward() -> Case:
        from kernels import logprob_triton

        logits, ids, grad = random(count, size), tokens(count), random(count, dtype=torch.float32)
        rows = logprob_triton.rows(logits, ids, 1.0, None)
        saved = (logits, ids, 1.0, rows.top, rows.log_sum, rows.others)
        forms: Forms = {OURS: lambda: logprob_triton.gradient(*saved, grad, logits)}
        return Case("selective_log_softmax backward, in place", forms, bytes=2 * logits.nbytes)

    def linear(backward: bool) -> Case:
        hidden, weight, ids = random(count, width), random(size, width) / width**0.5, tokens(count)
        grad, one = random(count, dtype=torch.float32), torch.ones((), device=device)
        leaf = hidden.requires_grad_(backward)
        forms: Forms = {
            "naive": lambda h: naive_linear(h, weight, ids),
            "compiled": compiled(lambda h: naive_linear(h, weight, ids), dynamic=False),
            OURS: lambda h: linear_logprob(h, weight, ids)[0],
        }
        if gpu:
            for rows in (256, 1024):
                forms[f"{OURS}, chunk {rows}"] = lambda h, rows=rows: linear_logprob(h, weight, ids, chunk=rows)[0]
            forms["cce"] = lambda h: cce_linear(h, weight, ids)
            if backward:
                forms["liger (sum only)"] = lambda h: liger_linear(h, weight, ids)
        forms = {name: form for name, form in forms.items() if form}
        run = {
            name: there_and_back(f, leaf, one if "sum only" in name else grad)
            if backward
            else without_grad(lambda f=f: f(hidden))
            for name, f in forms.items()
        }
        return Case(f"linear_logprob {'forward + backward' if backward else 'no grad'}", run, products=1 + backward)

    def linear_backward() -> Case:
        hidden, weight, ids = random(count, width), random(size, width) / width**0.5, tokens(count)
        logprob, _ = linear_logprob(hidden.requires_grad_(), weight, ids)
        grad = random(count, dtype=torch.float32)
        forms: Forms = {OURS: lambda: torch.autograd.grad(logprob, hidden, grad, retain_graph=True)}
        return Case("linear_logprob backward alone", forms, bytes=2 * hidden.nbytes)

    def sampling(top_p: float, rows: int) -> Case:
        logits, ids = random(rows, size), torch.tensor([row_id(0, "bench", i) for i in range(rows)], device=device)
        ways = {"temperature": 0.7, "top_p": top_p, "top_k": 0, "seed": 0, "row_ids": ids, "position": 7}
        forms: Forms = {
            "naive": lambda: naive_sample(logits, 0.7, top_p),
            "compiled": compiled(lambda: naive_sample(logits, 0.7, top_p), dynamic=False),
            OURS: lambda: sample(logits, statistics=True, **ways),
        }
        forms = {name: form for name, form in forms.items() if form}
        return Case(f"sample {rows} rows, top-p {top_p}", forms, bytes=logits.nbytes)

    def advantage() -> Case:
        rewards = torch.rand(512, 8, device=device, generator=generator)
        forms: Forms = {
            "naive": lambda: naive_advantage(rewards),
            "compiled": compiled(lambda: naive_advantage(rewards), dynamic=False),
            OURS: lambda: group_advantage(rewards, "group-norm"),
        }
        return Case("group_advantage 512 x 8", {name: form for name, form in forms.items() if form}, tiny=True)

    def loss() -> Case:
        old, reference = (random(512, 256, dtype=torch.float32) for _ in range(2))
        leaf, given = random(512, 256, dtype=torch.float32).requires_grad_(), random(512, dtype=torch.float32)
        mask, one = torch.ones(512, 256, dtype=torch.bool, device=device), torch.ones((), device=device)
        ours = {"kl_coef": 0.01}
        forms: Forms = {
            "naive": lambda x: naive_loss(x, old, given, mask, reference),
            "compiled": compiled(lambda x: naive_loss(x, old, given, mask, reference), dynamic=False),
            OURS: lambda x: grpo_loss(x, old, given, mask, reference, **ours)[0],
        }
        run = {name: there_and_back(f, leaf, one) for name, f in forms.items() if f}
        return Case("grpo_loss 512 x 256, forward + backward", run, tiny=True)

    found = [lambda b=b: selective(b) for b in (False, True)] + [lambda b=b: linear(b) for b in (False, True)]
    found += [lambda p=p, n=n: sampling(p, n) for n in ((8, 128) if gpu else (64,)) for p in (1.0, 0.9)]
    found += [advantage, loss]
    return found + ([in_place_backward, linear_backward] if gpu else [])


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
