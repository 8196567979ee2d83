"""The server of a deployment needs shapes, classes, held-out examples and N, and nobody's data."""

import shutil
from pathlib import Path

import pytest
import torch
from deployed import COUNTS, Deployed, deployed_config, hosting_answer, three_nodes, trained
from in_process import Silent, small_config
from safetensors.torch import load_file, save_file
from tiny_speech import tiny_speech
from typer.testing import CliRunner
from writers import write_writers

from fedpriv import experiment
from fedpriv.cli import app as commands
from fedpriv.data.registry import DATASETS, build_dataset
from fedpriv.errors import InputError
from fedpriv.federation import client_app
from fedpriv.federation.builders import task_of
from fedpriv.held_out import read_held_out, write_held_out
from fedpriv.privacy import Ledger, Randomness
from fedpriv.tasks.recognition import Recognition


@pytest.fixture
def still(monkeypatch):
    """One source of all randomness in place of the operating system's."""
    monkeypatch.setattr(Randomness, "operating_system", lambda: Randomness(7, reproducible=False))


def served(tmp_path: Path, name: str, nodes: list[Path], server: Path, **changes):
    """Train over three nodes, by a server that has the folder `server`; its last parameters."""
    runtime = {"workers": 3, "deployment": True, "device": "cpu"}
    sampling = {"kind": "poisson", "expected_cohort": 6}
    changes = {"rounds": 3, "runtime": runtime, "evaluation__every": 1, **changes}
    config = deployed_config(server, data={"users": 12}, privacy__sampling=sampling, **changes)
    config = config.model_copy(update={"run_dir": tmp_path / name})
    observer = Silent()
    directory = trained(config, Deployed(nodes), observer)
    _, after = experiment.reopen(directory.path)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in observer.rows]
    return after.server.parameters(), rows, Ledger.open(directory.ledger)


def test_a_server_without_any_folder_runs_the_same_rounds_to_the_bit(tmp_path, still):
    nodes, server = three_nodes(tmp_path), write_writers(tmp_path / "server", COUNTS)
    parameters, rows, ledger = served(tmp_path, "with", nodes, server)
    file = tmp_path / "public.safetensors"
    config = deployed_config(server)
    write_held_out(build_dataset(config.data, config.seed), "mnist_writers", file)
    shutil.rmtree(server)
    client_app._TRAINERS.__init__()  # those of other processes know nothing of each other
    alone, same_rows, same_ledger = served(
        tmp_path, "without", nodes, server, evaluation__held_out=str(file)
    )
    assert alone.equal(parameters)
    assert same_rows == rows
    assert list(same_ledger) == list(ledger)
    assert len(rows) == 3
    assert all(set(row["held_out"]) == {"loss", "accuracy", "examples"} for row in rows)


def test_with_the_file_a_server_builds_no_data_set(tmp_path, still, monkeypatch):
    server, file = write_writers(tmp_path / "server", COUNTS), tmp_path / "public.safetensors"
    config = deployed_config(server, evaluation__held_out=str(file))
    write_held_out(build_dataset(config.data, config.seed), "mnist_writers", file)

    def refused(*given):
        raise AssertionError("the server builds its data set")

    monkeypatch.setattr("fedpriv.federation.builders.build_dataset", refused)
    prepared = experiment.prepare(config)
    assert prepared.plan.sampling.population == 100
    assert prepared.trainer.dataset.population == 0


def assert_alike(found, dataset):
    parts, expected = list(found.evaluation()), list(dataset.evaluation())
    assert len(parts) == len(expected)
    for part, other in zip(parts, expected, strict=True):
        assert type(part) is type(other)
        for name, value in vars(other).items():
            mine = getattr(part, name)
            assert mine.equal(value) if isinstance(value, torch.Tensor) else mine == value
    assert (found.classes, found.input_shape) == (dataset.classes, dataset.input_shape)


@pytest.mark.parametrize("name", ["digits", "synthetic_images"])
def test_what_is_read_is_what_the_data_set_holds_out(tmp_path, name):
    options = DATASETS.parse({"name": name, "users": 20, "partition": {"kind": "iid"}})
    dataset = build_dataset(options, 3)
    write_held_out(dataset, name, tmp_path / "file")
    assert_alike(read_held_out(tmp_path / "file", name), dataset)


def test_so_it_is_of_speech_whose_alphabet_and_task_come_along(tmp_path):
    dataset = tiny_speech()
    write_held_out(dataset, "tones", tmp_path / "file")
    found = read_held_out(tmp_path / "file", "tones")
    assert_alike(found, dataset)
    assert found.alphabet == dataset.alphabet
    task = task_of(small_config(), found)
    assert isinstance(task, Recognition)
    assert task.alphabet == dataset.alphabet


def test_no_user_is_in_the_file(tmp_path):
    dataset = build_dataset(deployed_config(write_writers(tmp_path / "all", COUNTS)).data, 0)
    touched = []
    object.__setattr__(dataset, "parts", _Watched(touched))
    write_held_out(dataset, "mnist_writers", tmp_path / "file")
    held_out = next(dataset.evaluation())
    tensors = load_file(tmp_path / "file")
    assert not touched
    assert {name: len(tensor) for name, tensor in tensors.items()} == {
        "0.inputs": len(held_out),
        "0.targets": len(held_out),
    }
    assert b"writer-" not in (tmp_path / "file").read_bytes()


class _Watched:
    def __init__(self, touched):
        self.touched = touched

    def __getitem__(self, index):
        self.touched.append(index)

    def __len__(self):
        return 12


# ---------------------------------------------------------------- what is wrong


def test_the_command_writes_it_and_wrong_files_are_refused_in_a_line(tmp_path):
    config, file = tmp_path / "config.yaml", tmp_path / "public.safetensors"
    config.write_text(small_config().to_yaml())
    done = CliRunner().invoke(commands, ["config", "held-out", str(config), str(file)])
    assert done.exit_code == 0, done.output
    assert read_held_out(file, "digits").classes == 10
    again = CliRunner().invoke(commands, ["config", "held-out", str(config), str(file)])
    assert again.exit_code == 0, again.output
    with pytest.raises(InputError, match=r"of data.name: digits, and the config's is other"):
        read_held_out(file, "other")
    save_file({"x": torch.zeros(1)}, file)
    for theirs in (file, config):
        kept = theirs.read_bytes()
        done = CliRunner().invoke(commands, ["config", "held-out", str(config), str(theirs)])
        assert str(done.exception) == (
            f"FILE: {theirs} is there already, and fedpriv did not write it; name another file"
        )
        assert theirs.read_bytes() == kept
    for wrong in (file, config, tmp_path / "nothing", tmp_path):
        with pytest.raises(InputError, match=r"evaluation.held_out: .*fedpriv config held-out"):
            read_held_out(wrong, "digits")


def test_a_simulation_takes_none(tmp_path):
    with pytest.raises(InputError, match=r"evaluation\.held_out"):
        small_config(evaluation__held_out=str(tmp_path / "file"))


def test_nodes_do_not_look_at_it(tmp_path):
    """The path is the server's; a policy's node would refuse any other that it names."""
    folder = write_writers(tmp_path / "node", COUNTS)
    config = deployed_config(folder, evaluation__held_out=str(tmp_path / "nothing"))
    assert "hosting" in hosting_answer(config, folder).content
