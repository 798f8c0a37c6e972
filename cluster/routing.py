"""The router's policy and limits, from a spec: the same for a real router and for a simulated one."""

from cluster.spec import RouterSpec
from router.admission import AdmissionConfig
from router.placement import PlacementConfig
from router.policies import LeastLoaded, PrefixAware, RoundRobin, RoutingPolicy


def make_policy(router: RouterSpec) -> RoutingPolicy:
    match router.policy:
        case "round_robin":
            return RoundRobin()
        case "least_loaded":
            return LeastLoaded()
        case "prefix_aware":
            return PrefixAware(local_prefill_max_tokens=router.local_prefill_max_tokens)


def placement_config(router: RouterSpec) -> PlacementConfig:
    return PlacementConfig(AdmissionConfig(max_queue=router.max_queue))
