"""The divergence monitor alone: which readings make it act, and how."""

import pytest

from ebm.config import HealthConfig
from ebm.training.divergence import ChainReading, DivergenceMonitor, Reading

CHAINS = ChainReading(gap=0.01, spread=0.02, auc=0.55, saturated=0.2, drift=0.03)


def reading(**chains) -> Reading:
    """Of a healthy run, but for what is given."""
    return Reading(skipped_in_row=0, replicas_agree=True, chains=CHAINS._replace(**chains))


WELL = reading()
BAD = {
    "chains lie below all data": {"auc": 0.0},
    "chains lie above all data": {"auc": 1.0},
    "chains at the bounds": {"saturated": 0.6},
    "steps as large as the domain": {"drift": float("inf")},
    "the energy gap left its history": {"gap": 5.0},
    "the energies are all alike": {"spread": 0.0, "gap": 0.0, "auc": 0.5},
    "the energy is flat": {"drift": 1e-12},
}


def monitor(**settings) -> DivergenceMonitor:
    return DivergenceMonitor(HealthConfig(**settings))


def walk(one: DivergenceMonitor, readings, step: int = 2000) -> list[str]:
    return [one.judge(step + 10 * i, each).action for i, each in enumerate(readings)]


def test_a_healthy_run_is_left_alone():
    one = monitor()
    varied = [reading(gap=0.01 * (i % 7 - 3), auc=0.3 + 0.01 * (i % 40)) for i in range(500)]
    assert set(walk(one, varied)) == {"go on"}
    assert one.good and one.warning < 0.5 and (one.lr_scale, one.step_scale, one.rollbacks) == (1, 1, 0)


@pytest.mark.parametrize("sign", BAD)
def test_each_sign_alone_leads_to_a_cut_a_rollback_and_in_the_end_a_stop(sign):
    one = monitor(max_rollbacks=2)
    assert set(walk(one, [WELL] * 30)) == {"go on"}
    actions = []
    while "stop" not in actions:
        verdict = one.judge(2000, reading(**BAD[sign]))
        assert one.warning >= 1 and not one.good
        if verdict.action != "go on":
            assert sign in verdict.reason
            actions.append(verdict.action)
        if verdict.action == "roll back":
            walk(one, [WELL] * 22)
    assert actions == ["cut", "roll back", "cut", "roll back", "cut", "stop"]


def test_what_an_earlier_state_alone_can_mend_cuts_nothing_the_first_time():
    for broken in (WELL._replace(skipped_in_row=20), WELL._replace(replicas_agree=False)):
        one = monitor()
        assert walk(one, [WELL, broken]) == ["go on", "roll back"]
        assert (one.lr_scale, one.step_scale, one.rollbacks) == (1, 1, 1)
        assert walk(one, [broken]) == ["roll back"] and one.lr_scale == pytest.approx(0.1)


def test_without_the_ladder_the_first_trouble_ends_the_run_with_its_reason():
    one = monitor(ladder=False)
    verdicts = [one.judge(2000 + i, reading(auc=0.0)) for i in range(5)]
    assert [v.action for v in verdicts] == ["go on"] * 4 + ["stop"]
    assert "chains lie below all data" in verdicts[-1].reason
    assert monitor(ladder=False).judge(9, WELL._replace(replicas_agree=False)).action == "stop"


def test_a_cut_that_helps_is_the_end_of_it_and_the_rate_comes_back_to_half():
    one = monitor()
    assert walk(one, [reading(auc=0.0)] * 3)[-1] == "cut" and one.lr_scale == pytest.approx(0.1)
    assert set(walk(one, [WELL] * 99)) == {"go on"} and one.lr_scale == pytest.approx(0.1)
    walk(one, [WELL])
    assert (one.lr_scale, one.step_scale, one.cuts) == (0.5, 1, 0)


def test_cuts_try_the_rate_then_the_chain_then_both():
    one, scales = monitor(), []
    for _ in range(4):
        assert walk(one, [reading(auc=0.0)] * 5)[2:] == ["cut", "go on", "roll back"]
        scales.append((one.lr_scale, one.step_scale))
    assert scales == [pytest.approx(s) for s in [(0.1, 1), (1, 0.1), (0.1, 0.1), (0.01, 0.01)]]


@pytest.mark.parametrize("auc", [0.0, 1.0])
def test_an_untrained_energy_may_tell_noise_from_data(auc):
    one = monitor(grace=500)
    assert set(walk(one, [reading(auc=auc)] * 50, step=0)) == {"go on"} and one.warning < 1


def test_chains_below_all_data_count_from_the_first_step_beside_another_sign():
    one = monitor(grace=500)
    assert walk(one, [reading(auc=0.0, saturated=0.3)] * 10, step=10)[8:] == ["go on", "roll back"]


def test_what_diverges_within_grace_starts_again_with_smaller_steps():
    one, scales = monitor(grace=500), []
    for _ in range(3):
        assert walk(one, [reading(saturated=0.6)] * 10, step=10) == ["go on"] * 9 + ["roll back"]
        scales.append((one.lr_scale, one.step_scale))
    assert scales == [pytest.approx(s) for s in [(0.1, 1), (1, 0.1), (0.1, 0.1)]]


def test_a_check_far_beyond_its_limit_counts_for_more():
    assert walk(monitor(), [reading(drift=0.6)] * 3) == ["go on", "go on", "cut"]
    assert walk(monitor(), [reading(drift=6)] * 2) == ["go on", "cut"]
    assert walk(monitor(), [reading(drift=60)]) == ["cut"]


def test_a_skipped_step_says_nothing_about_the_energies():
    one, skipped = monitor(), Reading(skipped_in_row=1, replicas_agree=True, chains=None)
    assert set(walk(one, [WELL, skipped] * 40)) == {"go on"}
    assert one.warning < 1 and len(one.gaps) == 40 and one.healthy == 40


def test_bad_checks_now_and_then_are_forgotten():
    one = monitor()
    assert set(walk(one, [reading(auc=0.0), WELL, WELL] * 30)) == {"go on"}


def test_a_state_is_good_when_the_trouble_before_it_is_forgotten():
    one = monitor()
    walk(one, [reading(drift=60)] + [WELL] * 5)
    assert not one.good
    walk(one, [WELL])
    assert one.good


def test_the_state_of_a_checkpoint_decides_as_the_run_itself():
    one = monitor()
    readings = [reading(auc=0.0 if i % 5 < 4 else 0.5, gap=0.001 * i) for i in range(60)]
    walk(one, readings[:33])
    other = monitor()
    other.load(one.state())
    assert walk(one, readings[33:]) == walk(other, readings[33:])
    assert one.state() == other.state() and one.rollbacks > 0


def test_an_objective_without_chains_is_judged_by_its_weights_and_gradients():
    one, bare = monitor(), Reading(skipped_in_row=0, replicas_agree=True, chains=None)
    assert set(walk(one, [bare] * 40)) == {"go on"} and one.good and one.gaps == []
    assert walk(one, [bare._replace(skipped_in_row=20)]) == ["roll back"]
