"""The router's policy and limits, from a spec: the same for a real router and for a simulated one."""

from cluster.spec import RouterSpec
from router.admission import AdmissionConfig
from router.placement import PlacementConfig
from router.policies import ANSWER_PRICE, LeastLoaded, PrefixAware, RoundRobin, RoutingPolicy, price_of_answers


def make_policy(router: RouterSpec) -> RoutingPolicy:
    match router.policy:
        case "round_robin":
            return RoundRobin()
        case "least_loaded":
            return LeastLoaded()
        case "prefix_aware":
            return PrefixAware(router.local_prefill_max_tokens, _answer_price(router))


def _answer_price(router: RouterSpec) -> float:
    slo = router.slo
    if router.answer_price is None and slo.ttft_s is not None and slo.tpot_s is not None:
        return price_of_answers(slo.ttft_s, slo.tpot_s)
    return router.answer_price or ANSWER_PRICE


def placement_config(router: RouterSpec) -> PlacementConfig:
    return PlacementConfig(AdmissionConfig(router.max_queue, router.max_running))
