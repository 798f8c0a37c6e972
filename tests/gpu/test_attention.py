"""FlashInfer's kernels against plain torch in float32 on the same values, over a pool whose other slots are NaN."""

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu
pytest.importorskip("flashinfer")

from engine.attention import flashinfer  # noqa: E402
from engine.attention.base import AttentionLayer, Span, StepAttention  # noqa: E402
from engine.attention.flashinfer import FlashInferAttention  # noqa: E402
from engine.attention.paged import PagedAttention  # noqa: E402
from engine.layers.rotary import Rotation  # noqa: E402

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
NUM_BLOCKS, BLOCK_SIZE = 2048, 16
LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 100, 255, 257, 1000]


class World:
    """A pool of two layers with random context, and steps in it. Blocks are handed out in random order."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, kv_dtype: torch.dtype = BF16) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        shape = (NUM_BLOCKS, 2, 2, num_kv_heads, BLOCK_SIZE, head_dim)
        self.kv = torch.full(shape, float("nan"), device="cuda").to(kv_dtype)
        self.k_scales, self.v_scales = ([0.5, 2.0], [0.25, 1.0]) if kv_dtype == FP8 else ([1.0, 1.0], [1.0, 1.0])
        self.seed = random.randrange(1 << 30)
        print("seed", self.seed)  # shown when a test fails
        self.random = random.Random(self.seed)
        torch.manual_seed(self.seed)
        self.free = self.random.sample(range(1, NUM_BLOCKS), NUM_BLOCKS - 1)
        self.attention = FlashInferAttention(
            self.kv,
            num_heads,
            BF16,
            max_graph_rows=64,
            max_model_len=NUM_BLOCKS * BLOCK_SIZE // 64,
            k_scales=self.k_scales,
            v_scales=self.v_scales,
        )

    def layer(self, index: int = 0, window: int | None = None, softcap: float | None = None) -> AttentionLayer:
        return AttentionLayer(index, self.head_dim**-0.5 * 1.5, window, softcap)

    def span(self, start: int, num_tokens: int = 1) -> Span:
        """The positions before `start` are filled."""
        num_blocks = -(-(start + num_tokens) // BLOCK_SIZE)
        blocks = [self.free.pop() for _ in range(num_blocks)]
        for position in range(0, start, BLOCK_SIZE):
            slots = min(BLOCK_SIZE, start - position)
            context = torch.randn(2, 2, self.num_kv_heads, slots, self.head_dim, device="cuda")
            self.kv[blocks[position // BLOCK_SIZE], :, :, :, :slots] = context.to(self.kv.dtype)
        return Span(start, num_tokens, [*blocks, self.free[0]])  # one more block than needed is no harm

    def heads(self, spans: Sequence[Span], num_rows: int | None = None) -> Tensor:
        num_tokens = num_rows if num_rows is not None else sum(span.num_tokens for span in spans)
        total = self.num_heads + 2 * self.num_kv_heads
        return torch.randn(num_tokens, total, self.head_dim, device="cuda").to(BF16)

    def rotation(self, num_tokens: int) -> Rotation:
        angles = torch.rand(num_tokens, self.head_dim // 2, device="cuda") * 6.28
        signed = torch.stack((-angles.sin(), angles.sin()), dim=1)
        return Rotation(angles.cos().to(BF16)[:, None, None], signed.to(BF16)[:, None])

    def run(self, step: StepAttention, layer: AttentionLayer, heads: Tensor) -> Tensor:
        step.rotate_and_store(layer, heads, self.rotation(len(heads)))
        return step.attend(layer, heads[:, : self.num_heads])

    def reference(self, spans: Sequence[Span], layer: AttentionLayer, heads: Tensor) -> Tensor:
        """From the pool as it is now, and rotated heads."""
        kv = self.kv.float()
        kv[:, :, 0] *= torch.tensor(self.k_scales, device="cuda")[:, None, None, None]
        kv[:, :, 1] *= torch.tensor(self.v_scales, device="cuda")[:, None, None, None]
        queries = heads[: sum(span.num_tokens for span in spans), : self.num_heads].float()
        return PagedAttention(kv).begin_step(spans, None).attend(layer, queries)

    def check(self, spans: Sequence[Span], layer: AttentionLayer) -> None:
        heads = self.heads(spans)
        out = self.run(self.attention.begin_step(spans, None), layer, heads)
        assert_close(out, self.reference(spans, layer, heads))


def assert_close(out: Tensor, reference: Tensor) -> None:
    """Weights and outputs are rounded to bfloat16, 8 bits."""
    assert out.dtype == BF16
    torch.testing.assert_close(out.float(), reference, rtol=2**-7, atol=2**-7)


SHAPES = [(4, 1, 128, BF16), (32, 8, 128, BF16), (8, 8, 128, BF16), (8, 8, 64, BF16), (32, 8, 128, FP8)]


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim", "kv_dtype"), SHAPES)
def test_decode_equals_the_reference(num_heads: int, num_kv_heads: int, head_dim: int, kv_dtype: torch.dtype) -> None:
    world = World(num_heads, num_kv_heads, head_dim, kv_dtype)
    for lengths in ([0], LENGTHS, [world.random.choice(LENGTHS) for _ in range(50)]):
        world.check([world.span(length) for length in lengths], world.layer(world.random.randrange(2)))


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim", "kv_dtype"), SHAPES)
def test_small_prompts_equal_the_reference(
    num_heads: int, num_kv_heads: int, head_dim: int, kv_dtype: torch.dtype
) -> None:
    world = World(num_heads, num_kv_heads, head_dim, kv_dtype)
    for sizes in ([(0, 2)], [(0, 100), (5, 17), (1000, 33)], [(16, 16), (31, 2), (257, 128)]):
        world.check([world.span(*size) for size in sizes], world.layer(1))


@pytest.mark.parametrize("sizes", [[(0, 640)], [(0, 129), (0, 15), (0, 600)], [(700, 640)], [(0, 300), (33, 500)]])
def test_long_prompts_equal_the_reference_from_heads_or_blocks(sizes: list[tuple[int, int]]) -> None:
    world = World(32, 8, 128)
    spans = [world.span(*size) for size in sizes]
    is_fresh = all(start == 0 for start, _ in sizes)
    expected = flashinfer.FRESH_PROMPTS if is_fresh else flashinfer.PROMPTS
    if torch.cuda.get_device_capability()[0] == 9:
        assert world.attention.prompt_kernel(spans) == expected
    world.check(spans, world.layer(1))


@pytest.mark.parametrize(("head_dim", "window", "softcap"), [(64, None, None), (256, 100, 20.0)])
def test_long_prompts_with_other_heads_equal_the_reference(
    head_dim: int, window: int | None, softcap: float | None
) -> None:
    world = World(32, 8, head_dim)
    for sizes in ([(0, 640)], [(0, 300), (33, 500)]):
        world.check([world.span(*size) for size in sizes], world.layer(1, window, softcap))


@pytest.mark.parametrize("order", ["decode first", "prompts first", "mixed"])
def test_decode_and_prompts_share_a_step_in_any_order(order: str) -> None:
    world = World(32, 8, 128)
    decodes = [world.span(length) for length in LENGTHS]
    prompts = [world.span(0, 40), world.span(17, 3), world.span(300, 250)]
    spans = {"decode first": decodes + prompts, "prompts first": prompts + decodes}.get(order)
    if spans is None:
        spans = world.random.sample(decodes + prompts, len(decodes + prompts))
    world.check(spans, world.layer(0))


@pytest.mark.parametrize(("head_dim", "windows", "softcap"), [(128, [100, None], None), (256, [100, None], 20.0)])
def test_layers_of_one_step_have_their_own_windows(
    head_dim: int, windows: list[int | None], softcap: float | None
) -> None:
    world = World(8, 4, head_dim)
    spans = [world.span(length) for length in LENGTHS] + [world.span(0, 230), world.span(150, 99), world.span(98, 3)]
    step = world.attention.begin_step(spans, None)
    for index, window in enumerate(windows):
        layer, heads = world.layer(index, window, softcap), world.heads(spans)
        assert_close(world.run(step, layer, heads), world.reference(spans, layer, heads))


def test_keys_and_values_are_stored_in_their_slots_and_the_layer_is_announced() -> None:
    world = World(4, 2, 64)
    spans = [world.span(0, 37), world.span(20), world.span(16, 16)]
    before, heads, written = world.kv.clone(), world.heads(spans), []
    world.attention.begin_step(spans, written.append).rotate_and_store(
        world.layer(1), heads, world.rotation(len(heads))
    )
    row = 0
    for span in spans:
        for position in range(span.start, span.start + span.num_tokens):
            slot = before[span.block_ids[position // BLOCK_SIZE], 1, :, :, position % BLOCK_SIZE]
            slot.copy_(heads[row, 4:].view(2, 2, 64))
            row += 1
    assert torch.equal(world.kv.view(torch.int16), before.view(torch.int16))
    assert written == [1]


class Graph:
    """Captured attention of all `layers`; `heads` is its input."""

    def __init__(self, world: World, num_rows: int, layers: Sequence[AttentionLayer], *, cuts: bool = True) -> None:
        self.heads = world.heads([], num_rows)
        self.attention = world.attention.decode_graph(num_rows, spare_block=0, cuts=cuts)
        self.rotation = world.rotation(num_rows)  # read by every replay, so kept

        def run() -> list[Tensor]:
            outs = []
            for layer in layers:
                heads = self.heads.clone()
                self.attention.rotate_and_store(layer, heads, self.rotation)
                outs += [heads, self.attention.attend(layer, heads[:, : world.num_heads])]
            return outs

        run()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outs = run()

    def replay(self, spans: Sequence[Span]) -> list[Tensor]:
        self.attention.prepare(spans)
        self.graph.replay()
        return [out[: len(spans)].clone() for out in self.outs]


@pytest.mark.parametrize("num_rows", [1, 5, 33, 64])
@pytest.mark.parametrize("kv_dtype", [BF16, FP8])
@pytest.mark.parametrize("cuts", [True, False])
def test_a_captured_decode_step_serves_any_spans(num_rows: int, kv_dtype: torch.dtype, cuts: bool) -> None:
    world = World(32, 8, 128, kv_dtype)
    layers = [world.layer(0), world.layer(1)]
    graph = Graph(world, num_rows, layers, cuts=cuts)
    for size in {1, num_rows // 2 + 1, num_rows}:
        spans = [world.span(world.random.choice([0, *LENGTHS])) for _ in range(size)]
        graph.heads.normal_()
        outs = graph.replay(spans)
        for layer, heads, out in zip(layers, outs[::2], outs[1::2], strict=True):
            assert_close(out, world.reference(spans, layer, heads))


@pytest.mark.parametrize("cuts", [True, False])
def test_a_captured_step_keeps_a_plan_for_each_window(cuts: bool) -> None:
    world = World(8, 4, 256)
    layers = [world.layer(0, 100, 20.0), world.layer(1, None, 20.0)]
    graph = Graph(world, 16, layers, cuts=cuts)
    for lengths in ([5], LENGTHS, [1000] * 16):
        spans = [world.span(length) for length in lengths]
        outs = graph.replay(spans)
        for layer, heads, out in zip(layers, outs[::2], outs[1::2], strict=True):
            assert_close(out, world.reference(spans, layer, heads))


def test_the_longest_of_many_sequences_is_cut_up() -> None:
    world = World(32, 8, 128)
    graph = Graph(world, 64, [world.layer(0)])
    spans = [world.span(15000), *(world.span(20) for _ in range(63))]
    heads, out = graph.replay(spans)
    assert_close(out, world.reference(spans, world.layer(0), heads))
    group = graph.attention.group
    num_chunks = world.attention.max_decode_chunks(64)
    assert 64 < num_chunks <= group.plans[None][1][0], "the captured grid holds all chunks"


@pytest.mark.parametrize(
    ("lengths", "cuts"),
    [([256] * 64, False), ([32768, *[256] * 63], True), ([100000], True), ([300], False), ([2048] * 20, False)],
)
def test_only_a_step_that_waits_for_its_longest_sequences_is_cut(lengths: list[int], cuts: bool) -> None:
    kv = torch.zeros(4, 1, 2, 8, BLOCK_SIZE, 128, dtype=BF16, device="cuda")
    attention = FlashInferAttention(kv, 32, BF16)
    if attention.num_sms == 132:  # the bounds follow from the number of multiprocessors
        assert attention.cuts([Span(length - 1, 1, []) for length in lengths], len(lengths)) == cuts


def test_a_step_prepared_while_another_waits_leaves_that_one_as_it_was() -> None:
    world = World(32, 8, 128)
    graphs = [Graph(world, 4, [world.layer(0)]), Graph(world, 7, [world.layer(1)], cuts=False)]
    steps: list[tuple[list[Span], list[Tensor]]] = []
    torch.cuda._sleep(50_000_000)
    for number in range(6):
        spans = [world.span(world.random.choice(LENGTHS)) for _ in range(3)]
        steps.append((spans, graphs[number % 2].replay(spans)))
    for number, (spans, (heads, out)) in enumerate(steps):
        assert_close(out, world.reference(spans, world.layer(number % 2), heads))


@pytest.mark.parametrize(
    ("head_dim", "dtype", "kv_dtype"),
    [(96, BF16, BF16), (128, torch.float32, torch.float32), (128, BF16, torch.float16)],
)
def test_what_no_kernel_serves_is_refused(head_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    kv = torch.zeros(2, 1, 2, 1, 16, head_dim, dtype=kv_dtype, device="cuda")
    with pytest.raises(ValueError, match="no FlashInfer kernel"):
        FlashInferAttention(kv, 4, dtype)
