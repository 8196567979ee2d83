"""FedAvg-M, SCAFFOLD-M, FedSpeed and FedNova against their papers' equations in plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from in_process import SILOS, small_config, train_small

from fedpriv.errors import InputError
from fedpriv.federation.builders import build_algorithm, build_trainer
from fedpriv.models.parameters import Layout, parameters_of
from fedpriv.models.registry import build_model
from fedpriv.privacy import Ledger, Purpose, Randomness
from fedpriv.privacy.randomness import id_words
from fedpriv.reporting.report import render
from fedpriv.training.local import batches

LR, STEPS, BETA, PENALTY, ASCENT = 0.2, 3, 0.3, 4.0, 0.05
PLAIN = {
    "rounds": 3,
    "local": {"steps": STEPS, "batch_size": 2, "lr": LR},
    "server": {"optimizer": "sgd", "lr": 1.0},
    "privacy": None,
    "cohort": 10.0,
}
SPEED = {"name": "fedspeed", "penalty": PENALTY, "ascent": ASCENT}
#: What a config says; the bounds are for its payloads beside the update, with privacy.
NAMED = {
    "fedavg_m": {"name": "fedavg_m", "beta": BETA},
    "scaffold_m": {"name": "scaffold_m", "beta": BETA},
    "fedspeed": SPEED,
    "fedspeed, perturbed": {**SPEED, "alpha": 0.6},
    "fedspeed, a unit uphill": {**SPEED, "alpha": 0.6, "unit_ascent": True},
    "fednova": {"name": "fednova", "effective_steps": 2.5},
}
BOUNDS = {"scaffold_m": {"control": 0.5}}


class Paper:
    """Every user alone, in float64, from the same cohorts and batches."""

    def __init__(self, prepared):
        self.prepared, config = prepared, prepared.config
        self.dataset, self.n = prepared.trainer.dataset, prepared.trainer.dataset.population
        shape, classes = self.dataset.input_shape, self.dataset.classes
        self.model = build_model(config.model, shape, classes, config.seed).double()
        self.layout, self.source = Layout.of(self.model), Randomness.simulation(config.seed)
        self.x = self.layout.join(parameters_of(self.model))
        self.cohort = prepared.plan.sampling.expected_cohort

    def drawn(self, round_):
        generator = self.prepared.plan.randomness.numpy(Purpose.SAMPLING, round_, 0)
        return self.prepared.plan.sampling.draw(generator).tolist()

    def steps(self, user, round_):
        """The loss's gradient of each local step, as a function of where the user is."""
        examples = self.dataset.user(user)
        order = self.source.torch(Purpose.LOCAL_TRAINING, round_, 0, *id_words(f"user-{user}"))
        shared = self.source.torch(Purpose.STEP_ORDER, round_)
        for index in batches(examples.sizes, self.prepared.trainer.recipe, order, shared):

            def gradient(y, index=index):
                y = y.detach().requires_grad_()
                inputs = examples.inputs[index].double()
                outputs = torch.func.functional_call(self.model, self.layout.split(y), inputs)
                loss = F.cross_entropy(outputs, examples.targets[index])
                return torch.autograd.grad(loss, y)[0]

            yield gradient


def fedavg_m(paper, rounds):
    """Cheng et al. 2024, FedAvg-M with γ = ηK."""
    g = torch.zeros_like(paper.x)
    for round_ in range(1, rounds + 1):
        moved = torch.zeros_like(paper.x)
        for user in paper.drawn(round_):
            y = paper.x.clone()
            for gradient in paper.steps(user, round_):
                y = y - LR * (BETA * gradient(y) + (1 - BETA) * g)
            moved += paper.x - y
        g = moved / paper.cohort / (LR * STEPS)
        paper.x = paper.x - LR * STEPS * g
    return paper.x, g


def scaffold_m(paper, rounds):
    """Cheng et al. 2024, SCAFFOLD-M with γ = ηK."""
    g, c = torch.zeros(2, len(paper.x), dtype=torch.float64)
    own = torch.zeros(paper.n, len(paper.x), dtype=torch.float64)
    for round_ in range(1, rounds + 1):
        moved, changed = torch.zeros_like(paper.x), torch.zeros_like(paper.x)
        for user in paper.drawn(round_):
            y, gradients = paper.x.clone(), []
            for gradient in paper.steps(user, round_):
                gradients.append(gradient(y))
                y = y - LR * (BETA * (gradients[-1] - own[user] + c) + (1 - BETA) * g)
            plus = torch.stack(gradients).mean(0)
            moved, changed = moved + paper.x - y, changed + plus - own[user]
            own[user] = plus
        g = moved / paper.cohort / (LR * STEPS)
        paper.x = paper.x - LR * STEPS * g
        c = c + changed / paper.n
    return paper.x, g


def fedspeed(paper, rounds, alpha=0.0, unit=False):
    """Sun et al. 2023; `unit` as in the authors' code."""
    own = torch.zeros(paper.n, len(paper.x), dtype=torch.float64)
    for round_ in range(1, rounds + 1):
        total = torch.zeros_like(paper.x)
        for user in paper.drawn(round_):
            y = paper.x.clone()
            for gradient in paper.steps(user, round_):
                first = gradient(y)
                uphill = ASCENT / first.norm() if unit else ASCENT
                mixed = (1 - alpha) * first + alpha * gradient(y + uphill * first)
                y = y - LR * (mixed - own[user] + (y - paper.x) / PENALTY)
            own[user] = own[user] - (y - paper.x) / PENALTY
            total += paper.x - (y - PENALTY * own[user])
        paper.x = paper.x - total / paper.cohort
    return paper.x, own


def fednova(paper, rounds):
    """Wang et al. 2020, users of one weight."""
    for round_ in range(1, rounds + 1):
        total = torch.zeros_like(paper.x)
        for user in paper.drawn(round_):
            y, taken = paper.x.clone(), 0
            for gradient in paper.steps(user, round_):
                y, taken = y - LR * gradient(y), taken + 1
            total += 2.5 * (paper.x - y) / taken
        paper.x = paper.x - total / paper.cohort
    return paper.x, None


PAPERS = {
    "fedavg_m": fedavg_m,
    "scaffold_m": scaffold_m,
    "fedspeed": fedspeed,
    "fedspeed, perturbed": lambda paper, rounds: fedspeed(paper, rounds, alpha=0.6),
    "fedspeed, a unit uphill": lambda paper, n: fedspeed(paper, n, alpha=0.6, unit=True),
    "fednova": fednova,
}


@pytest.mark.parametrize("engine", ["stacked", "sequential"])
@pytest.mark.parametrize("name", sorted(NAMED))
def test_rounds_are_those_of_the_paper(tmp_path, name, engine):
    changes = {**PLAIN, "algorithm": NAMED[name], "runtime__engine": engine}
    if name == "fednova":  # users of other numbers of steps
        changes |= {"data__partition": {"kind": "dirichlet"}, "data__examples_per_user": None}
        changes["local"] = {"epochs": 1, "batch_size": 2, "lr": LR}
    _, prepared = train_small(tmp_path / "run", **changes)
    x, kept = PAPERS[name](Paper(prepared), 3)
    found = prepared.server.parameters().double()
    torch.testing.assert_close(found, x, rtol=1e-6, atol=1e-6)
    if name.endswith("_m"):
        torch.testing.assert_close(prepared.server.shared[-1].double(), kept, rtol=1e-4, atol=1e-5)
        assert kept.norm() > 0.01


def test_a_weight_of_one_is_the_method_without_momentum(tmp_path):
    ends = []
    for name in ("fedavg", "fedavg_m", "scaffold", "scaffold_m"):
        algorithm = {"name": name} | ({"beta": 1.0} if name.endswith("_m") else {})
        changes = {**PLAIN, "cohort": None, "algorithm": algorithm}
        ends.append(train_small(tmp_path / name, **changes)[1].server.parameters())
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(ends[2], ends[3], rtol=0, atol=1e-6)
    assert (ends[0] - ends[2]).norm() > 1e-4


@pytest.mark.parametrize("name", sorted(NAMED))
def test_each_trains_with_privacy_at_the_price_of_fedavg(tmp_path, name):
    algorithm = NAMED[name] | {"bounds": BOUNDS.get(name, {})}
    changes = {"algorithm": algorithm, "local": {**PLAIN["local"], "lr": 0.1}, "rounds": 2}
    directory, prepared = train_small(tmp_path / "run", **changes)
    _, plain = train_small(tmp_path / "plain", **{**changes, "algorithm": {"name": "fedavg"}})
    assert prepared.plan.planned_cost() == plain.plan.planned_cost()
    for release in Ledger.open(directory.ledger):
        assert release.noise_multiplier == 1.0
    algorithm = prepared.trainer.algorithm
    text = render([directory.path], "md")
    if algorithm.keeps:
        assert algorithm.cite in text
    assert (directory.path / "memory").is_dir() == algorithm.keeps
    assert ("In the folder memory: what users keep" in text) == algorithm.keeps


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"local": {"epochs": 1, "batch_size": 4}}, r"local\.steps: null: .*must be one for all"),
        ({"local__momentum": 0.5}, r"local\.momentum"),
        ({"local__schedule": {"kind": "cosine"}}, r"local\.schedule"),
        (SILOS, r"no proof with privacy\.unit: example"),
    ],
    ids=["epochs", "momentum", "schedule", "silos"],
)
@pytest.mark.parametrize("name", ["fedavg_m", "scaffold_m"])
def test_what_has_no_meaning_is_refused(name, changes, reason):
    algorithm = NAMED[name] | {"bounds": BOUNDS.get(name, {})}
    with pytest.raises(InputError, match=reason):
        build_trainer(small_config(**{"local__steps": 2, "algorithm": algorithm} | changes))


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("fednova", SILOS, r"no proof with privacy\.unit: example"),
        (
            "fednova",
            {"privacy__error_feedback": {"kind": "user"}},
            r"privacy\.error_feedback: user",
        ),
        ("fednova", {"local__optimizer": "adam"}, r"local\.optimizer"),
        (
            "fedspeed",
            {"privacy__sampling": {"kind": "fixed_size", "expected_cohort": 8}},
            r"privacy\.sampling\.kind: fixed_size",
        ),
    ],
    ids=str,
)
def test_what_has_no_proof_is_refused(name, changes, reason):
    with pytest.raises(InputError, match=reason):
        build_trainer(small_config(**{"algorithm": NAMED[name]} | changes))


def test_directions_of_the_server_go_with_noise_of_any_kind():
    """They follow from releases: no payload, nothing kept."""
    named = {"algorithm": NAMED["fedavg_m"], "local__steps": 2}
    for changes in (
        {"privacy__noise_by": "nodes"},
        {"privacy__clipping": {"kind": "adaptive", "bound": 0.1}},
        {"privacy__error_feedback": {"kind": "user"}},
    ):
        assert build_algorithm(small_config(**named, **changes)).travel == pytest.approx(0.06)
