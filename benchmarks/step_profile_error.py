"""How far a step profile is off between the steps that were measured.

*left out*: a step that was measured is predicted from all the others. *kept*: from all, itself too; what remains is
measurements that contradict each other, such as a larger step that was faster. Mixed steps are predicted from the
prefill and decode curves; what they themselves tell is how much the reading of decodes' KV weighs.

    python -m benchmarks.step_profile_error [NAME_OR_FILE...]
"""

import argparse
import statistics
import timeit
from collections.abc import Sequence
from functools import partial

import msgspec

from baton.step_profiles import load_profile, profile_names
from engine.step_model import StepWork, num_pairs
from engine.step_profile import StepProfile

KINDS = ("prefill", "decode", "mixed")
WORK = StepWork(512, num_pairs(512, 3000), 64, 64 * 2000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profiles", nargs="*", help="names or files (default: those that come with Baton)")
    for name in parser.parse_args().profiles or profile_names():
        profile = load_profile(name)
        seconds = min(timeit.repeat(partial(profile.step_seconds, WORK), number=20_000, repeat=5)) / 20_000
        print(f"{name}: {profile.measured.device}; {1e6 * seconds:.2f} us a prediction of a mixed step")
        for kind in KINDS:
            kept, left_out = errors(profile, kind)
            if kept:
                print(f"  {len(kept):3d} {kind:8s} left out: {summary(left_out)}; kept: {summary(kept)}")


def errors(profile: StepProfile, kind: str) -> tuple[list[float], list[float]]:
    """Relative and absolute: with the step among those measured, and without it."""
    steps = getattr(profile.measured, kind)
    kept, left_out = [], []
    for place, step in enumerate(steps):
        others = [*steps[:place], *steps[place + 1 :]]
        kept.append(abs(profile.step_seconds(step.work) / step.seconds - 1.0))
        if others:
            without = StepProfile(msgspec.structs.replace(profile.measured, **{kind: others}))
            left_out.append(abs(without.step_seconds(step.work) / step.seconds - 1.0))
    return kept, left_out


def summary(values: Sequence[float]) -> str:
    if not values:
        return "-"
    ranked = sorted(values)
    return f"median {statistics.median(ranked):.1%}, p90 {ranked[int(0.9 * len(ranked))]:.1%}, most {ranked[-1]:.1%}"


if __name__ == "__main__":
    main()
