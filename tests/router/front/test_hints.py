from router.generation import RouteHints
from router.http import MAX_NAME_BYTES, FrontConfig
from router.tokenizer import Tokenizer
from tests.router.front.fakes import running, saying


async def test_headers_name_session_and_tenant(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, saying(tokenizer, "sea")) as server:
        await server.post("/v1/completions", {"prompt": "x", "n": 2}, "X-Session-ID: s1", "X-Tenant-ID: t1")
        await server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, "x-session-id: é")
        await server.post("/v1/completions", {"prompt": "x"}, f"x-session-id: {'s' * 1000}")
    both, chat, long = [*{*server.generator.hints[:2]}], server.generator.hints[2], server.generator.hints[3]
    assert both == [RouteHints("s1", "t1")]
    assert [stream.request.tenant for stream in server.generator.streams] == ["t1", "t1", "", ""]
    assert chat.session == "é".encode().decode("latin-1")
    assert (long.session, long.tenant) == ("s" * MAX_NAME_BYTES, "")


async def test_without_a_header_the_tenant_is_the_keys(tokenizer: Tokenizer) -> None:
    config = FrontConfig(api_keys=("k1", "k2"))
    async with running(tokenizer, saying(tokenizer, "sea"), config=config) as server:
        for key in ("k1", "k1", "k2"):
            await server.post("/v1/completions", {"prompt": "x"}, f"authorization: Bearer {key}")
        await server.post("/v1/completions", {"prompt": "x"}, "authorization: Bearer k1", "x-tenant-id: t")
    first, again, other, named = (hints.tenant for hints in server.generator.hints)
    assert first == again != other
    assert named == first + "t"


async def test_headers_say_what_a_request_should_take(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, saying(tokenizer, "sea")) as server:
        await server.post("/v1/completions", {"prompt": "x"}, "X-SLO-TTFT-MS: 1500", "x-slo-tpot-ms: 12.5")
        await server.post("/v1/completions", {"prompt": "x"}, "x-slo-tpot-ms: 40")
        for value in ("", "soon", "0", "-1", "nan", "inf", "é"):
            status, _, refusal = await server.post("/v1/completions", {"prompt": "x"}, f"x-slo-ttft-ms: {value}")
            assert (status, refusal["error"]["param"]) == (400, "x-slo-ttft-ms")
    assert server.generator.hints == [RouteHints(ttft_s=1.5, tpot_s=0.0125), RouteHints(tpot_s=0.04)]
