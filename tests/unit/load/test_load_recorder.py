"""The load recorder: exact counts, a window that forgets, and nothing that a CUDA graph forbids."""

from __future__ import annotations

import gc
import tracemalloc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eplb_fsm.errors import ConfigError, LoadError
from eplb_fsm.load import LoadRecorder, LoadSource

LAYERS, EXPERTS, TOP_K = 3, 8, 2


def routing(num_tokens: int, seed: int = 0, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Random top-k ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, EXPERTS, (num_tokens, TOP_K), generator=generator).to(dtype)


def counts(*ids: torch.Tensor) -> list[int]:
    """How often each expert is in some ids, by plain counting."""
    flat = [int(i) for tensor in ids for i in tensor.reshape(-1)]
    return [flat.count(expert) for expert in range(EXPERTS)]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_counts_are_tokens_times_top_k(dtype: torch.dtype) -> None:
    """Every valid token counts once for each of its experts, in its layer, and in no other."""
    recorder = LoadRecorder([(LAYERS, EXPERTS)])
    ids = routing(13, dtype=dtype)
    recorder.record(0, 1, ids)
    recorder.record(0, 1, ids[:5])
    recorder.record(0, 2, ids[:0])
    snapshot = recorder.snapshot().view(LAYERS, EXPERTS)
    assert snapshot.dtype == torch.int64
    assert snapshot[1].tolist() == counts(ids, ids[:5])
    assert snapshot.sum() == 18 * TOP_K
    assert snapshot[0].sum() == snapshot[2].sum() == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_padding_counts_for_nobody(dtype: torch.dtype) -> None:
    """Masked tokens, ids of -1 and ids out of range are left out; the rest of a token still counts."""
    recorder = LoadRecorder([(LAYERS, EXPERTS)])
    ids = torch.tensor([[0, 1], [2, -1], [3, EXPERTS], [4, 10_000], [-77, 7], [5, 6]], dtype=dtype)
    valid = torch.tensor([True, True, True, True, True, False])
    recorder.record(0, 0, ids, valid)
    recorder.record(0, 1, ids)
    recorder.record(0, 2, ids, torch.zeros(6, dtype=torch.bool))
    assert recorder.snapshot().view(LAYERS, EXPERTS).tolist() == [
        [1, 1, 1, 1, 1, 0, 0, 1],
        [1] * EXPERTS,
        [0] * EXPERTS,
    ]


@pytest.mark.parametrize("extreme", [torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max])
def test_extreme_ids_do_not_overflow(extreme: int) -> None:
    """The largest and smallest id there can be are padding as well."""
    recorder = LoadRecorder([(1, EXPERTS)])
    recorder.record(0, 0, torch.tensor([[extreme, 3]]))
    assert recorder.snapshot().tolist() == [0, 0, 0, 1, 0, 0, 0, 0]


def test_ids_are_not_changed() -> None:
    """The engine's own tensors are left as they are."""
    recorder = LoadRecorder([(1, EXPERTS)])
    ids, valid = routing(4), torch.tensor([True, False, True, False])
    before = ids.clone(), valid.clone()
    recorder.record(0, 0, ids, valid)
    assert torch.equal(ids, before[0])
    assert torch.equal(valid, before[1])


def test_non_contiguous_ids_and_other_batch_sizes() -> None:
    """Strided ids and changing numbers of tokens are counted alike."""
    recorder = LoadRecorder([(1, EXPERTS)])
    recorded = [routing(n, seed=n) for n in (4, 9, 4, 1, 9)]
    for ids in recorded:
        recorder.record(0, 0, ids.t().contiguous().t())
    assert recorder.snapshot().tolist() == counts(*recorded)


def test_banks_are_apart() -> None:
    """Each bank has layers and experts of its own; the snapshot lists them in order."""
    recorder = LoadRecorder([(2, 4), (1, 3)])
    recorder.record(0, 1, torch.tensor([[3]]))
    recorder.record(1, 0, torch.tensor([[0], [2]]))
    flat = recorder.snapshot()
    assert flat.tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 1]
    assert [bank.tolist() for bank in recorder.snapshots] == [[[0] * 4, [0, 0, 0, 1]], [[1, 0, 1]]]


@pytest.mark.parametrize("num_buckets", [1, 3])
def test_the_window_forgets_what_is_older(num_buckets: int) -> None:
    """The sum covers the open bucket and the last closed ones, for any number of rotations."""
    for rotations in range(2 * num_buckets + 2):
        recorder = LoadRecorder([(1, EXPERTS)], num_buckets=num_buckets)
        recorded = [routing(5, seed=i) for i in range(rotations + 1)]
        for i, ids in enumerate(recorded):
            if i:
                recorder.rotate()
            recorder.record(0, 0, ids)
        assert recorder.num_buckets == num_buckets
        assert recorder.snapshot().tolist() == counts(*recorded[-num_buckets - 1 :])


def test_a_snapshot_begins_the_window_anew() -> None:
    """After a snapshot everything is zero, and counting and forgetting go on as at first."""
    recorder = LoadRecorder([(1, EXPERTS)], num_buckets=2)
    recorder.record(0, 0, routing(5))
    recorder.rotate()
    recorder.record(0, 0, routing(5))
    assert recorder.snapshot().sum() == 2 * 5 * TOP_K
    assert recorder.snapshot().sum() == 0
    recorder.record(0, 0, routing(3))
    recorder.rotate()
    assert recorder.snapshot().tolist() == counts(routing(3))


def test_a_snapshot_is_not_touched_by_what_follows() -> None:
    """Until the next snapshot the worker may read it while the loop goes on counting."""
    recorder = LoadRecorder([(1, EXPERTS)])
    recorder.record(0, 0, routing(5))
    snapshot = recorder.snapshot()
    recorder.record(0, 0, routing(7))
    recorder.rotate()
    assert snapshot.tolist() == counts(routing(5))
    assert recorder.snapshot().data_ptr() == snapshot.data_ptr()


class Operations(TorchDispatchMode):
    """Notes the operations that torch runs, and the memory of every tensor written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


SYNCHRONISING = {"_local_scalar_dense", "item", "nonzero", "bincount", "masked_select", "unique", "_unique2", "index"}


def test_no_operation_needs_the_host() -> None:
    """No operation reads a value back or has a shape that depends on data."""
    recorder = LoadRecorder([(LAYERS, EXPERTS), (1, 4)])
    with Operations() as operations:
        recorder.record(0, 0, routing(4), torch.ones(4, dtype=torch.bool))
        recorder.record(1, 0, routing(4, dtype=torch.int32) % 4)
        recorder.rotate()
        recorder.snapshot()
    assert operations.names
    assert not operations.names & SYNCHRONISING


def test_only_shapes_matter() -> None:
    """Everything runs on a device without data, where anything that looks at a value fails."""
    recorder = LoadRecorder([(LAYERS, EXPERTS)], device="meta")
    ids = routing(4).to("meta")
    recorder.record(0, 0, ids, torch.ones(4, dtype=torch.bool, device="meta"))
    recorder.rotate()
    assert recorder.snapshot().shape == (LAYERS * EXPERTS,)


def test_counting_is_one_write_in_place() -> None:
    """Recording writes no tensor of the recorder but the open bucket, and that in one operation."""
    recorder = LoadRecorder([(LAYERS, EXPERTS)])
    recorder.record(0, 0, routing(4))
    with Operations() as operations:
        recorder.record(0, 0, routing(4))
    assert operations.names - {"randint", "_to_copy"} == {"bucketize", "view", "index_add_"}


def num_tensors() -> int:
    """Tensors alive in this process."""
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def test_nothing_grows() -> None:
    """After the first calls, thousands more with changing batch sizes leave no memory behind."""
    recorder = LoadRecorder([(LAYERS, EXPERTS)])
    batches = [(routing(n), torch.ones(n, dtype=torch.bool)) for n in (1, 4, 16)]

    def run(passes: int) -> None:
        for i in range(passes):
            ids, valid = batches[i % 3]
            recorder.record(0, i % LAYERS, ids, valid)
            if i % 50 == 0:
                recorder.rotate()
            if i % 500 == 0:
                recorder.snapshot()

    run(200)
    tensors = num_tensors()
    tracemalloc.start()
    run(1000)
    before = tracemalloc.get_traced_memory()[0]
    run(4000)
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert after - before < 2000
    assert num_tensors() <= tensors


def test_a_recorder_is_a_load_source() -> None:
    """The recorder is what the state machine expects of any source of load."""
    source: LoadSource = LoadRecorder([(1, EXPERTS)])
    assert source.num_buckets == 4
    assert source.snapshots[0].shape == (1, EXPERTS)


@pytest.mark.parametrize(
    ("bank", "layer", "ids", "message"),
    [
        (1, 0, routing(2), "no layer 0 in bank 1; bank 0 has layers 0..2"),
        (0, 3, routing(2), "no layer 3 in bank 0"),
        (0, -1, routing(2), "no layer -1"),
        (0, 0, routing(2).float(), r"torch\.float32"),
        (0, 0, routing(2) > 3, r"torch\.bool"),
    ],
)
def test_what_cannot_be_counted_is_refused(bank: int, layer: int, ids: torch.Tensor, message: str) -> None:
    """An unknown bank or layer and ids of another type raise one error that says what there is."""
    with pytest.raises(LoadError, match=message):
        LoadRecorder([(LAYERS, EXPERTS)]).record(bank, layer, ids)


@pytest.mark.parametrize(
    ("shapes", "num_buckets", "message"),
    [
        ([], 8, "every bank"),
        ([(0, 4)], 8, "1 or more"),
        ([(2, 4), (1, 0)], 8, "1 or more"),
        ([(2, 4)], 0, "num_buckets is 0"),
    ],
)
def test_impossible_sizes_are_refused(shapes: list[tuple[int, int]], num_buckets: int, message: str) -> None:
    """Sizes without a layer, an expert or a bucket are errors at construction."""
    with pytest.raises(ConfigError, match=message):
        LoadRecorder(shapes, num_buckets=num_buckets)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_in_a_cuda_graph() -> None:
    """Recording is captured in a CUDA graph, and every replay counts what the ids hold then."""
    recorder = LoadRecorder([(LAYERS, EXPERTS)], device="cuda")
    ids, valid = routing(16).cuda(), torch.ones(16, dtype=torch.bool, device="cuda")
    recorder.record(0, 0, ids, valid)
    recorder.snapshot()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorder.record(0, 0, ids, valid)
    recorded = [routing(16, seed=seed) for seed in range(5)]
    for new in recorded:
        ids.copy_(new)
        graph.replay()
    assert recorder.snapshot().view(LAYERS, EXPERTS)[0].tolist() == counts(*recorded)
