import numpy as np
import pytest
from held_out import held_out
from schema import data_options

from fedpriv.data import PartitionConfig, build_dataset
from fedpriv.errors import EnvironmentFault, InputError


def config(path, **changes):
    return data_options(name="idx_images", path=path, **{"users": 6, **changes})


def test_mnist_folder(mnist_folder, labels):
    dataset = build_dataset(config(mnist_folder), seed=1)
    assert (dataset.population, dataset.classes, dataset.input_shape) == (6, 10, (1, 4, 6))
    assert held_out(dataset).targets.tolist() == labels[:20].tolist()
    for index in range(6):
        examples = dataset.user(index)
        # The fixture paints image i with pixel i, of label i % 10.
        pixels = (examples.inputs[:, 0, 0, 0] * 0.3081 + 0.1307) * 255
        assert (pixels.round().long() % 10).tolist() == examples.targets.tolist()
    assert sum(len(dataset.user(index)) for index in range(6)) == 60


def test_emnist_letters_count_from_one_and_are_chosen_by_prefix(split_writer):
    letters = np.arange(52) % 26 + 1
    split_writer("emnist-letters-train", letters)
    split_writer("emnist-letters-test", letters[:26])
    folder = split_writer("emnist-digits-train", letters % 10)
    with pytest.raises(InputError, match=r"several sets of images; name one: .*emnist-digits, "):
        build_dataset(config(folder), seed=1)
    dataset = build_dataset(config(folder / "emnist-letters"), seed=1)
    assert dataset.classes == 26
    assert held_out(dataset).targets.tolist() == list(range(26))
    assert dataset.description.startswith("emnist-letters ")


def test_a_single_prefix_needs_no_naming(split_writer):
    split_writer("emnist-balanced-train", np.arange(47))
    folder = split_writer("emnist-balanced-test", np.arange(47))
    assert build_dataset(config(folder), seed=1).classes == 47


def test_missing_files_are_listed_with_their_homes(mnist_folder):
    (mnist_folder / "t10k-labels-idx1-ubyte").unlink()
    (mnist_folder / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(InputError) as caught:
        build_dataset(config(mnist_folder), seed=1)
    message = str(caught.value)
    assert message.startswith(f"data.path: {mnist_folder} lacks ")
    assert "train-images-idx3-ubyte, t10k-labels-idx1-ubyte " in message
    assert "train-labels" not in message
    for home in ("exdb/mnist mirror", "zalandoresearch/fashion-mnist", "special database 19"):
        assert home in message
    assert "\n" not in message


def test_missing_folder(tmp_path):
    with pytest.raises(
        InputError, match=r"data\.path: .*nowhere does not exist; name the folder of idx_images"
    ):
        build_dataset(config(tmp_path / "nowhere"), seed=1)


def test_path_is_required():
    with pytest.raises(InputError, match=r"data\.path must name the folder of idx_images"):
        build_dataset(config(None), seed=1)


@pytest.mark.parametrize("evaluation", ["test", "development"])
def test_a_wrong_label_costs_its_own_example_alone(split_writer, mnist_folder, labels, evaluation):
    settings = config(mnist_folder, evaluation=evaluation)
    before = build_dataset(settings, seed=1)
    labels[17], labels[24] = 10, 255  # the one is dealt to a user, the other held out
    split_writer("train", labels)
    dataset = build_dataset(settings, seed=1)
    assert "; 2 training examples with wrong labels, left out" in dataset.sizes or (
        evaluation == "development"
        and "; 1 training examples with wrong labels, left out" in dataset.sizes
    )
    users = [(before.user(index), dataset.user(index)) for index in range(6)]
    assert f" {sum(len(now) for _, now in users)} in all" in dataset.sizes
    assert f"; {len(held_out(dataset))} {evaluation} examples" in dataset.description
    hit = {index for index, (_, now) in enumerate(users) if now.skipped}
    assert sum(now.skipped for _, now in users) == (1 if evaluation == "development" else 2)
    for index, (was, now) in enumerate(users):
        assert len(now) + now.skipped == len(was)
        assert index in hit or now.inputs.equal(was.inputs)
    assert int(max(now.targets.max() for _, now in users)) <= 9
    assert held_out(dataset).skipped == (1 if evaluation == "development" else 0)


def test_a_user_with_wrong_labels_alone_has_no_examples(split_writer, mnist_folder, labels):
    first = build_dataset(config(mnist_folder), seed=1).parts[0]
    labels[first] = 99
    split_writer("train", labels)
    dataset = build_dataset(config(mnist_folder), seed=1)
    assert (len(dataset.user(0)), dataset.user(0).skipped) == (0, 10)
    assert sum(dataset.user(index).skipped for index in range(1, 6)) == 0


def test_a_wrong_test_label_is_refused(split_writer, mnist_folder, labels):
    labels[17] = 10
    split_writer("t10k", labels[:20])
    expected = "t10k-labels-idx1-ubyte: wrong label 10 at example 17: labels are 0 to 9"
    with pytest.raises(InputError, match=expected):
        build_dataset(config(mnist_folder), seed=1)


def test_letter_zero_is_a_wrong_label(split_writer):
    split_writer("emnist-letters-train", np.array([1, 0, 2]))
    folder = split_writer("emnist-letters-test", np.array([1]))
    dataset = build_dataset(config(folder, users=1), seed=1)
    assert (dataset.user(0).targets.tolist(), dataset.user(0).skipped) == ([0, 1], 1)


def test_labels_of_another_data_set_are_refused(split_writer):
    split_writer("train", np.arange(26) + 1)
    folder = split_writer("t10k", np.arange(9) + 1)
    expected = r"wrong label 10 at example 9: labels are 0 to 9 \(wrong ones: 17\)"
    with pytest.raises(InputError, match=expected):
        build_dataset(config(folder), seed=1)


def test_unequally_many_images_and_labels(mnist_folder):
    (mnist_folder / "train-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 1, 5]))
    with pytest.raises(InputError, match=r"train-labels.*expected 60 labels .*shape \[1\]"):
        build_dataset(config(mnist_folder), seed=1)


def test_images_of_another_shape(mnist_folder):
    (mnist_folder / "train-images-idx3-ubyte.gz").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 1, 5]))
    with pytest.raises(InputError, match=r"expected uint8 images .*found uint8 \[1\]"):
        build_dataset(config(mnist_folder), seed=1)


def test_test_images_of_another_size_than_the_training_images(mnist_folder):
    header = bytes([0, 0, 8, 3, 0, 0, 0, 20, 0, 0, 0, 2, 0, 0, 0, 2])
    (mnist_folder / "t10k-images-idx3-ubyte.gz").write_bytes(header + bytes(80))
    with pytest.raises(InputError, match=r"images are \[1, 4, 6\] but test images \[1, 2, 2\]"):
        build_dataset(config(mnist_folder), seed=1)


def test_natural_users_are_refused(mnist_folder):
    natural = PartitionConfig(kind="natural")
    with pytest.raises(InputError, match=r"data\.partition\.kind=natural: data set idx_images"):
        build_dataset(config(mnist_folder, partition=natural, users=None), seed=1)


def test_development_holds_out_every_eighth_training_image(mnist_folder, labels):
    dataset = build_dataset(config(mnist_folder, evaluation="development"), seed=1)
    assert held_out(dataset).targets.tolist() == labels[::8].tolist()
    held = set(held_out(dataset).inputs[:, 0, 0, 0].tolist())
    used = {
        pixel for index in range(6) for pixel in dataset.user(index).inputs[:, 0, 0, 0].tolist()
    }
    assert len(used) == 52
    assert not held & used


@pytest.mark.parametrize("prefix", ["", "emnist-letters-"])
def test_hidden_files_are_no_other_set_of_images(split_writer, prefix):
    labels = np.arange(26) % 9 + 1
    split_writer(f"{prefix}train", labels)
    folder = split_writer(f"{prefix}test" if prefix else "t10k", labels)
    for path in list(folder.iterdir()):
        (folder / f"._{path.name}").write_bytes(b"\0\x05\x16\x07")
    assert build_dataset(config(folder), seed=1).population == 6


@pytest.mark.parametrize("call", ["pathlib.Path.is_file", "pathlib.Path.read_bytes", "os.scandir"])
def test_files_out_of_reach_are_a_fault_of_the_machine(mnist_folder, monkeypatch, call):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(call, refuse)
    with pytest.raises(EnvironmentFault, match=r"cannot be read \(Permission denied\)"):
        build_dataset(config(mnist_folder), seed=1)
