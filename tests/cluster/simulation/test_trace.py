"""Traces: what requests have in common, when they come, and what is said of files that are none."""

from pathlib import Path

import pytest

from cluster.simulation.trace import (
    NO_HINTS,
    WINDOW_S,
    Hints,
    Trace,
    TraceError,
    TraceRequest,
    arrivals,
    load_trace,
)
from tests.cluster.simulation.small import request


def shared(left: list[int], right: list[int]) -> int:
    """Leading blocks in common; none further on."""
    num = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    assert not set(left[num:]) & set(right[num:])
    return num


@pytest.mark.parametrize("block_size", [16, 128, 512])
def test_equal_prefixes_give_equal_hashes(trace_file: Path, block_size: int) -> None:
    first, second, third = load_trace(trace_file).requests
    assert len(first.hashes(block_size)) == 1140 // block_size
    assert shared(first.hashes(block_size), second.hashes(block_size)) == 512 // block_size
    assert len(set(first.hashes(block_size))) == 1140 // block_size
    assert shared(second.hashes(block_size), third.hashes(block_size)) == 512 // block_size


@pytest.mark.parametrize("block_size", [16, 128])
def test_the_next_turn_of_a_conversation_repeats_the_answer(trace_file: Path, block_size: int) -> None:
    """The third shares all full blocks of the first, and is longer than that one with its answer."""
    first, _, third = load_trace(trace_file).requests
    assert shared(first.hashes(block_size), third.hashes(block_size)) == 1140 // block_size


def test_an_answer_that_nobody_repeats_is_like_no_other(tmp_path: Path) -> None:
    """Two requests with one prompt: their answers differ, even in the trace's block that the prompt ends in."""
    path = tmp_path / "twins.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 600, "output_length": 900, "hash_ids": [0, 1]}\n' * 2)
    first, second = load_trace(path).requests
    assert shared(first.hashes(16), second.hashes(16)) == 600 // 16
    assert len(first.hashes(16)) == 1500 // 16


@pytest.mark.parametrize(
    ("others", "expected"),  # what prompts after one of 1,100 tokens and an answer of 40 share with both
    [
        pytest.param(
            [(1700, [0, 1, 4, 5]), (1800, [0, 1, 6, 7])], [71, 64], id="the first one goes on from the answer"
        ),
        pytest.param([(1140, [0, 1, 4])], [71], id="if it is just long enough to have it"),
        pytest.param([(1139, [0, 1, 4])], [64], id="but not one that is too short"),
        pytest.param([(1200, [0, 4, 5])], [32], id="nor one that shares a block less"),
    ],
)
def test_the_first_that_shares_all_full_blocks_and_is_long_enough_goes_on_from_an_answer(
    tmp_path: Path, others: list[tuple[int, list[int]]], expected: list[int]
) -> None:
    path = tmp_path / "turns.jsonl"
    line = '{{"timestamp": 0, "input_length": {}, "output_length": 40, "hash_ids": {}}}\n'
    path.write_text("".join(line.format(*row) for row in [(1100, [0, 1, 2]), *others]))
    first, *rest = (each.hashes(16) for each in load_trace(path).requests)
    assert [shared(first, each) for each in rest] == expected


def test_a_first_block_alone_makes_no_conversation(tmp_path: Path) -> None:
    """All prompts of a trace may begin with it: of 700 tokens with an answer of 20, 32 blocks of 16 are shared."""
    path = tmp_path / "trace.jsonl"
    line = '{{"timestamp": 0, "input_length": {}, "output_length": 20, "hash_ids": {}}}\n'
    path.write_text(line.format(700, [0, 3]) + line.format(1100, [0, 4, 5]))
    first, second = load_trace(path).requests
    assert shared(first.hashes(16), second.hashes(16)) == 32


def test_requests_are_in_order_of_arrival_whatever_the_order_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    line = '{{"timestamp": {}, "input_length": {}, "output_length": 1, "hash_ids": [1]}}\n'
    path.write_text("".join(line.format(1000 * second, 100 + second) for second in (7, 3, 5)))
    requests = load_trace(path).requests
    assert [(each.number, each.arrived, each.num_prompt_tokens) for each in requests] == [
        (0, 3.0, 103),
        (1, 5.0, 105),
        (2, 7.0, 107),
    ]


@pytest.mark.parametrize(
    "last_blocks",
    [
        pytest.param([3, 3], id="a partial block keeps its name in the next turn"),
        pytest.param([3, 4, 3], id="two take turns"),
        pytest.param([5, 3, 4, 3, 4], id="one leads into the circle"),
    ],
)
def test_a_trace_whose_ids_go_in_a_circle_is_read_to_its_end(tmp_path: Path, last_blocks: list[int]) -> None:
    path = tmp_path / "circle.jsonl"
    line = '{{"timestamp": 0, "input_length": {}, "output_length": 1, "hash_ids": [1, 2, {}]}}\n'
    path.write_text("".join(line.format(1100 + turn, last) for turn, last in enumerate(last_blocks)))
    requests = load_trace(path).requests
    assert [each.num_prompt_tokens for each in requests] == [1100 + turn for turn in range(len(last_blocks))]
    assert all(shared(requests[0].hashes(512), each.hashes(512)) == 2 for each in requests)


def test_a_line_may_say_what_its_client_says(tmp_path: Path) -> None:
    path = tmp_path / "named.jsonl"
    line = '{"timestamp": 0, "input_length": 6, "output_length": 1, "hash_ids": [1]%s}\n'
    named = ', "session_id": "s", "tenant": 7, "priority": -1, "slo_ttft_ms": 2000, "slo_tpot_ms": 0.5'
    path.write_text(line % "" + line % named + line % ', "session_id": null, "tenant": null, "priority": null')
    hints = [each.hints for each in load_trace(path).requests]
    assert hints == [NO_HINTS, Hints("s", "7", -1, 2000.0, 0.5), NO_HINTS]


def test_prompts_of_an_azure_trace_have_nothing_in_common(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,1374,44\n2023-11-16 18:15:50.9951690,2396,109\n"
    )
    trace = load_trace(path)
    assert trace.seconds == pytest.approx(4.314579)
    assert [(each.num_prompt_tokens, each.num_output_tokens) for each in trace.requests] == [(1374, 44), (2396, 109)]
    assert shared(trace.requests[0].hashes(16), trace.requests[1].hashes(16)) == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1000000000000,44", "line 2: ContextTokens: '1000000000000' is not allowed; allowed: 0 to 1073741824"),
        ("-5,44", "line 2: ContextTokens: '-5' is not allowed"),
        ("100,1073741825", "line 2: GeneratedTokens: '1073741825' is not allowed"),
        ("x,44", "line 2: ContextTokens: 'x' is not allowed; allowed: 0 to 1073741824"),
        pytest.param("1" * 5000 + ",44", "line 2: ContextTokens: .* is not allowed", id="longer than an int"),
        ("100", "line 2: GeneratedTokens: None is not allowed"),
        pytest.param("1" * 200_000 + ",44", "field larger than field limit", id="long"),
    ],
)
def test_an_azure_row_that_is_none_is_refused_with_the_line(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,{row}\n")
    with pytest.raises(TraceError, match=message):
        load_trace(path)


@pytest.mark.parametrize("time", ["0001-01-01 00:00:00", "soon", ""])
def test_an_azure_row_without_a_time_is_refused_with_the_line(tmp_path: Path, time: str) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6,1,1\n{time},1,1\n")
    with pytest.raises(TraceError, match=f"line 3: TIMESTAMP: '{time}' is not allowed; allowed: a time such as 2"):
        load_trace(path)
    path.write_text("time,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6,1,1\n")
    with pytest.raises(TraceError, match="line 2: TIMESTAMP: None is not allowed"):
        load_trace(path)


def test_arrivals_stay_in_their_window_and_order_and_differ_by_seed() -> None:
    trace = Trace("t", [request(number, arrived=3.0 * (number // 4)) for number in range(40)])
    times = arrivals(trace, seed=1)
    assert times == sorted(times)
    assert [int(time // WINDOW_S) for time in times] == [number // 4 for number in range(40)]
    assert times == arrivals(trace, seed=1)
    assert times != arrivals(trace, seed=2)
    assert arrivals(trace, seed=1, rate_scale=2.0) == pytest.approx([time / 2 for time in times])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "line 1: Object missing required field `timestamp`"),
        ("no", "line 1: (JSON is malformed|Input data was truncated)"),
        ("\xfe\xff", "line 1: (JSON is malformed|Input data was truncated)"),
        (
            '{"timestamp": NaN, "input_length": 1, "output_length": 1, "hash_ids": [1]}',
            "line 1: (JSON is malformed|Input data was truncated)",
        ),
        ('{"timestamp": 1e999, "input_length": 1, "output_length": 1, "hash_ids": [1]}', "line 1: Number out of range"),
        (
            '{"timestamp": 1e300, "input_length": 1, "output_length": 1, "hash_ids": [1]}',
            r"line 1: Expected `float` <= 1\S+ - at `\$.timestamp`",
        ),
        ('{"timestamp": 0, "input_length": 0, "output_length": 1, "hash_ids": []}', ">= 1.*input_length"),
        ('{"timestamp": 0, "input_length": "6", "output_length": 1, "hash_ids": [1]}', "got `str`.*input_length"),
        ('{"timestamp": 0, "input_length": 6.5, "output_length": 1, "hash_ids": [1]}', "got `float`.*input_length"),
        ('{"timestamp": 0, "input_length": 6, "output_length": 1, "hash_ids": null}', "got `null`.*hash_ids"),
        ('{"timestamp": 0, "input_length": 6, "output_length": 1, "hash_ids": [-1]}', ">= 0.*hash_ids"),
        ('{"timestamp": 0, "input_length": 6, "output_length": 1, "hash_ids": [9e20]}', "line 1: .*hash_ids"),
        (
            '{"timestamp": 0, "input_length": 6, "output_length": 1, "hash_ids": [1], "priority": 2147483648}',
            "<= 2147483647.*priority",
        ),
        (
            '{"timestamp": 0, "input_length": 6, "output_length": 1, "hash_ids": [1], "tenant": [7]}',
            "got `array`.*tenant",
        ),
        (
            '{"timestamp": 0, "input_length": 6, "output_length": 1, "hash_ids": [1], "slo_tpot_ms": 0}',
            "> 0.*slo_tpot_ms",
        ),
        (
            '{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1]}',
            "hash_ids: 1 are given; input_length 600 needs 2,",
        ),
        ("", "holds no request"),
        ("\n\n", "holds no request"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_with_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(line, encoding="latin-1")
    with pytest.raises(TraceError, match=message):
        load_trace(path)


def test_the_first_requests_alone_can_be_loaded(trace_file: Path) -> None:
    assert [each.num_prompt_tokens for each in load_trace(trace_file, max_requests=2).requests] == [1100, 700]


def test_hashes_do_not_depend_on_what_came_before() -> None:
    one = TraceRequest(0, 0.0, 1024, 1, (7, 8, 9))
    assert one.hashes(128)[:8].tolist() == TraceRequest(5, 9.0, 1024, 1, (7, 8, 11)).hashes(128)[:8].tolist()
