"""What becomes of a finished round: its metrics, its checkpoint, the best one, and news of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fedpriv import disk
from fedpriv.counting import numbered
from fedpriv.federation.builders import build_turns
from fedpriv.federation.round_record import RoundRecord
from fedpriv.privacy.accounts import PayerCosts, most_charged
from fedpriv.privacy.charging import pld_epsilon
from fedpriv.privacy.ledger import Ledger
from fedpriv.reporting.run_directory import RunDirectory
from fedpriv.selection import ends, selection
from fedpriv.tasks.base import BY_CLASS
from fedpriv.trackers.base import Tracking
from fedpriv.training.checkpoint import Checkpoint, checkpoint_files, save_checkpoint
from fedpriv.training.memory_store import MemoryStore
from fedpriv.training.spans import Stopwatch

if TYPE_CHECKING:
    from fedpriv.config import ExperimentConfig
    from fedpriv.federation.plan import Plan
    from fedpriv.optimizers.server import GlobalModel
    from fedpriv.reporting.profile import Profile
    from fedpriv.tasks.quality import Quality

#: What a checkpoint calls the clip bounds as they have adapted.
BOUNDS = "clipping/bounds"
#: What it calls the journals of users' memories that its round counted: int64 `[nodes, 4]`.
JOURNALS = "memory/journals"
# What a round writes beside its checkpoint, in bytes: lines of ledger and metrics.
_ROOM_BESIDE = 2**20


class News(Protocol):
    """Who hears of finished rounds."""

    def finished(self, row: dict[str, Any]) -> None:
        """A round is finished; `row` is its line of the metrics."""

    def say(self, sentence: str) -> None:
        """Something that the user should know."""


class Recorded(Protocol):
    """What is known of a run whose rounds are recorded: an `Experiment`, or an app."""

    plan: Plan
    profile: Profile

    @property
    def config(self) -> ExperimentConfig:
        """The config."""
        ...

    @property
    def server(self) -> GlobalModel:
        """The global model, as the last finished round left it."""
        ...

    @property
    def finished_rounds(self) -> int:
        """The last round that was finished when the run began, or went on."""
        ...

    def measure(self, round_: int) -> tuple[dict[str, float], Quality]:
        """Return what held-out data say of the model, and which measure tells how good it is."""
        ...


def keep_best(experiment: Recorded, directory: RunDirectory) -> None:
    """Keep the newest checkpoint as the best one where it is that, by the metrics."""
    if not experiment.config.evaluation.keep_best:
        return
    best, files = selection(directory.read_metrics()), checkpoint_files(directory.checkpoints)
    if best is not None and files and files[-1].stem == f"round-{best.round:06d}":
        disk.write_whole(directory.best, files[-1].read_bytes())


class Recorder:
    """Turns finished rounds into metrics, checkpoints and news."""

    def __init__(
        self,
        experiment: Recorded,
        directory: RunDirectory,
        ledger: Ledger,
        observer: News,
        memory: MemoryStore | None = None,
        tracking: Tracking | None = None,
    ) -> None:
        self._experiment = experiment
        self._directory = directory
        self._ledger = ledger
        self._observer = observer
        self._memory = memory
        self._tracking = tracking
        self._slowed = ""

    def record(self, record: RoundRecord) -> bool:
        """Measure where due, then write the metrics line, then the checkpoint that makes it so.

        Only then do users' memories move on. Returns whether the run is over before its last round.
        """
        watch = Stopwatch(self._experiment.config.runtime.profile)
        with watch.measure("evaluate"):
            row = self._row(record)
        with watch.measure("write"):
            self.release_room()
            self._directory.append_metrics(row)
            self._save(record)
        workers = [summed.spans for summed in record.sums]
        self._experiment.profile.add([*record.spans, *watch.spans], workers)
        self._observer.finished(row)
        if self._tracking is not None:
            self._tracking.finished(row)
        if record.noise_only:
            self._observer.say(self._dropped(record))
        self._tell_what_slows(record)
        over = "held_out" in row and self._over(record.round)
        if not over and record.round < self._experiment.config.rounds:
            self.hold_room()
        return over

    def hold_room(self) -> None:
        """Hold room on the disk for what the next round of a deployment writes, until it is there.

        Nodes charge for a round when they are asked, and one that was charged and is not kept is
        paid for again: a full disk is found before, and does not fill up in the middle of a round.

        Raises:
            OSError: there is none.
        """
        if self._experiment.config.runtime.deployment:
            state = sum(tensor.nbytes for tensor in self._experiment.server.state().values())
            copies = 2 if self._experiment.config.evaluation.keep_best else 1
            disk.hold_room(self._directory.held, copies * state + _ROOM_BESIDE)

    def release_room(self) -> None:
        """Let go of the room that is held, for whatever is written now."""
        self._directory.held.unlink(missing_ok=True)

    def _over(self, round_: int) -> bool:
        """Keep the model of a measured round where it is the best; say whether to stop there."""
        config = self._experiment.config
        keep_best(self._experiment, self._directory)
        if config.evaluation.stop_after is None or round_ == config.rounds:
            return False
        rows = self._directory.read_metrics()
        if not ends(config, rows):
            return False
        best = selection(rows)
        since = f"the best was round {best.round}, {best.told}" if best else "none was a number"
        self._observer.say(
            f"ended after round {round_} of {config.rounds}: {config.evaluation.stop_after} "
            f"evaluations without a better one; {since}"
            + f"; what it costs is the ε of all {config.rounds} rounds"
            * bool(config.privacy)
        )
        return True

    def _tell_what_slows(self, record: RoundRecord) -> None:
        """Say once what slows many users at once down; metrics have each round's."""
        why = next((each.slowed for each in record.sums if each.slowed), "")
        if not why or self._slowed:
            return
        self._slowed = why
        alone, users = (sum(getattr(s, name) for s in record.sums) for name in ("alone", "users"))
        who = f"{alone} of {numbered(users, 'user')} trained one after another: " if alone else ""
        self._observer.say(f"round {record.round}: {who}{why} (metrics.jsonl has it)")

    def _dropped(self, record: RoundRecord) -> str:
        """Say that a round released noise alone."""
        plan = self._experiment.plan
        lost = plan.config.runtime.workers - plan.mechanism.needed
        return (
            f"round {record.round}: {numbered(record.nodes_lost, 'node')} lost, and "
            f"privacy.lost_nodes allows for {lost}: the sums of the others had too little noise "
            "and were dropped; noise alone was released"
        )

    def _save(self, record: RoundRecord) -> None:
        bounds = torch.tensor(record.bounds, dtype=torch.float64)
        tensors = {**self._experiment.server.state(), BOUNDS: bounds}
        if self._memory is not None:
            tensors[JOURNALS] = torch.tensor(record.journals, dtype=torch.int64).view(-1, 4)
        save_checkpoint(
            self._directory.checkpoints,
            Checkpoint(record.round, self._ledger.header.fingerprint, tensors, self._sealed()),
            self._experiment.config.checkpoint.keep,
        )
        if self._memory is not None:
            self._memory.commit(record.round, record.journals)

    def _sealed(self) -> tuple[int, str]:
        """Return how many lines the ledger has after its header, and the hash of the last."""
        hashes = self._ledger.hashes
        return len(hashes), hashes[-1]

    def _row(self, record: RoundRecord) -> dict[str, Any]:
        config, names = self._experiment.config, self._experiment.plan.layout.names
        row: dict[str, Any] = {
            "round": record.round,
            "epsilon": {"rdp": _finite(record.epsilon)},
            "delta": self._experiment.plan.delta,
            "lr": record.lr,
            "aggregate_norm": math.hypot(*record.block_norms),
            "released_block_norms": dict(zip(names, record.block_norms, strict=True)),
            "clip_bound": record.bound,
            "seconds": record.seconds,
            "nodes_lost": record.nodes_lost,
        }
        if record.block_noise:
            row["noise_block_norms"] = dict(zip(names, record.block_noise, strict=True))
        if record.costs is not None:
            row |= self._costs(record.costs, record.payers or ())
        if record.noise_only:
            row["noise_only"] = True
        if (turns := build_turns(config, record.round)) is not None:
            row["virtual_seconds"] = turns[-1].seconds
        if config.evaluates(record.round):
            row |= self._with_pld(record.epsilon)
            measures, quality = self._experiment.measure(record.round)
            row |= {BY_CLASS: of} if (of := measures.pop(BY_CLASS, None)) else {}
            row["held_out"] = measures
            row["quality"] = quality.record()
        if config.runtime.deployment:
            row |= {"nodes_absent": record.nodes_absent, "tries": record.tries}
        elif config.app is None:  # of whose nodes the clipped updates are seen alone
            row["simulation_only"] = _seen(record, names) | _slowed(record)
            if self._memory is not None:
                row["simulation_only"] |= _seen_of_memories(record)
        return row

    def _costs(self, costs: PayerCosts, took_part: tuple[int, ...]) -> dict[str, Any]:
        """Return what the schedule, which is public, has cost silos, or users by their own noise.

        Which users took part is in the ledger, and would be long here.
        """
        payer = self._experiment.plan.mechanism.payer
        spent = {"worst": _finite(costs.worst), "median": _finite(costs.median)}
        spent[f"worst_{payer}"] = costs.worst_payer
        named = {"took_part": list(took_part)} if payer == "silo" else {}
        return {f"{payer}s": {**spent, **named}}

    def _with_pld(self, by_rdp: float | None) -> dict[str, Any]:
        """Return ε with that by PLD, which takes too long for every round, or why there is none."""
        privacy = self._experiment.config.privacy
        if privacy is None or by_rdp is None or "pld" not in privacy.accountants:
            return {}
        charged = Counter(release.event() for release in most_charged(list(self._ledger)))
        epsilon, reason = pld_epsilon(charged, self._ledger.adjacency, privacy.delta, by_rdp)
        said = {"epsilon": {"rdp": _finite(by_rdp), "pld": epsilon}}
        return said if reason is None else said | {"without_pld": reason}


def _finite(epsilon: float | None) -> float | None:
    """Return None for no guarantee: JSON has no infinity, and null cannot pass for a number."""
    return epsilon if epsilon is not None and math.isfinite(epsilon) else None


def _seen(record: RoundRecord, names: tuple[str, ...]) -> dict[str, Any]:
    """Return what the users' values say of the round; no mechanism released it.

    Where nobody was trained there are no means: None, for a loss of 0 would be the best of all.
    """
    sums = record.sums
    users = sum(s.users for s in sums)
    trained = users - sum(s.non_finite for s in sums)

    def mean(values: Iterable[float]) -> float | None:
        return sum(values) / trained if trained else None

    return {
        "cohort": users,
        "examples": sum(s.examples for s in sums),
        "skipped": sum(s.skipped for s in sums),
        "users_per_second": users / record.seconds,
        "non_finite": sum(s.non_finite for s in sums),
        "loss": mean(s.loss for s in sums),
        "norm": mean(s.norm for s in sums),
        "clipped": mean(s.clipped for s in sums),
        "block_norms": {name: mean(s.block_norms[i] for s in sums) for i, name in enumerate(names)},
        "block_clipped": {
            name: mean(s.block_clipped[i] for s in sums) for i, name in enumerate(names)
        },
        "block_shares": {
            name: mean(s.block_shares[i] for s in sums) for i, name in enumerate(names)
        },
        "block_coherence": dict(zip(names, _coherence(record), strict=True)),
    }


def _slowed(record: RoundRecord) -> dict[str, Any]:
    """Return what slowed many users at once down, where anything did."""
    found = [each for each in record.sums if each.slowed]
    alone = sum(each.alone for each in found)
    return {"alone": alone, "slowed": found[0].slowed} if found else {}


def _coherence(record: RoundRecord) -> Iterator[float | None]:
    """Yield ‖Σ c_h‖ / Σ‖c_h‖ over what users sent of each block h: 1 where all agree.

    Of n users whose contributions have nothing to do with one another it is near 1/√n. None where
    sums arrive with noise, or nothing was sent.
    """
    for number, norm in enumerate(record.block_sums):
        sent = sum(s.block_sent[number] for s in record.sums)
        yield norm / sent if norm is not None and sent else None


def _seen_of_memories(record: RoundRecord) -> dict[str, float]:
    """Return what the users' memories say of the round; no mechanism released it."""
    users = max(1, sum(s.users for s in record.sums))
    return {
        "memory_norm": sum(s.memory_norm for s in record.sums) / users,
        "memory_reset": sum(s.memory_reset for s in record.sums),
    }
