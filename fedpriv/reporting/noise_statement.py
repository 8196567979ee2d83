"""What is said of a run whose noise is added by nodes or by users instead of the server.

Each has a trust model of its own, and no ε of one may pass for that of another:
`shares_sentences` and `users_sentences` give the answers that differ, by the keys of the privacy
statement's sections.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedpriv.privacy.figures import epsilon_text
from fedpriv.privacy.silos import SiloCosts
from fedpriv.reporting.data_statement import who_users_are
from fedpriv.reporting.reader import Run
from fedpriv.reporting.wording import drawn_anew, worst_and_median

#: Who must be trusted with what, in one sentence, by `privacy.noise_by` where it is not the server.
TRUST_MODELS = {
    "nodes": (
        "Trust model: distributed noise. Each node is trusted with its own users and to add its "
        "share of the noise, and nobody with more than the sum of all nodes' messages (secure "
        "aggregation): a server that sees single messages is NOT covered."
    ),
    "users": (
        "Trust model: local. Nobody is trusted: each user adds noise of full strength to its own "
        "contribution before it leaves the user."
    ),
}

#: What a deployment's server knows and writes down of who is there, which nothing covers.
HOSTED = (
    "Each node tells the server how many users it hosts and a digest of their ids, by which it is "
    "recognised. The ledger has both, under private. No ε covers them: whoever reads them knows "
    "how many users there are, and can test a guess at who all of a node's are."
)


def shares_sentences(run: Run, viewers: Mapping[str, float]) -> Mapping[str, tuple[str, ...]]:
    """Return the sentences that differ where nodes add shares of the noise.

    Args:
        run: a private run whose releases have shares.
        viewers: RDP ε against those who see more than the models, as in `Spent`.
    """
    return {"trust": _trust_in_shares(run, viewers), "randomness": _randomness(run, "node")}


def _trust_in_shares(run: Run, viewers: Mapping[str, float]) -> tuple[str, ...]:
    needed = run.releases[-1].shares
    node = (
        f"Against a node that takes its own share off, at most ε = {epsilon_text(viewers['node'])} "
        "by RDP for a user of another node; against several nodes together it is more."
        if "node" in viewers
        else "Against a node nothing is promised: all the noise may be in its own share."
    )
    return (
        TRUST_MODELS["nodes"],
        f"The shares of any {needed} nodes have the full noise. Where fewer answered, nothing of "
        "theirs was used and noise alone was released. Which nodes fail must not depend on users' "
        "data.",
        "fedpriv hides no message from its own server, which adds them up: without secure "
        "aggregation in between, whoever runs that server must be trusted as with central noise.",
        "ε above is for those who see the released models and do not know who was drawn.",
        node,
        *((HOSTED,) if run.deployed else ()),
        "The server draws the cohorts, so sampling hides nobody from it: where it sees sums alone, "
        f"at most ε = {epsilon_text(viewers['server'])} by RDP for a user that was drawn in every "
        "round.",
    )


def _randomness(run: Run, owner: str) -> tuple[str, ...]:
    if run.deployed:
        return (
            f"A deployment: each {owner} seeded its noise with 256 bits from its own operating "
            "system, anew for each message, and never stored them; sampling was seeded likewise at "
            "the server.",
        )
    return (
        f"A simulation with the fixed seed {run.config.seed}: sampling and the noise of every "
        f"{owner} can be reproduced by anyone who knows it.",
        "That is what makes a study reproducible. In a deployment it would void the guarantee, "
        "because whoever knows the seed can subtract the noise. The ε here is what the same recipe "
        f"costs when each {owner} seeds its noise secretly.",
    )


def users_sentences(run: Run, costs: SiloCosts, clipping: str) -> Mapping[str, tuple[str, ...]]:
    """Return the sentences that differ where users add the noise to their own contribution.

    Args:
        run: a private run whose releases name the users that took part.
        costs: what its users have spent.
        clipping: how an update is bounded, in words.
    """
    return {
        "unit": _unit(run, costs),
        "adjacency": (
            "Replace one: the data of one user exchanged for any other data, or for none.",
            "Its message then moves by up to 2C, twice the clip bound, and the noise is accounted "
            "against that. The noise of other users counts for nothing.",
        ),
        "trust": _trust_in_users(run),
        "mechanism": _mechanism(run, clipping),
        "sampling": _sampling(run),
        "randomness": _randomness(run, "user"),
    }


def _unit(run: Run, costs: SiloCosts) -> tuple[str, ...]:
    return (
        f"One user: all its data, out of a population of {run.header.population:,}. Each user "
        "spends an ε of its own, for the rounds in which it was drawn.",
        worst_and_median(costs, "user"),
        f"{who_users_are(run)} That a user takes part, and when, is public.",
    )


def _trust_in_users(run: Run) -> tuple[str, ...]:
    # A deployment pays before it asks; a simulation when the sums are there.
    sent = (
        "a user ever sent"
        if run.deployed
        else "a user sent in rounds that were finished, here or after a resume"
    )
    where = (
        "A node trains its users and adds their noise, so it must be the user's own device, or "
        "trusted by it. Clip bound, noise multiplier and the ledger come from the server: a user "
        "that does not take its word must check what it is sent, and count its rounds itself."
        if run.deployed
        else "In this simulation the users of a node run in one process and their noisy messages "
        "are added up there, which is post-processing."
    )
    return (
        TRUST_MODELS["users"],
        f"The guarantee covers every message that {sent}, and every model made from it. "
        "An ε by noise that others add trusts them: it is another quantity and must not be "
        "compared with this one.",
        where,
    )


def _mechanism(run: Run, clipping: str) -> tuple[str, ...]:
    return (
        f"Local noise: {clipping} so that a user's contribution to a round has an L2 norm of at "
        "most C; a NaN or infinite update, or a user without usable data, contributes zero.",
        f"Gaussian noise N(0, σ²), σ = {run.releases[-1].stddev:.4g}, is added to each coordinate "
        "of every contribution, zero or not, before it leaves the user. The server adds none.",
        "The sum is divided by the expected cohort size, which is public. The server optimizer "
        f"({run.config.server.optimizer}) and everything after it are post-processing.",
    )


def _sampling(run: Run) -> tuple[str, ...]:
    return (
        f"{drawn_anew(run.sampling, 'user')} Whoever receives a message knows who sent it, so no "
        "amplification by sampling is claimed; a user that was "
        "drawn pays, whether or not its node answered.",
    )
