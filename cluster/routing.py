"""The router's policy and limits, from a spec: the same for a real router and for a simulated one."""

from cluster.spec import RouterSpec, SloSpec
from router.admission import AdmissionConfig
from router.placement import PlacementConfig
from router.policies import ANSWER_PRICE, TPOT_S, LeastLoaded, PrefixAware, RoundRobin, RoutingPolicy, price_of_answers


def make_policy(router: RouterSpec, slo: SloSpec | None = None) -> RoutingPolicy:
    """`slo`: the limits that answers are priced by, where those are not the router's own, by which it refuses, too."""
    match router.policy:
        case "round_robin":
            return RoundRobin()
        case "least_loaded":
            return LeastLoaded()
        case "prefix_aware":
            return _prefix_aware(router, slo or router.slo)


def _prefix_aware(router: RouterSpec, slo: SloSpec) -> PrefixAware:
    price = router.answer_price
    if price is None and slo.ttft_s is not None and slo.tpot_s is not None:
        price = price_of_answers(slo.ttft_s, slo.tpot_s)
    return PrefixAware(router.local_prefill_max_tokens, price or ANSWER_PRICE, slo.tpot_s or TPOT_S)


def placement_config(router: RouterSpec) -> PlacementConfig:
    return PlacementConfig(AdmissionConfig(router.max_queue, router.max_running))
