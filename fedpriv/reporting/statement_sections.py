"""The sections of a privacy statement: what each says of a run, by its ledger and config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import version

from fedpriv.algorithms.registry import make_algorithm
from fedpriv.counting import numbered
from fedpriv.privacy.advice import LARGE_DELTA, REASONABLE, STRONG
from fedpriv.privacy.clipping_rules import AdaptiveOptions, GlobalOptions, PerLayerOptions
from fedpriv.privacy.figures import epsilon_text
from fedpriv.privacy.mechanisms.base import HOSTED, Facts
from fedpriv.privacy.mechanisms.gaussian import EXACT_SUMS
from fedpriv.privacy.sampling import Adjacency
from fedpriv.reporting.choice import UNTOLD
from fedpriv.reporting.data_statement import (
    an_example,
    held_out_sentence,
    start_sentences,
    who_users_are,
)
from fedpriv.reporting.reader import Run
from fedpriv.reporting.spent import Spent
from fedpriv.reporting.statement_users import sent_and_kept
from fedpriv.reporting.wording import named_rounds


@dataclass(frozen=True)
class Section:
    """One question that a privacy claim must answer, and its answer.

    Attributes:
        key: its anchor.
        label: the question in a few words.
        sentences: the answer.
    """

    key: str
    label: str
    sentences: tuple[str, ...]


def sections_of(run: Run, account: Spent) -> tuple[Section, ...]:
    """Return the sections of the statement of `run`, in their order."""
    always = [
        Section("unit", "Unit of privacy", _unit(run)),
        Section("trust", "Trust model: who sees what", _NO_TRUST),
        Section("mechanism", "Mechanism", _NO_NOISE),
        Section("sampling", "Sampling, as it was run", _sampling(run)),
        Section("releases", "Every release", _releases(run, account)),
        Section("start", "What the training started from", start_sentences(run)),
        Section("randomness", "Seeds", _randomness(run)),
        Section("logged", "What else was logged", _logged(run)),
        Section("verification", "How to check this", _verification(run)),
    ]
    if run.header.outside:
        always.insert(2, Section("outside", "Code from outside", _outside(run)))
    if not run.private or run.delta is None:
        return tuple(always)
    promised = [
        Section("adjacency", "Adjacency", _adjacency(run)),
        Section("accounting", "Accounting", _accounting(run, account)),
        Section("delta", "δ", _delta(run.delta, run.header.population)),
        Section("tuning", "Hyper-parameters", _tuning(run)),
        Section("floating-point", "Floating point and generators", _floating_point(run)),
    ]
    ordered = tuple(sorted(always + promised, key=lambda section: _ORDER.index(section.key)))
    own = run.mechanism.sentences(_facts(run, account, run.delta))
    return tuple(
        replace(section, sentences=own.get(section.key, section.sentences)) for section in ordered
    )


def _facts(run: Run, account: Spent, delta: float) -> Facts:
    """Return what the mechanism may say of the run."""
    example = run.config.privacy.example if run.config.privacy else None
    return Facts(
        release=run.releases[-1],
        sampling=run.sampling,
        adjacency=run.adjacency,
        population=run.header.population,
        delta=delta,
        deployed=run.deployed,
        seed=run.config.seed,
        optimizer=run.config.server_step,
        update=_clipping(run, "update"),
        gradient=_clipping(run, "gradient"),
        feedback=sent_and_kept(run),
        who=who_users_are(run),
        example=an_example(run),
        silo_size=example.silo_size if example else None,
        costs=account.costs,
        adversaries=account.adversaries,
        noise_from_outside=any(
            line.startswith("privacy.mechanism: ") for line in run.header.outside
        ),
        of_trials=bool(run.trial),
    )


def _outside(run: Run) -> tuple[str, ...]:
    """Say what is not fedpriv's own, and what that leaves open."""
    open_questions = {
        "data": "That what a user holds does not depend on who else is there is for the data set's "
        "author to say: ε takes it for granted.",
        "model": "That a model keeps nothing of one user for the next was checked of what its "
        "state says, and of nothing that its code may hide.",
        "privacy.clipping": "The clipping rule is shown one user's norms at a time, and its "
        "factors are shrunk where they would lift a contribution above C: the bound does not rest "
        "on it.",
        "privacy.mechanism": "Its noise was drawn on trial before the run and found to be as large "
        "as recorded and Gaussian, as far as a trial can tell: that finds mistakes and proves "
        "nothing. ε takes for granted that it was so in every round.",
        "server.normalize": "The normaliser sees the noisy average alone: what it does is "
        "post-processing.",
        "server.optimizer": "The optimizer sees the noisy average alone: what it does is "
        "post-processing.",
    }
    if not run.private:  # nothing was drawn on trial
        del open_questions["privacy.mechanism"]
    named = [line.partition(": ")[0] for line in run.header.outside]
    return (
        *(f"Not fedpriv's own: {line}." for line in run.header.outside),
        "Without that code nobody can tell whether config.yaml is the one that the ledger was "
        "charged under: a report does not import it, and did not check.",
        *(open_questions[key] for key in named if key in open_questions),
    )


# The order in which a reader asks; without a promise some of the questions fall away.
_ORDER = (
    "unit",
    "outside",
    "adjacency",
    "trust",
    "mechanism",
    "sampling",
    "releases",
    "start",
    "accounting",
    "delta",
    "tuning",
    "randomness",
    "floating-point",
    "logged",
    "verification",
)


def _unit(run: Run) -> tuple[str, ...]:
    if not run.private:
        return (
            f"None. The data of {numbered(run.header.population, 'user')} were used unprotected.",
        )
    return (
        f"One {run.header.unit}: everything that it contributed, in all rounds, out of a "
        f"population of {run.header.population:,}.",
        who_users_are(run),
    )


def _adjacency(run: Run) -> tuple[str, ...]:
    return {
        Adjacency.REPLACE_ONE: (
            "Replace one: two populations of the same size that differ in one user's data.",
            "The sum then moves by up to 2C, twice the clip bound, and the noise is accounted "
            "against that.",
            _PUBLIC,
        ),
        Adjacency.ZERO_OUT: (
            "Zero out: one user's data, in a population of known size, replaced by nothing.",
            "The sum then moves by up to C, the clip bound.",
            _PUBLIC,
        ),
        Adjacency.ADD_OR_REMOVE_ONE: (
            "Add or remove one: two populations that differ in the presence of one user.",
            "The sum then moves by up to C, the clip bound. An ε under replace-one adjacency is a "
            "different quantity and must not be compared with this one.",
            _PUBLIC,
        ),
    }[run.adjacency]


_PUBLIC = "The size of the population and the expected cohort are taken to be public."


_NO_TRUST = (*EXACT_SUMS, "Whoever sees a released model may learn about any user.")
_NO_NOISE = ("No noise was added to what was released, or nothing bounded a contribution.",)


def _clipping(run: Run, what: str) -> str:
    if run.config.privacy is None:
        return f"each {what} is clipped, how config.yaml does not say,"
    clipping = run.config.privacy.clipping
    if clipping.undoes:
        what = f"{what}, each block divided by the public multiplier of its learning rate,"
    if isinstance(clipping, GlobalOptions):
        return f"each {what} is clipped as a whole"
    if isinstance(clipping, AdaptiveOptions):
        part = {"global": f"the {what}", "per_layer": "each block"}[clipping.adapts]
        return (
            f"{part} is clipped to a bound that follows the {clipping.quantile:g} quantile of the "
            "norms (Andrew et al. 2021)"
        )
    if any(line.startswith(f"privacy.clipping: {clipping.kind} ") for line in run.header.outside):
        return (
            f"each {what} is clipped by {clipping.kind}, a rule from outside, whose factors are "
            f"shrunk where they would lift the {what} above C,"
        )
    if clipping.kind != "per_layer" or not isinstance(clipping, PerLayerOptions):
        raise ValueError(f"no sentence for privacy.clipping.kind: {clipping.kind}")
    shares = {"uniform": "C/√H each", "dim": "C·√(d_h/Σd) each"}[clipping.split]
    if clipping.normalize:
        return f"any {what} above C has each of its H blocks set to its share of C ({shares})"
    return f"every {what} has each of its H blocks clipped to its share of C ({shares})"


def _sampling(run: Run) -> tuple[str, ...]:
    sampling = run.sampling
    if sampling.kind == "all":
        return ("Every user takes part in every round; there is no amplification by sampling.",)
    n, cohort = sampling.population, sampling.expected_cohort
    how = {
        "poisson": f"Each round every user is drawn independently with probability "
        f"q = {cohort:g}/{n:,} = {cohort / n:.4g}.",
        "fixed_size": f"Each round draws exactly {cohort:g} of {numbered(n, 'user')}, uniformly "
        "and without replacement.",
        "min_separation": "A user takes part at most once in a public number of rounds.",
        "random_allocation": "For each user one of a public number of rounds is drawn, again "
        "and again.",
    }[sampling.kind]
    if not run.private:
        return (how,)
    return (
        how,
        "The object that drew the cohorts is the one that yielded the privacy events, so the "
        "sampling that was run is the sampling that is accounted.",
        "Amplification by sampling holds against those who do not know who was drawn"
        + (", not even of one user." if sampling.kind == "fixed_size" else "."),
        "Users who were drawn and did not answer contributed zero.",
    )


def _releases(run: Run, account: Spent) -> tuple[str, ...]:
    count, rounds = len(run.releases), len({release.round for release in run.releases})
    sentences = [
        f"The ledger holds {numbered(count, 'release')}: the noisy sums of "
        f"{numbered(rounds, 'round')}, of {run.config.rounds} planned."
        if run.private
        else f"The ledger holds {numbered(count, 'release')} of sums that are not protected, of "
        f"{run.config.rounds} planned."
    ]
    repeated = [release.round for release in run.releases if release.attempt > 0]
    if repeated:
        sentences.append(
            f"Repeats of a round that had been charged before: {len(repeated)} "
            f"({named_rounds(repeated)}), with a fresh cohort and fresh noise; each is charged as "
            "a draw of its own."
        )
    else:
        sentences.append("No round was released twice.")
    unfinished = [r.round for r in run.releases if r.round > run.finished_rounds]
    if unfinished:
        sentences.append(
            f"Charged, though not finished, and counted here: {named_rounds(unfinished)}."
        )
    return (*sentences, *_chosen(run, account))


def _chosen(run: Run, account: Spent) -> tuple[str, ...]:
    """Return what was decided by held-out measures of what had been released."""
    best, evaluation, sentences = run.selection, run.config.evaluation, list[str]()
    if best is not None and evaluation.keep_best:
        sentences.append(
            f"The model of round {best.round} of {run.finished_rounds} is kept as the best of "
            f"{numbered(best.measured, 'measured one')}, by held-out {best.told}. The choice "
            "looks at all of them and else at held-out data alone: it is post-processing, and "
            "costs the ε of all rounds, not of those before it. Its measure flatters it, as the "
            "best of several."
        )
    if run.ended_early:
        sentences.append(
            f"The run ended after round {run.finished_rounds} of {run.config.rounds}, when "
            f"{numbered(evaluation.stop_after or 0, 'evaluation')} had brought no better model. "
            "When to end depends on what was released, so that what is promised, here and "
            f"everywhere, is the ε of all the rounds that it might have had.{_charged(account)}"
        )
    return tuple(sentences)


def _charged(account: Spent) -> str:
    if not account.charged:
        return ""
    return (
        f" The releases that were made come to ε = {epsilon_text(min(account.charged.values()))}, "
        "which nobody promised beforehand and nobody may claim."
    )


def _accounting(run: Run, account: Spent) -> tuple[str, ...]:
    ran_with = run.environment.get("versions", {}).get("dp-accounting", "an unknown version")
    agreement = (
        "THE RUN'S OWN FIGURES CONTRADICT IT, as said above."
        if account.disagreements
        else "The figures that the run logged agree with it."
    )
    whence = "tuned.json and the ledger" if run.choice else "the ledger alone"
    return (
        f"ε is computed anew from {whence} by dp-accounting {version('dp-accounting')}; "
        f"the run used {ran_with}. {agreement}",
        _bounds(run, account),
        *_without_pld(account),
        "The releases compose adaptively: each may depend on all before it.",
    )


def _bounds(run: Run, account: Spent) -> str:
    """Return ε by each accountant, and what it is good for."""
    if not run.complete:
        return "As lines are missing, no ε of what is left is an upper bound."
    if run.unclaimed:
        return "An ε of its own releases alone would not contain what choosing it cost."
    figures = "; ".join(
        f"{name.upper()}: ε = {epsilon_text(epsilon)}" for name, epsilon in account.epsilons.items()
    )
    tier = _tier(min(account.epsilons.values()))
    if run.choice:
        return (
            f"{figures}, of the tuning that chose it. It is a valid upper bound, and the one to "
            f"quote; targets and budgets are held against each trial alone; {tier}."
        )
    return (
        f"{figures}. Each is a valid upper bound, so the smallest is the one to quote, which "
        f"targets and budgets are held against; {tier}."
    )


def _without_pld(account: Spent) -> tuple[str, ...]:
    reason = account.without_pld
    return () if reason is None else (f"{reason[0].upper()}{reason[1:]}.",)


def _tier(epsilon: float) -> str:
    if epsilon <= STRONG:
        return "Ponomareva et al. 2023 call an ε of at most 1 strong"
    if epsilon <= REASONABLE:
        return "Ponomareva et al. 2023 call an ε between 1 and 10 reasonable, not strong"
    return (
        "Ponomareva et al. 2023 call an ε above 10 weak to none as a formal promise: such a run "
        "needs an empirical audit beside it"
    )


def _delta(delta: float, population: int) -> tuple[str, ...]:
    share = delta * population
    return (
        f"δ = {delta:g} is {share:.3g} times 1/N, for N = {numbered(population, 'user')}.",
        "A δ near 1/N would allow a mechanism that now and then publishes somebody's data outright;"
        " it should be far below."
        if share > LARGE_DELTA
        else "It is well below 1/N, as it should be.",
    )


def _tuning(run: Run) -> tuple[str, ...]:
    """Say what choosing this run among others cost, where that was counted."""
    if run.choice is None:
        untold = f"{UNTOLD[0].upper()}{UNTOLD[1:]}: no ε of it can be claimed."
        return (
            "Not counted. If learning rates, clip bounds or anything else were chosen by looking "
            "at other runs on the same users, those runs cost privacy too, and this ε does not "
            "contain it.",
            "What was chosen on public or on other users' data costs nothing.",
            *((untold,) if run.trial else ()),
        )
    return (
        "Counted: every ε here is what choosing this run cost, its own releases included (Liu, "
        "Talwar 2019; Papernot, Steinke 2022).",
        f"This run is the best, by {run.choice.quality} on held-out examples, of a number of "
        f"trials that was drawn ({run.choice.laws}). That number, and all other trials, must stay "
        "as private as the data: whoever sees more than this run has no promise.",
        "It counts all tunings that its folder had when it was chosen. A later one there adds to "
        "what they cost together, which its own best run says.",
        "What was chosen otherwise by looking at runs on the same users is not counted.",
    )


def _randomness(run: Run) -> tuple[str, ...]:
    if run.deployed:
        return (
            "A deployment: sampling and noise were seeded with 256 bits from the operating system, "
            "and that seed was never stored.",
        )
    if not run.private:
        return (f"A simulation with the fixed seed {run.config.seed}, to be reproducible.",)
    return (
        f"A simulation with the fixed seed {run.config.seed}: sampling and noise can be reproduced "
        "by anyone who knows it.",
        "That is what makes a study reproducible. In a deployment it would void the guarantee, "
        "because whoever knows the seed can subtract the noise. The ε here is what the same recipe "
        "costs when it is seeded secretly.",
    )


def _stacked(run: Run) -> tuple[str, ...]:
    runtime = run.config.runtime
    if run.header.unit == "example":
        return (
            "Examples of a sample share their forward pass. Who shares it changes how a gradient "
            "rounds, near one part in a million"
            + (
                ", and with it whether a norm that is so near to its bound is counted within."
                if any(release.counts for release in run.releases)
                else "."
            ),
        )
    if run.deployed or runtime.engine == "sequential" or runtime.stack == 1:
        return ()
    return (
        "Users were simulated several at a time. Who shares a stack changes how a user's numbers "
        "round, near one part in a million unless local training is unstable: a deployment trains "
        "each user alone, and so does runtime.engine: sequential.",
    )


def _floating_point(run: Run) -> tuple[str, ...]:
    numpy = run.environment.get("versions", {}).get("numpy", "of unknown version")
    return (
        "Sum and noise are float64, while the theory is about real numbers. The lowest bits of "
        "floating-point noise can reveal the sum (Mironov 2012); this gap is not closed.",
        f"The noise comes from NumPy's PCG64 (numpy {numpy}), which is no cryptographic generator: "
        "many exact draws would reveal its state.",
        "How long rounds take is not protected.",
        *_stacked(run),
    )


def _attendance(run: Run) -> tuple[str, ...]:
    """Return in how many rounds of a deployment nodes were missing; nothing for none."""
    counts = {
        "nodes were lost in": [row for row in run.rows if row.get("nodes_lost")],
        "nodes were absent in": [row for row in run.rows if row.get("nodes_absent")],
        "too few nodes took part at first in": [r for r in run.rows if r.get("tries", 1) > 1],
    }
    told = [
        f"{what} {len(rows)} ({named_rounds([row['round'] for row in rows])})"
        for what, rows in counts.items()
        if rows
    ]
    if not told:
        return ()
    return (
        f"Of {numbered(len(run.rows), 'round')} {'; '.join(told)}. Users of a node that is "
        "missing contribute zero, and noise, denominator and charge stay as they are.",
    )


def _logged(run: Run) -> tuple[str, ...]:
    seen = ", ".join(sorted(run.rows[-1].get("simulation_only", {})))
    if not seen:
        return (
            "Nothing from the users' own values beside the releases. How long rounds took and how "
            "many nodes were lost is in metrics.jsonl.",
            *_known_of_nodes(run),
        )
    sizes = run.environment.get("simulation_only", {}).get("data")
    also = " In environment.json: how many examples users have." if sizes else ""
    if run.config.runtime.profile:
        also += " In trace.json: how long users' training took."
    if _keeps_memories(run):
        also += " In the folder memory: what users keep between rounds."
    if not run.private:
        return (f"Everything, without protection; of the users' own values: {seen}.{also}",)
    return (
        f"Under simulation_only in metrics.jsonl: {seen}.{also} These come from users' own values "
        "without any mechanism. They are NOT covered by ε: a deployment must not log or publish "
        "them, and neither must a plot below that shows them leave the simulation.",
        held_out_sentence(run),
        "The learning rate and the norm of the averaged update are functions of what was released.",
    )


def _keeps_memories(run: Run) -> bool:
    privacy, algorithm = run.config.privacy, run.config.algorithm
    if privacy is not None and privacy.error_feedback.kind != "none":
        return True
    if algorithm.unread:  # what it keeps, only its own code says
        return (run.path / "memory").is_dir()
    return make_algorithm(algorithm).keeps


def _known_of_nodes(run: Run) -> tuple[str, ...]:
    """Return what the server of a deployment knows and writes down of who is there."""
    if not run.deployed:
        return ()
    if run.config.app is None:
        return (HOSTED, *_attendance(run))
    return (
        "Of what a node sends the server takes a clipped update, and nothing else: what clients "
        "measure stays with them. It knows which nodes are connected, and no ε covers that.",
        *_attendance(run),
    )


def _not_our_own(run: Run) -> tuple[str, ...]:
    """Return what a run was made of that is not fedpriv's own."""
    if not run.header.outside:
        return ()
    return (
        f"Not fedpriv's own, and not checked by it: {'; '.join(run.header.outside)}. Where that is "
        "the mechanism, how noise is made rests on its code; what is charged was rebuilt from the "
        "ledger by fedpriv's own.",
    )


def _verification(run: Run) -> tuple[str, ...]:
    git = run.environment.get("git")
    source = ""
    if git:
        changed = " with local changes" if git.get("modified") else ""
        source = f", source at commit {git['commit']}{changed}"
    fedpriv = run.environment.get("versions", {}).get("fedpriv", "of unknown version")
    private = " with its data (simulation only)" if run.seeded else ""
    line = (
        "ledger.jsonl has a line for each release with a digest of what was released (SHA-256)."
        if all(release.digest for release in run.releases)
        else "ledger.jsonl has a line for each release, which was on the disk before any node was "
        "asked for its part in it."
    )
    return (
        f"{line} Its lines form a hash chain, which was intact when this was written; the "
        "chain shows edits, not a ledger that was written anew as a whole.",
        run.evidence.sentence() if run.complete else "LINES ARE MISSING, as said above.",
        *_not_our_own(run),
        f"The configuration is {run.header.fingerprint[:16]}…{private}, and was run by fedpriv "
        f"{fedpriv}{source}.",
    )
