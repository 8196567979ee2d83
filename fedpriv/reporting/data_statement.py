"""What statements say of data: who a user is, whose held-out examples and seed models are.

Each sentence stands for a fact that a data set or a seed model's file has been checked for. Where
nothing was checked, the sentence says so.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedpriv.data.facts import Example, HeldOut, Public, Users
from fedpriv.errors import InputError
from fedpriv.reporting.reader import Run

_USERS: dict[Users, str] = {
    "person": "Each user is one whom the data set names as a person. A person who appears as "
    "several users is protected as each of them only.",
    "share": "A user has a part of what one person gave, and other users have the rest: what "
    "protects a user protects that part, NOT the person.",
    "dealt": "Users are made up: examples were dealt to them, whoever they are of. What protects a "
    "user protects its examples, NOT the people whom they are of, who may be in many users.",
    "made_up": "All users and their data are made up: no person is among them.",
    "node": "Each user is a node of a Flower app: all that it holds. A person whose data several "
    "nodes hold is protected as each of them only.",
    "unknown": "Whether a user is one person was not checked. A person who appears as several "
    "users is protected as each of them only.",
}

_HELD_OUT: dict[HeldOut, str] = {
    "others": "held-out data of people none of whom is a user, by the names that the data set "
    "gives: post-processing, if those data are public.",
    "same": "held-out data of THE SAME PEOPLE as the users', other examples than theirs: of what "
    "these say of their people ε does not tell.",
    "unnamed": "held-out data, which no user holds; whose they are the data set does not say, and "
    "they may be of people whose other data users hold: post-processing as far as they are public.",
    "made_up": "held-out data, which are made up: post-processing.",
    "unknown": "held-out data, of which was not checked whose they are: post-processing only if "
    "they are public and of none of the users.",
}

_EXAMPLES: dict[Example, str] = {
    "image": "One example (an image)",
    "recording": "One example (a recording)",
    "joined": "One example (several recordings joined; a recording that is in several examples is "
    "protected less)",
    "row": "One example (a row of a table)",
    "block": "One example (a block of tokens; a text that is in several blocks is protected less)",
    "unknown": "One example, as the data set makes them,",
}

_PUBLIC: dict[Public, str] = {
    "others": "Nobody of that part is a user, by the names that the data set gives.",
    "made_up": "The people of that part are made up.",
    "none": "The data set has no such part now: whose data they were was not checked.",
    "unknown": "Whose data they were was not checked.",
}


def who_users_are(run: Run) -> str:
    """Return the sentence on what a user is."""
    return _USERS[run.facts.users]


def an_example(run: Run) -> str:
    """Return what one example is, as the beginning of a sentence."""
    return _EXAMPLES[run.facts.example]


def held_out_sentence(run: Run) -> str:
    """Return the sentence on what measures of held-out examples say, and of whom."""
    return (
        "Held-out losses and error rates are functions of the released models and of "
        + _HELD_OUT[run.facts.held_out]
    )


def start_sentences(run: Run) -> tuple[str, ...]:
    """Return the sentences on what the training started from.

    Raises:
        InputError: the run says something of its seed model that is not known here.
    """
    return (*_whole_start(run), *_adapters_start(run))


def _adapters_start(run: Run) -> tuple[str, ...]:
    if not run.config.model.reads_data:
        return ()
    return (
        "Adapters began with the main directions of what their maps read of the held-out examples' "
        "inputs (EVA), targets aside: so measures of these examples are of ones that the start had "
        "seen.",
    )


def _without(patterns: Sequence[str]) -> tuple[str, ...]:
    if not patterns:
        return ()
    return (f"Parameters that match {' or '.join(patterns)} are not of it: they began anew.",)


def _whole_start(run: Run) -> tuple[str, ...]:
    seed_model = run.config.seed_model
    if run.config.app is not None:
        return (
            "The arrays that the app handed over, of which fedpriv knows nothing: ε says nothing "
            "about the people whose data they were made of, if any.",
        )
    if seed_model is None and any(line.startswith("model: ") for line in run.header.outside):
        digest = run.config.model.start_sha256 or "not recorded"
        return (
            f"What the model's own code gave it, SHA-256 {digest[:16]}…: random numbers, or "
            "weights of whose training fedpriv knows nothing. ε says nothing about people whose "
            "data trained them.",
        )
    if seed_model is None:
        return ("Random parameters, which depend on the seed alone.",)
    said = run.environment.get("seed_model", {}).get("origin", "unknown")
    made = {
        "pretrained": "pre-trained by fedpriv, as seed_model.pretrain says, on the data set's "
        "public part and without privacy; its file names that recipe, and its numbers are those "
        "that were written then",
        "outside": "given as a file, of whose training fedpriv knows nothing",
        "unknown": "of whose training nothing is recorded",
    }
    if said not in made:
        raise InputError(f"{run.path}/environment.json: seed_model: unknown origin {said!r}")
    return (
        f"A seed model ({made[said]}), SHA-256 {(seed_model.sha256 or 'not recorded')[:16]}….",
        *_without(seed_model.reinitialize),
        *((_PUBLIC[run.facts.public],) if said == "pretrained" else ()),
        "ε says nothing about the people whose data trained it: they must be nobody of the "
        "population, and their data public or theirs to give.",
    )
