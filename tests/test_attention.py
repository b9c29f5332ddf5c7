"""Attention of decoding: by hand, and against a softmax over each row's own keys in float64.

The kernel runs on a GPU where there is one, else in Triton's interpreter, in poisoned and guarded memory.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import Part, Places, attention, attention_triton, decode_attention, row_id, sample, sampling_triton
from tests.guards import Bounded, Guarded, checks

NAN = float("nan")
TYPES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}


@pytest.fixture(params=["reference", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where tensors are to live, with UPT_KERNELS set to what is under test."""
    gpu = torch.cuda.is_available()
    if request.param == "interpreter" and gpu or request.param == "cuda" and not gpu:
        pytest.skip("on a machine with a GPU the kernel runs there, elsewhere in the interpreter")
    monkeypatch.setenv("UPT_KERNELS", "reference" if request.param == "reference" else "triton")
    if request.param == "interpreter":
        Bounded(monkeypatch)
    for name, value in {"STRETCH": 32, "SHORTEST": 32, "LOADED": 0, "MERGED": 2}.items():  # several in small shapes
        monkeypatch.setattr(attention_triton, name, value)
    return "cuda" if request.param == "cuda" else "cpu"


@pytest.fixture
def guarded(monkeypatch):
    return Guarded(monkeypatch)


def row_by_row(query: torch.Tensor, parts: list[Part], scale: float) -> torch.Tensor:
    """Every row's keys copied together, and one softmax over them, in float64."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    for r, q in enumerate(query.double()):
        keys, values = [], []
        for part in parts:
            place = r if part.places is None else int(part.places.of_row[r])
            if place >= 0:
                n = int(part.lengths[place])
                keys.append(part.keys[place, :, :n].double())
                values.append(part.values[place, :, :n].double())
        k, v = (torch.cat([torch.zeros(part.keys[0, :, :0].shape).double(), *t], 1) for t in (keys, values))
        rep = len(q) // len(k)
        if k.shape[1]:
            p = (scale * q.unflatten(0, (-1, rep)) @ k.mT).softmax(-1)
            out[r] = (p @ v).flatten(0, 1)
    return out


def on(device: str, part: Part) -> Part:
    places = part.places and Places(part.places.of_row.tolist(), part.places.count, device)
    return Part(part.keys.to(device), part.values.to(device), part.lengths.to(device), places)


@st.composite
def decoding_cases(draw, most_rows=7):
    """Queries (R, Hq, D) and one to three parts, shared or not, with nan behind their keys."""
    rows, kv_heads, rep = draw(st.integers(1, most_rows)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 7]))
    dim, dtype = draw(st.sampled_from([1, 16, 20])), draw(st.sampled_from([*TYPES]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    parts = []
    for _ in range(draw(st.integers(1, 3))):
        shared = draw(st.booleans())
        count = draw(st.integers(1, 4)) if shared else rows + draw(st.integers(0, 1))
        room = draw(st.sampled_from([0, 1, 31, 32, 33, 70]))
        lengths = torch.randint(room + 1, (count,), generator=generator)
        lengths = torch.where(torch.rand(count, generator=generator) < 0.3, draw(st.sampled_from([0, room])), lengths)
        keys, values = (3 * random(count, kv_heads, room, dim) for _ in range(2))
        behind = attention.beyond(lengths, room)[:, None, :, None]
        keys, values = (t.masked_fill(behind, NAN) for t in (keys, values))
        if draw(st.booleans()):  # another layout of the memory
            keys, values = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (keys, values))
        of_row = torch.randint(-1, count, (rows,), generator=generator).tolist()
        lengths = lengths.to(draw(st.sampled_from([torch.int64, torch.int32])))
        parts.append(Part(keys, values, lengths, Places(of_row, count) if shared else None))
    query = random(rows, kv_heads * rep, 2, dim)[:, :, 1]  # of its own strides
    return query, parts, draw(st.sampled_from([None, 0.3]))


@given(case=decoding_cases())
@settings(checks, max_examples=30)
def test_any_parts(device, guarded, case):
    query, parts, scale = case
    expected = row_by_row(query, parts, query.shape[-1] ** -0.5 if scale is None else scale)
    there = [on(device, part) for part in parts]
    found = decode_attention(query.to(device), there, scale)
    guarded.check()
    assert found.dtype == query.dtype and found.is_contiguous()
    assert not found[(expected == 0).all(-1)].any()  # exactly 0 where there is no key
    tolerance = TYPES[query.dtype]
    torch.testing.assert_close(found.cpu().double(), expected, rtol=tolerance, atol=4 * tolerance)


def test_by_hand(device):
    # Weights 2, 1 of the prompt's keys and 5 of the first row's own; the second row has weights 1 and 1 and no own key,
    # the third no prompt and one own key; the last has nothing.
    log = math.log
    query = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 1.0]], [[1.0, 1.0]]], device=device)
    keys = torch.tensor([[[[NAN, NAN]] * 2], [[[log(2), 0.0], [0.0, 0.0]]]], device=device)
    values = torch.tensor([[[[NAN, NAN]] * 2], [[[8.0, 0.0], [0.0, 8.0]]]], device=device)
    prompts = Part(keys, values, torch.tensor([0, 2], device=device), Places([1, 1, 0, -1], 2, device))
    own = torch.full((4, 1, 1, 2), NAN, device=device)
    own[0], own[2] = torch.tensor([log(5), 0.0]), torch.tensor([7.0, 7.0])
    own_values = torch.tensor([[16.0, 8.0], [NAN, NAN], [3.0, 4.0], [NAN, NAN]], device=device)[:, None, None]
    own = Part(own, own_values, torch.tensor([1, 0, 1, 0], device=device))
    found = decode_attention(query, [prompts, own], scale=1.0)[:, 0].tolist()
    expected = [[(2 * 8 + 5 * 16) / 8, (8 + 5 * 8) / 8], [4.0, 4.0], [3.0, 4.0], [0.0, 0.0]]
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-5)


def test_heads_read_their_own_keys_and_large_scores_stay_exact(device):
    # Two key heads of three query heads each; each key head's second key wins by 1e4 and its value names the head.
    query = torch.ones(1, 6, 1, device=device)
    keys = torch.tensor([[[[0.0], [1e4]], [[0.0], [1e4]]]], device=device)
    values = torch.tensor([[[[9.0], [1.0]], [[9.0], [2.0]]]], device=device)
    found = decode_attention(query, [Part(keys, values, torch.tensor([2], device=device))])
    assert found.flatten().tolist() == [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]


def test_more_queries_than_a_program_holds(device):
    # 18 rows of one place make two tiles, and 16 of them with 9 heads 144 queries, where a program holds 128.
    torch.manual_seed(0)
    query, keys = torch.randn(19, 9, 8), torch.randn(2, 1, 40, 8)
    of_row = [1] * 18
    of_row.insert(5, 0)
    part = Part(keys, keys.flip(2), torch.tensor([7, 40]), Places(of_row, 2))
    found = decode_attention(query.to(device), [on(device, part)])
    torch.testing.assert_close(found.cpu().double(), row_by_row(query, [part], 8**-0.5), rtol=2e-6, atol=8e-6)


def test_a_broken_key_shows_in_the_rows_that_see_it(device):
    torch.manual_seed(0)
    query, keys = torch.randn(3, 2, 4, device=device), torch.randn(2, 1, 5, 4, device=device)
    keys[1, 0, 2, 0] = NAN
    part = Part(keys, keys.nan_to_num(), torch.tensor([5, 5], device=device), Places([0, 1, 0], 2, device))
    assert decode_attention(query, [part]).isnan().any(-1).tolist() == [[False] * 2, [True] * 2, [False] * 2]


def test_no_rows(device):
    part = Part(*torch.zeros(2, 2, 1, 3, 4, device=device), torch.tensor([3, 3], device=device))
    assert decode_attention(torch.zeros(0, 2, 4, device=device), [part]).shape == (0, 2, 4)


def test_shared_keys_are_not_copied_for_each_row():
    """Nothing that is made on the way is larger than the scores."""
    torch.manual_seed(0)
    rows, heads, room, dim = 32, 4, 50, 64
    query, keys, values = torch.randn(rows, heads, dim), *torch.randn(2, 2, 2, room, dim)
    part = Part(keys, values, torch.tensor([50, 44]), Places([0] * 16 + [1] * 16, 2))
    given_, made = {t.untyped_storage().data_ptr() for t in (query, keys, values)}, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            made.extend(
                t.untyped_storage().nbytes()
                for t in (found if isinstance(found, (tuple, list)) else [found])
                if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given_
            )
            return found

    with Watch():
        decode_attention(query, [part])
    assert max(made) <= 4 * max(rows * heads * room, rows * heads * (dim + 2)) < 4 * rows * 2 * room * dim / 3


# ---------------------------------------------------------------------------------------------------------- places


def test_places_by_hand(monkeypatch):
    monkeypatch.setattr("kernels.parts.ROWS", 2)
    places = Places([2, 0, 2, -1, 2], 4)
    members, slots, idle = places.grouped
    assert members.tolist() == [[1, 0, 0], [0, 0, 0], [0, 2, 4]]  # of places 0 to 2, filled up with 0
    assert [members.flatten()[s].item() for s in slots[[0, 1, 2, 4]]] == [0, 1, 2, 4]
    assert idle.tolist() == [3]
    assert places.tiles.tolist() == [[0, 1, -1], [2, 0, 2], [2, 4, -1], [-1, -1, -1]]
    addresses = places.of_row.data_ptr(), places.tiles.data_ptr()
    places.set([1, 1, 1, 1, 1])
    assert places.tiles.tolist() == [[1, 0, 1], [1, 2, 3], [1, 4, -1], [-1, -1, -1]]
    assert places.grouped[2] is None and places.of_row.tolist() == [1] * 5
    assert (places.of_row.data_ptr(), places.tiles.data_ptr()) == addresses


@given(st.lists(st.integers(-1, 9), max_size=70))
@checks
def test_every_row_is_in_one_tile(of_row):
    places = Places(of_row, 10)
    seen = sorted((row, tile[0]) for tile in places.tiles.tolist() for row in tile[1:] if row >= 0)
    assert seen == [(row, place) for row, place in enumerate(of_row) if place >= 0]


@pytest.mark.parametrize(("rows", "count"), [(1, 9), (16, 1), (17, 1), (33, 2), (100, 7), (256, 27)])
def test_no_more_tiles_than_can_be_needed(rows, count):
    """All but one of the places with a single row are the worst there is, up to a tile's remainder."""
    used = min(rows, count)
    of_row = [*range(used - 1), *[used - 1] * (rows - used + 1)]
    assert (Places(of_row, count).tiles[:, 0] >= 0).all()


def test_what_does_not_fit_is_refused():
    query, keys = torch.zeros(3, 4, 8), torch.zeros(3, 2, 5, 8)
    lengths = torch.zeros(3, dtype=torch.long)
    for parts, message in (
        ([], "at least one part"),
        ([Part(keys[:2], keys[:2], lengths[:2])], "does not fit"),  # three rows, two places
        ([Part(keys, keys, lengths, Places([0, 1], 3))], "does not fit"),  # places of two rows
        ([Part(keys, keys, lengths, Places([0, 1, 1], 2))], "does not fit"),  # of two places
        ([Part(keys, keys[:, :, :4], lengths)], "does not fit"),
        ([Part(keys[..., :4], keys[..., :4], lengths)], "does not fit"),
        ([Part(keys[:, :1].expand(-1, 3, -1, -1), keys[:, :1].expand(-1, 3, -1, -1), lengths)], "does not fit"),
        ([Part(keys, keys, lengths[:2])], r"expected \(3,\) lengths"),
        ([Part(keys.half(), keys.half(), lengths)], "one type of queries, keys and values"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_attention(query, parts)
    for wrong in ([0, 3], [0, -2]):
        with pytest.raises(ValueError, match=r"expected 2 places in -1 .. 2"):
            Places(wrong, 3)
    with pytest.raises(ValueError, match="expected 2 places"):
        Places([0, 1], 3).set([0, 1, 2])


# --------------------------------------------------------------------------------------------------- CUDA graphs


class Noted:
    """A kernel that is not run: its grids."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **settings: None


def test_a_step_reads_nothing_on_the_host(monkeypatch):
    """Tensors on `meta` have no values that could be read: what runs on them can be captured in a CUDA graph."""
    monkeypatch.setenv("UPT_KERNELS", "triton")
    kernels = {}
    for module, name in ((attention_triton, "part"), (attention_triton, "merge"), (sampling_triton, "sample")):
        kernels[name] = Noted()
        monkeypatch.setattr(module, f"{name}_kernel", kernels[name])
    with torch.device("meta"):
        stores = [torch.zeros(n, 4, 2048, 128, dtype=torch.bfloat16) for n in (3, 20)]
        lengths = torch.zeros(20, dtype=torch.long)
        prompts = Part(stores[0], stores[0], lengths[:3], Places([r // 10 for r in range(20)], 3, "meta"))
        own = Part(stores[1], stores[1], lengths)
        assert decode_attention(stores[1][:, :, :7].flatten(1, 2), [prompts, own]).shape == (20, 28, 128)
        sample(torch.zeros(20, 1000), 1.0, 1.0, 0, 0, lengths, lengths, banned=[3, 5])
    # 3 tiles, one more that 17 further rows of a place could need, 20 rows; stretches of 64 and 256 of the 2048 keys.
    assert kernels["part"].grids == [(4, 4, 32), (20, 4, 8)]
    assert kernels["merge"].grids == [(20, 28)] and kernels["sample"].grids == [(20,)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(28, 4, 128), (16, 2, 128), (32, 8, 128), (12, 2, 80)])
def test_full_size_in_a_cuda_graph(dtype, heads, kv_heads, dim):
    """Captured once and replayed with other lengths, places, queries and positions, as decoding does."""
    torch.manual_seed(0)
    rows, groups, room = 64, 9, 2048
    keys, values, own_keys, own_values = (
        torch.randn(n, kv_heads, room, dim, dtype=dtype, device="cuda") for n in (groups, groups, rows, rows)
    )
    lengths, own_lengths = (torch.zeros(n, dtype=torch.long, device="cuda") for n in (groups, rows))
    places = Places([-1] * rows, groups, "cuda")
    parts = [Part(keys, values, lengths, places), Part(own_keys, own_values, own_lengths)]
    query, logits = torch.randn(rows, heads, dim, dtype=dtype, device="cuda"), torch.randn(rows, 999, device="cuda")
    row_ids = torch.tensor([row_id(0, "u", r) for r in range(rows)], device="cuda")
    position = torch.zeros(rows, dtype=torch.long, device="cuda")

    def step():
        return decode_attention(query, parts), sample(logits, 0.7, 0.9, 0, 0, row_ids, position, banned=[3])[0]

    with torch.cuda.stream(torch.cuda.Stream()):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, token = step()
    for _ in range(3):
        lengths.copy_(torch.randint(0, room + 1, (groups,)))
        own_lengths.copy_(torch.randint(0, room + 1, (rows,)))
        places.set(torch.randint(-1, groups, (rows,)).tolist())
        query.copy_(torch.randn(rows, heads, dim))
        position.copy_(torch.randint(0, 2048, (rows,)))
        graph.replay()
        there = [Part(*(t.cpu() for t in (p.keys, p.values, p.lengths)), p.places) for p in parts]
        tolerance = max(TYPES[dtype], 1e-5)
        expected = row_by_row(query.cpu(), there, dim**-0.5)
        torch.testing.assert_close(out.cpu().double(), expected, rtol=tolerance, atol=4 * tolerance)
        assert torch.equal(token, sample(logits, 0.7, 0.9, 0, 0, row_ids, position, banned=[3])[0])
