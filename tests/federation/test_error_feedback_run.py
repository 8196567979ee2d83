"""Whole runs in which users keep memories, against a plain loop and against themselves."""

import math
import shutil

import numpy as np
import pytest
import torch
from in_process import InProcessGrid, resume_small, small_config, train_small

from fedpriv import experiment
from fedpriv.data.registry import build_dataset
from fedpriv.errors import InputError, WorkerLost
from fedpriv.federation.strategy import PrivateFedAvg
from fedpriv.models.parameters import Layout, parameters_of
from fedpriv.models.registry import build_model
from fedpriv.privacy import Dice, Ledger, Purpose, Randomness, Remainder
from fedpriv.privacy.randomness import id_words
from fedpriv.tasks.classification import Classification
from fedpriv.training.local import batches, train_user
from fedpriv.training.memory_store import Journal, Memories

TIGHT = {"privacy__clipping__bound": 0.02}


def memories_of(folder, users: int = 60) -> torch.Tensor:
    """Everybody's memory after the run."""
    found = Memories(folder / "memory", 0)
    with found.round(Journal(10_000, 0, 0, 0)) as access:
        everybody = access.read(list(range(users)))
    (folder / "memory" / Journal(10_000, 0, 0, 0).file).unlink()
    return everybody


def clipped(vector: np.ndarray, sizes: list[int], rule: dict) -> np.ndarray:
    """Clip by the textbook, in float64."""
    if rule["kind"] == "global":
        return vector * min(1.0, rule["bound"] / max(np.linalg.norm(vector), 1e-300))
    parts = np.split(vector, np.cumsum(sizes)[:-1])
    bounds = [rule["bound"] * math.sqrt(size / sum(sizes)) for size in sizes]
    return np.concatenate(
        [
            part * min(1.0, bound / max(np.linalg.norm(part), 1e-300))
            for part, bound in zip(parts, bounds, strict=True)
        ]
    )


def plain_loop(config) -> tuple[torch.Tensor, np.ndarray]:
    """Train without noise, each user alone, memories in a dict; SGD of rate 1 at the server."""
    privacy = config.privacy
    rule, feedback = privacy.clipping.model_dump(), privacy.error_feedback
    second = {**rule, "bound": feedback.memory_bound or rule["bound"]}
    dataset = build_dataset(config.data, config.seed)
    model = build_model(config.model, dataset.input_shape, dataset.classes, config.seed)
    layout, plan = Layout.of(model), experiment.prepare(config).plan
    recipe = experiment.prepare(config).trainer.recipe
    start = layout.join(parameters_of(model)).clone()
    memory = np.zeros((dataset.population, layout.total))
    for round_ in range(1, config.rounds + 1):
        cohort = plan.sampling.draw(plan.randomness.numpy(Purpose.SAMPLING, round_, 0))
        total = np.zeros(layout.total)
        for user in cohort.tolist():
            source = Randomness.simulation(config.seed)
            own = source.torch(Purpose.LOCAL_TRAINING, round_, 0, *id_words(f"user-{user}"))
            shared = source.torch(Purpose.STEP_ORDER, round_)
            examples = dataset.user(user)
            steps = [examples.take(index) for index in batches(examples.sizes, recipe, own, shared)]
            result = train_user(model, layout.split(start), steps, recipe, Classification())
            update, old = layout.join(result.update).double().numpy(), memory[user]
            if feedback.variant == "remainder":
                sent = clipped(update + feedback.decay * old, layout.sizes, rule)
            else:
                sent = clipped(update, layout.sizes, rule)
                sent = sent + clipped(feedback.decay * old, layout.sizes, second)
            kept = update + feedback.decay * old - sent
            if feedback.norm_cap is not None:
                kept *= min(1.0, feedback.norm_cap / max(np.linalg.norm(kept), 1e-300))
            memory[user] = kept
            total += sent
        average = total / plan.sampling.expected_cohort
        start = start - torch.from_numpy(average).float()
    return start, memory


@pytest.mark.parametrize("engine", ["stacked", "sequential"])
@pytest.mark.parametrize(
    ("kind", "feedback"),
    [
        ("global", "user"),
        ("per_layer", {"kind": "user", "decay": 0.7, "norm_cap": 0.2}),
        ("per_layer", {"kind": "user", "variant": "dice", "memory_bound": 0.01}),
        ("global", "dice"),
    ],
)
def test_both_engines_equal_a_plain_loop_over_all_rounds(tmp_path, engine, kind, feedback):
    changes = {
        **TIGHT,
        "privacy__clipping__kind": kind,
        "privacy__error_feedback": feedback,
        "privacy__noise_multiplier": 0.0,
        "privacy__sampling__expected_cohort": 30,
        "server": {"optimizer": "sgd", "lr": 1.0},
        "runtime__engine": engine,
    }
    directory, run = train_small(tmp_path / "run", **changes)
    expected, memories = plain_loop(small_config(**changes))
    torch.testing.assert_close(run.server.parameters(), expected, rtol=0, atol=1e-5)
    found = memories_of(directory.path)
    torch.testing.assert_close(found.double(), torch.from_numpy(memories), rtol=0, atol=1e-5)
    assert found.norm(dim=1).max() > 0.02  # it is about memories that matter
    seen = directory.read_metrics()[-1]["simulation_only"]
    assert seen["memory_norm"] > 0
    assert seen["memory_reset"] == 0


def test_the_mechanism_bounds_what_users_send(tmp_path):
    for feedback, bound in (("user", 0.02), ({"kind": "user", "variant": "dice"}, 0.04)):
        changes = {**TIGHT, "privacy__error_feedback": feedback}
        directory, run = train_small(tmp_path / f"{bound}", rounds=1, **changes)
        assert run.plan.mechanism.gaussian.clipping.bound == pytest.approx(bound)
        assert run.plan.mechanism.gaussian.stddev == pytest.approx(bound)
        assert [r.bound for r in Ledger.open(directory.ledger)] == [pytest.approx(bound)]
    assert isinstance(run.trainer.feedback, Dice)
    assert experiment.prepare(small_config()).trainer.feedback is None


def test_a_memory_costs_what_a_run_without_one_costs(tmp_path):
    plain, _ = train_small(tmp_path / "plain", rounds=2)
    keeping, _ = train_small(tmp_path / "keeping", rounds=2, privacy__error_feedback="user")
    costs = [[row["epsilon"] for row in run.read_metrics()] for run in (plain, keeping)]
    assert costs[0] == costs[1]


@pytest.mark.parametrize("adapts", ["global", "per_layer"])
def test_adaptive_bounds_count_update_and_memory_together(tmp_path, adapts):
    changes = {
        "privacy__sampling__expected_cohort": 30,
        "privacy__clipping": {
            "kind": "adaptive",
            "bound": 1e-3,
            "adapts": adapts,
            "adapt_lr": 1.0,
        },
        "privacy__error_feedback": "user",
    }
    directory, run = train_small(tmp_path / "run", **changes)
    bounds = [row["clip_bound"] for row in directory.read_metrics()]
    assert bounds[-1] > bounds[0]
    expected = experiment.prepare(small_config(**changes))
    assert run.plan.planned_cost().epsilon == expected.plan.planned_cost().epsilon
    assert memories_of(directory.path).norm(dim=1).max() > 0


def test_users_keep_theirs_whatever_the_number_of_workers(tmp_path):
    changes = {**TIGHT, "privacy__error_feedback": "user"}
    directory, two = train_small(tmp_path / "two", InProcessGrid(2), **changes)
    other, three = train_small(tmp_path / "three", InProcessGrid(3), **changes, runtime__workers=3)
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(two.server.parameters(), three.server.parameters(), **close)
    torch.testing.assert_close(memories_of(directory.path), memories_of(other.path), **close)


def test_a_run_that_stopped_goes_on_with_other_workers(tmp_path):
    changes = {**TIGHT, "privacy__error_feedback": "user"}
    whole, _ = train_small(tmp_path / "whole", **changes)
    with pytest.raises(WorkerLost):
        train_small(tmp_path / "run", StopsAfter(2), **changes)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("workers: 2", "workers: 5"))
    directory, _ = resume_small(tmp_path / "run", InProcessGrid(5))
    torch.testing.assert_close(
        memories_of(directory.path), memories_of(whole.path), rtol=0, atol=1e-5
    )


class StopsAfter(InProcessGrid):
    """Its nodes go away after some rounds."""

    def __init__(self, rounds: int) -> None:
        super().__init__()
        self.rounds = rounds

    def push_messages(self, messages):
        messages = list(messages)
        if any(m.content["config"].get("round", 0) > self.rounds for m in messages):
            raise WorkerLost("gone")
        return super().push_messages(messages)


class LosesReplies(InProcessGrid):
    """Node 1 does all of its work, and what it answers is lost."""

    def answer(self, message):
        reply = super().answer(message)
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 1001:
            self.dead.add(1)
            return super().answer(message)
        return reply


def test_users_whose_sum_was_lost_keep_what_they_had(tmp_path):
    changes = {**TIGHT, "privacy__error_feedback": "user", "rounds": 1}
    changes["privacy__sampling__expected_cohort"] = 40
    directory, run = train_small(tmp_path / "run", LosesReplies(), **changes)
    assert directory.read_metrics()[0]["nodes_lost"] == 1
    found = memories_of(directory.path)
    cohort = run.plan.sampling.draw(run.plan.randomness.numpy(Purpose.SAMPLING, 1, 0))
    assert found[cohort[cohort % 2 == 0]].any(dim=1).all()
    assert not found[1::2].any()


def test_an_attempt_that_was_given_up_leaves_no_memory(tmp_path, monkeypatch):
    """A repeated round whose sum has changed draws another cohort: the first one's is forgotten."""
    changes = {**TIGHT, "privacy__error_feedback": "user", "rounds": 2}
    with monkeypatch.context() as patched:
        paid = PrivateFedAvg._paid_release

        def crash(self, *args):
            released = paid(self, *args)
            if self.next_round == 2:
                raise RuntimeError("crash")
            return released

        patched.setattr(PrivateFedAvg, "_paid_release", crash)
        with pytest.raises(RuntimeError, match="crash"):
            train_small(tmp_path / "run", **changes)
    before = memories_of(tmp_path / "run")
    with monkeypatch.context() as patched:
        noisy, calls = PrivateFedAvg._noisy, []

        def changed(self, total, *rest):
            calls.append(1)
            return noisy(self, total * (1 + 1e-12 * (len(calls) == 1)), *rest)

        patched.setattr(PrivateFedAvg, "_noisy", changed)
        directory, resumed = resume_small(tmp_path / "run")
    assert [(r.round, r.attempt) for r in Ledger.open(directory.ledger)][1:] == [(2, 0), (2, 1)]
    first, second = (
        set(resumed.plan.sampling.draw(resumed.plan.randomness.numpy(Purpose.SAMPLING, 2, attempt)))
        for attempt in (0, 1)
    )
    assert first - second
    after = memories_of(tmp_path / "run")
    for user in range(60):
        assert after[user].equal(before[user]) == (user not in second)


def test_a_run_whose_memories_were_removed_is_refused(tmp_path):
    with pytest.raises(WorkerLost):
        train_small(tmp_path / "run", StopsAfter(2), privacy__error_feedback="user")
    shutil.rmtree(tmp_path / "run" / "memory")
    with pytest.raises(InputError, match="the memories after round 2 cannot be made"):
        resume_small(tmp_path / "run")


def test_a_run_without_error_feedback_is_what_it_always_was():
    """Its noise derives from the fingerprint, which an unused key must not change."""
    base = small_config()
    assert small_config(privacy__error_feedback="none").fingerprint("") == base.fingerprint("")
    user = small_config(privacy__error_feedback="user").fingerprint("")
    assert user != base.fingerprint("")
    ram = small_config(privacy__error_feedback={"kind": "user", "ram_mib": 1}).fingerprint("")
    assert ram == user
    for changes in ({"decay": 0.5}, {"variant": "dice"}, {"norm_cap": 1.0}, {"dtype": "bfloat16"}):
        feedback = {"kind": "user", **changes}
        assert small_config(privacy__error_feedback=feedback).fingerprint("") != user


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {
                "privacy__error_feedback": "user",
                "privacy__sampling": {"kind": "fixed_size", "expected_cohort": 5},
            },
            "no proof with fixed_size sampling, where who else is sampled depends on",
        ),
        (
            {
                "privacy__error_feedback": "dice",
                "privacy__clipping": {"kind": "adaptive", "bound": 1.0},
            },
            "dice has two bounds",
        ),
        ({"privacy__error_feedback": "user", "runtime__deployment": True}, "a deployment's nodes"),
        ({"privacy__error_feedback": "silo"}, "write none, user or dice, or a section"),
        ({"privacy__error_feedback": {"decay": 0.5}}, "decay goes with kind: user only"),
        (
            {"privacy__error_feedback": {"kind": "user", "memory_bound": 1.0}},
            "memory_bound goes with variant: dice only",
        ),
        ({"privacy__error_feedback": {"kind": "user", "decay": 1.5}}, r"error_feedback\.decay: "),
    ],
)
def test_what_has_no_proof_or_no_sense_is_refused(changes, line):
    with pytest.raises(InputError, match=line) as caught:
        small_config(**changes)
    assert "\n" not in str(caught.value)


def test_short_and_long_forms_mean_the_same():
    short = small_config(privacy__error_feedback="dice").privacy.error_feedback
    long = {"kind": "user", "variant": "dice"}
    assert short == small_config(privacy__error_feedback=long).privacy.error_feedback
    assert small_config(privacy__error_feedback="none") == small_config()


def test_everybody_may_take_part_in_every_round(tmp_path):
    changes = {"rounds": 2, "privacy__error_feedback": "user", "privacy__sampling": {"kind": "all"}}
    directory, run = train_small(tmp_path / "run", **TIGHT, **changes)
    assert isinstance(run.trainer.feedback, Remainder)
    assert memories_of(directory.path).any(dim=1).all()
    rows = [row["simulation_only"] for row in directory.read_metrics()]
    assert [row["cohort"] for row in rows] == [60, 60]
    assert rows[1]["memory_norm"] > rows[0]["memory_norm"] > 0
